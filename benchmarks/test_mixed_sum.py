"""The weighted sum alone, for candidates of any kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastnas
from benchmarks import plain
from benchmarks.build import layout, leaf, random
from benchmarks.measure import Variant, replay

pytestmark = pytest.mark.benchmark(timer=replay)

# summands, N, C, H, W
SHAPES = [(8, 64, 16, 32, 32), (8, 64, 64, 8, 8), (5, 64, 16, 32, 32)]
QUICK = [(8, 2, 6, 5, 5)]


def test_mixed_sum(shape: tuple[int, ...], compete: Callable[..., None], device: str) -> None:
    count, *size = shape

    def build(name: str, dtype: torch.dtype) -> Variant:
        xs = [leaf(random(*size, seed=seed, dtype=dtype, device=device), name) for seed in range(count)]
        weights = leaf(random(count, seed=count, dtype=dtype, device=device).softmax(0), name)
        grad = random(*size, seed=count + 1, dtype=dtype, device=device).contiguous(memory_format=layout(name))
        run = fastnas.mixed_sum if name == "fastnas" else plain.mixed_sum
        if name.startswith("compiled"):
            run = torch.compile(run, dynamic=False)
        inputs = {f"x{i}": x for i, x in enumerate(xs)}
        return Variant(lambda: run(xs, weights), inputs, {"weights": weights}, grad)

    compete(f"mixed_sum of {count} ({', '.join(map(str, size))})", build, rounds=50)
