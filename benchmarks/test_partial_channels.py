"""The ends of a partially connected edge: split, and bypass, concatenation and channel shuffle; no candidates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.build import layout, leaf, random
from benchmarks.measure import Variant, replay
from fastnas.ops.partial_channels import partial_channels, partial_channels_split

pytestmark = pytest.mark.benchmark(timer=replay)

# N, C, H, W, stride, k
SHAPES = [(64, 64, 32, 32, 1, 4), (64, 64, 32, 32, 2, 4)]
QUICK = [(2, 8, 6, 6, 1, 4), (2, 8, 6, 6, 2, 2)]


def test_partial_channels(shape: tuple[int, ...], compete: Callable[..., None], device: str) -> None:
    n, c, h, w, stride, k = shape

    def ours(x: Tensor) -> Tensor:
        active, bypass = partial_channels_split(x, k, stride)
        return partial_channels(active[:, :, ::stride, ::stride], bypass)

    def theirs(x: Tensor) -> Tensor:
        return plain.shuffled(x[:, : c // k, ::stride, ::stride], x, k, stride)

    def build(name: str, dtype: torch.dtype) -> Variant:
        x = leaf(random(n, c, h, w, seed=1, dtype=dtype, device=device), name)
        grad = random(n, c, h // stride, w // stride, seed=2, dtype=dtype, device=device)
        run = ours if name == "fastnas" else theirs
        if name.startswith("compiled"):
            run = torch.compile(run, dynamic=False)
        return Variant(lambda: run(x), {"x": x}, {}, grad.contiguous(memory_format=layout(name)))

    compete(f"partial channels ({n}, {c}, {h}, {w}) stride {stride}, k={k}", build, rounds=50)
