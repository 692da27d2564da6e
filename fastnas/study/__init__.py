"""What a supernet, or any other score, can and cannot rank."""

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
    "Bottom",
    "OperatorShares",
    "RandomTop",
    "Ranking",
    "Stability",
    "bottom_k",
    "operator_shares",
    "random_top_k",
    "ranking",
    "stability",
    "top_k",
]
