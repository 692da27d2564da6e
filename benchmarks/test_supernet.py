"""The loss of a supernet on one batch, and its gradients by all weights and architecture parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import Variant, replay
from benchmarks.supernets import SPACES, loss_on_a_batch

pytestmark = pytest.mark.benchmark(timer=replay)

# space, N, C, cells (of a stage in NAS-Bench-201), H = W, k
SHAPES = [("DARTS", 16, 16, 8, 32, 1), ("PC-DARTS", 16, 16, 8, 32, 4), ("NAS-Bench-201", 64, 16, 5, 32, 1)]
QUICK = [("DARTS", 4, 4, 3, 16, 1), ("PC-DARTS", 4, 8, 3, 16, 4), ("NAS-Bench-201", 4, 4, 1, 16, 1)]
SLOW_TO_COMPILE = True


Shape = tuple[str, int, int, int, int, int]


def title(shape: Shape) -> str:
    """Returns what a benchmark of this supernet is called."""
    name, batch, channels, cells, size, k = shape
    what = f"{cells} cells" if name != "NAS-Bench-201" else f"3 x {cells} cells"
    return f"{name} supernet, C {channels}, {what}, batch {batch}, {size}x{size}{f', k={k}' if k > 1 else ''}"


def test_supernet(shape: Shape, compete: Callable[..., None], device: str) -> None:
    name, batch, channels, cells, size, k = shape
    space = SPACES[name]
    options = {"k": k} if k > 1 else {}
    sizes = {"batch": batch, "channels": channels, "cells": cells, "size": size}

    def build(name: str, dtype: torch.dtype) -> Variant:
        return loss_on_a_batch(space, name, dtype, device, **sizes, ours=options, theirs=options)

    # Rounding turns some ReLU in so deep a net, in every variant another; in float64 they agree to 1e-9.
    compete(title(shape), build, rounds=7, tolerance=5e-3, region=f"each {space.region.__name__}")
