"""One edge of the DARTS space: eight candidates, forward and backward; one group with PC-DARTS' partial channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.edges import Shape, edge, title
from benchmarks.measure import replay

pytestmark = pytest.mark.benchmark(timer=replay)

# N, C, H, W, stride, k
SHAPES = [
    (64, 16, 32, 32, 1, 1),
    (64, 32, 16, 16, 1, 1),
    (64, 64, 8, 8, 1, 1),
    (64, 36, 16, 16, 1, 1),
    (96, 36, 32, 32, 1, 1),
    (64, 32, 32, 32, 2, 1),
    (64, 64, 32, 32, 1, 4),
]
QUICK = [(4, 16, 8, 8, 1, 1), (4, 6, 8, 8, 2, 1), (4, 16, 8, 8, 2, 4)]


def test_mixed_op(shape: Shape, compete: Callable[..., None], device: str) -> None:
    compete(title(shape), lambda name, dtype: edge(shape, name, dtype, device), rounds=30)
