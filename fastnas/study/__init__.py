"""What a supernet, or any other score, can and cannot rank."""

from fastnas.study.config import StudyOptions
from fastnas.study.evaluation import BN_MODES, Finetuning, Subnets
from fastnas.study.results import Snapshot, Studied
from fastnas.study.run import study
from fastnas.study.statistics import (
    Bottom,
    OperatorShares,
    RandomTop,
    Ranking,
    Stability,
    bottom_k,
    operator_shares,
    random_top_k,
    ranking,
    stability,
    top_k,
)

__all__ = [
    "BN_MODES",
    "Bottom",
    "Finetuning",
    "OperatorShares",
    "RandomTop",
    "Ranking",
    "Snapshot",
    "Stability",
    "Studied",
    "StudyOptions",
    "Subnets",
    "bottom_k",
    "operator_shares",
    "random_top_k",
    "ranking",
    "stability",
    "study",
    "top_k",
]
