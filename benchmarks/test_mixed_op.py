"""One edge of the DARTS space: eight candidates, forward and backward; one group with PC-DARTS' partial channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastnas
from benchmarks import plain
from benchmarks.build import leaf, random, variant
from benchmarks.measure import Variant, replay

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


def test_mixed_op(shape: tuple[int, ...], compete: Callable[..., None], device: str) -> None:
    n, c, h, w, stride, k = shape
    torch.manual_seed(0)
    state = plain.MixedOp(c, stride, k).state_dict()

    def build(name: str, dtype: torch.dtype) -> Variant:
        x = leaf(random(n, c, h, w, seed=1, dtype=dtype, device=device), name)
        weights = leaf(random(len(plain.PRIMITIVES), seed=2, dtype=dtype, device=device).softmax(0), name)
        grad = random(n, c, h // stride, w // stride, seed=3, dtype=dtype, device=device)
        side = fastnas if name == "fastnas" else plain
        return variant(
            side.MixedOp(c, stride, k),
            state,
            name,
            dtype,
            device,
            arguments=(x, weights),
            inputs={"x": x},
            parameters={"weights": weights},
            grad=grad,
        )

    partial = f", k={k}" if k > 1 else ""
    compete(f"MixedOp ({n}, {c}, {h}, {w}) stride {stride}{partial}", build, rounds=30)
