"""The search: options and methods, the bilevel loop, checkpoints and run folders."""

from fastnas.runs.machine import DivergenceError
from fastnas.search.architect import Architect, Bilevel, first_order, rewinding, second_order
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import SearchConfig
from fastnas.search.loop import EpochRecord, Search, SearchResult, search
from fastnas.search.methods import METHODS, Method, get_method, register_method

__all__ = [
    "METHODS",
    "Architect",
    "Bilevel",
    "CheckpointError",
    "DivergenceError",
    "EpochRecord",
    "Method",
    "Search",
    "SearchConfig",
    "SearchResult",
    "first_order",
    "get_method",
    "register_method",
    "rewinding",
    "search",
    "second_order",
]
