"""Search spaces: a space builds a supernet from primitives and turns scores into a genotype.

One file each; a file here is found by itself. ``register`` adds one of your own.
"""

import importlib
import pkgutil

from fastnas.spaces._registry import SPACES, Space, get_space, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from fastnas.spaces._chain import ChainSpace  # noqa: E402
from fastnas.spaces.darts import DartsSpace  # noqa: E402
from fastnas.spaces.nasbench1shot1 import OneShotSpace  # noqa: E402
from fastnas.spaces.nasbench201 import NASBench201Space  # noqa: E402

__all__ = ["SPACES", "ChainSpace", "DartsSpace", "NASBench201Space", "OneShotSpace", "Space", "get_space", "register"]
