"""The loss of a supernet on one batch, as variants: fastnas' and the plain one, in any of the known spaces.

torch.compile is given one MixedOp of the DARTS space at a time: those that are alike share one graph, so five graphs
serve the 112 of them. No two of the eight cells have the same shapes, so given one cell at a time it compiles eight
graphs, each fourteen times as large. In NAS-Bench-201 the cells of a stage are alike: there it is given one cell at a
time, and three graphs serve fifteen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.build import layout, leaf, random, variant
from benchmarks.measure import Variant
from fastnas.nn import NASBench201Supernet, Supernet


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


def loss_on_a_batch(
    space: Space,
    name: str,
    dtype: torch.dtype,
    device: str,
    *,
    batch: int,
    channels: int,
    cells: int,
    size: int,
    ours: Mapping[str, Any] | None = None,
    theirs: Mapping[str, Any] | None = None,
) -> Variant:
    """Returns the variant ``name`` of the loss; all variants of the same sizes have the same numbers in them.

    Args:
        space: one of ``SPACES``, or alike.
        name: "fastnas", or how the plain side runs.
        dtype: of everything.
        device: "cpu" or "cuda".
        batch: number of images.
        channels: of the first cells.
        cells: how many; of a stage in NAS-Bench-201.
        size: height and width of the images.
        ours: further options of fastnas' supernet.
        theirs: the same of the plain one.
    """
    torch.manual_seed(0)
    reference = space.sides[1](channels, cells, **(theirs or {}))
    chosen = space.sides[0](channels, cells, **(ours or {})) if name == "fastnas" else reference
    images = random(batch, 3, size, size, seed=1, dtype=dtype, device=device)
    alphas = {
        what: leaf(1e-3 * random(*shape, seed=seed, dtype=dtype, device=device), name)
        for seed, (what, shape) in enumerate(space.alphas.items(), 2)
    }
    return variant(
        Loss(chosen, space.relax),
        {f"supernet.{key}": value.clone() for key, value in reference.state_dict().items()},
        name,
        dtype,
        device,
        arguments=(
            images.contiguous(memory_format=layout(name)),
            (torch.arange(batch) % 10).to(device),
            alphas,
        ),
        inputs={},
        parameters=alphas,
        grad=torch.ones((), dtype=dtype, device=device),
        compile_parts=lambda loss: [m for m in loss.modules() if isinstance(m, space.region)],
    )
