"""The loss of a supernet on one batch, and its gradients by all weights and architecture parameters.

torch.compile is given one MixedOp of the DARTS space at a time: those that are alike share one graph, so five graphs
serve the 112 of them. No two of the eight cells have the same shapes, so given one cell at a time it compiles eight
graphs, each fourteen times as large. In NAS-Bench-201 the cells of a stage are alike: there it is given one cell at a
time, and three graphs serve fifteen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.build import layout, leaf, random, variant
from benchmarks.measure import Variant, replay
from fastnas.nn import NASBench201Supernet, Supernet

pytestmark = pytest.mark.benchmark(timer=replay)

# space, N, C, cells (of a stage in NAS-Bench-201), H = W, k
SHAPES = [("DARTS", 16, 16, 8, 32, 1), ("PC-DARTS", 16, 16, 8, 32, 4), ("NAS-Bench-201", 64, 16, 5, 32, 1)]
QUICK = [("DARTS", 4, 4, 3, 16, 1), ("PC-DARTS", 4, 8, 3, 16, 4), ("NAS-Bench-201", 4, 4, 1, 16, 1)]
SLOW_TO_COMPILE = True


def darts(alphas: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    return ({name: a.softmax(-1) for name, a in alphas.items()},)


def pc_darts(alphas: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """Betas go through a softmax over the edges into each node."""
    betas = {name: alphas[f"{name} betas"] for name in ("normal", "reduce")}
    edges = {name: torch.cat([b.softmax(0) for b in beta.split([2, 3, 4, 5])]) for name, beta in betas.items()}
    return *darts({name: alphas[name] for name in betas}), edges


def nasbench201(alphas: Mapping[str, Tensor]) -> tuple[Tensor]:
    return (alphas["edges"].softmax(-1),)


@dataclass(frozen=True)
class Space:
    """How a search space is measured.

    Attributes:
        sides: fastnas' supernet and the plain one.
        alphas: shapes of the architecture parameters.
        relax: what a supernet's forward takes beside the images, made of them.
        region: what is compiled at a time.
    """

    sides: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]
    alphas: Mapping[str, tuple[int, ...]]
    relax: Callable[[Mapping[str, Tensor]], tuple[object, ...]]
    region: type[nn.Module]


DARTS = {"normal": (14, 8), "reduce": (14, 8)}
SPACES = {
    "DARTS": Space((Supernet, plain.Supernet), DARTS, darts, plain.MixedOp),
    "PC-DARTS": Space(
        (Supernet, plain.Supernet), {**DARTS, "normal betas": (14,), "reduce betas": (14,)}, pc_darts, plain.MixedOp
    ),
    "NAS-Bench-201": Space(
        (NASBench201Supernet, plain.NASBench201Supernet), {"edges": (6, 5)}, nasbench201, plain.NASBench201Cell
    ),
}


class Loss(nn.Module):
    """Cross entropy of a supernet on one batch."""

    def __init__(self, supernet: nn.Module, relax: Callable[[Mapping[str, Tensor]], tuple[object, ...]]) -> None:
        super().__init__()
        self.supernet, self.relax = supernet, relax

    def forward(self, images: Tensor, labels: Tensor, alphas: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.supernet(images, *self.relax(alphas)), labels)


def test_supernet(shape: tuple[str, int, int, int, int, int], compete: Callable[..., None], device: str) -> None:
    name, n, c, cells, size, k = shape
    space = SPACES[name]
    options = {"k": k} if k > 1 else {}
    ours, theirs = space.sides
    torch.manual_seed(0)
    state = Loss(theirs(c, cells, **options), space.relax).state_dict()
    labels = (torch.arange(n) % 10).to(device)

    def build(name: str, dtype: torch.dtype) -> Variant:
        images = random(n, 3, size, size, seed=1, dtype=dtype, device=device)
        images = images.contiguous(memory_format=layout(name))
        alphas = {
            what: leaf(1e-3 * random(*shape, seed=seed, dtype=dtype, device=device), name)
            for seed, (what, shape) in enumerate(space.alphas.items(), 2)
        }
        side = ours if name == "fastnas" else theirs
        return variant(
            Loss(side(c, cells, **options), space.relax),
            state,
            name,
            dtype,
            device,
            arguments=(images, labels, alphas),
            inputs={},
            parameters=alphas,
            grad=torch.ones((), dtype=dtype, device=device),
            compile_parts=lambda loss: [m for m in loss.modules() if isinstance(m, space.region)],
        )

    what = f"{cells} cells" if name != "NAS-Bench-201" else f"3 x {cells} cells"
    partial = f", k={k}" if k > 1 else ""
    group = f"{name} supernet, C {c}, {what}, batch {n}, {size}x{size}{partial}"
    compete(group, build, rounds=7, tolerance=1e-3, region=f"each {space.region.__name__}")
