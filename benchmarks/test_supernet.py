"""The loss of the DARTS supernet on one batch, and its gradients by all weights and alphas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.build import layout, leaf, random, variant
from benchmarks.measure import Variant, replay
from fastnas.nn import Supernet

pytestmark = pytest.mark.benchmark(timer=replay)

# N, C, cells, H = W
SHAPES = [(16, 16, 8, 32)]
QUICK = [(4, 4, 3, 16)]
SLOW_TO_COMPILE = True


class Loss(nn.Module):
    """Cross entropy of a supernet on one batch; alphas go through a softmax."""

    def __init__(self, supernet: nn.Module) -> None:
        super().__init__()
        self.supernet = supernet

    def forward(self, images: Tensor, labels: Tensor, normal: Tensor, reduce: Tensor) -> Tensor:
        weights = {"normal": normal.softmax(-1), "reduce": reduce.softmax(-1)}
        return F.cross_entropy(self.supernet(images, weights), labels)


def test_supernet(shape: tuple[int, ...], compete: Callable[..., None], device: str) -> None:
    n, c, cells, size = shape
    torch.manual_seed(0)
    state = Loss(plain.Supernet(c, cells)).state_dict()
    labels = (torch.arange(n) % 10).to(device)

    def build(name: str, dtype: torch.dtype) -> Variant:
        images = random(n, 3, size, size, seed=1, dtype=dtype, device=device)
        images = images.contiguous(memory_format=layout(name))
        alphas = [leaf(1e-3 * random(14, 8, seed=seed, dtype=dtype, device=device), name) for seed in (2, 3)]
        side = Supernet if name == "fastnas" else plain.Supernet
        return variant(
            Loss(side(c, cells)),
            state,
            name,
            dtype,
            device,
            arguments=(images, labels, *alphas),
            inputs={},
            parameters={"normal": alphas[0], "reduce": alphas[1]},
            grad=torch.ones((), dtype=dtype, device=device),
            compile_parts=lambda loss: list(loss.supernet.cells),
        )

    compete(f"DARTS supernet, C {c}, {cells} cells, batch {n}, {size}x{size}", build, rounds=7, tolerance=1e-3)
