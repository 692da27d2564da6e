"""The names of SmoothDARTS' search code (arXiv:2002.05283): ``model_search``, ``architect``, ``perturb``, ``spaces``.

Every edge may have candidates of its own, as in the spaces S1 to S4 (arXiv:1909.09656). The alphas are perturbed as
weights on the simplex: a script calls ``softmax_arch_parameters``, :func:`Random_alpha` or :func:`Linf_PGD_alpha`, the
model with ``updateType="weight"``, and ``restore_arch_parameters``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastnas import nn as _nn
from fastnas.compat.darts import (
    OPS,
    Architect,
    Criterion,
    DilConv,
    FactorizedReduce,
    Genotype,
    Identity,
    ReLUConvBN,
    SepConv,
    Zero,
)
from fastnas.compat.darts import PRIMITIVES as _PRIMITIVES
from fastnas.compat.darts import Network as _Network
from fastnas.nn import MixedOp
from fastnas.nn.derived import _drop_path
from fastnas.nn.mixed_op import as_table
from fastnas.nn.operations import primitive
from fastnas.search.perturbation import adversarial, random
from fastnas.spaces.darts import DartsSpace

__all__ = [
    "OPS",
    "PRIMITIVES",
    "Architect",
    "Cell",
    "DilConv",
    "FactorizedReduce",
    "Genotype",
    "Identity",
    "Linf_PGD_alpha",
    "MixedOp",
    "Network",
    "NoiseOp",
    "Random_alpha",
    "ReLUConvBN",
    "SepConv",
    "Zero",
    "spaces_dict",
]

_LOG = logging.getLogger(__name__)

Primitives: TypeAlias = Sequence[str] | Mapping[str, Sequence[Sequence[str]]]
"""The candidates of all edges, or ``primitives_normal`` and ``primitives_reduct`` with those of each edge."""

PRIMITIVES = [p for p in _PRIMITIVES if p != "none"]

_NORMAL_1 = (
    "skip_connect dil_conv_3x3, skip_connect dil_conv_5x5, skip_connect dil_conv_5x5, skip_connect sep_conv_3x3, "
    "skip_connect dil_conv_3x3, max_pool_3x3 skip_connect, skip_connect sep_conv_3x3, skip_connect sep_conv_3x3, "
    "skip_connect dil_conv_3x3, skip_connect sep_conv_3x3, max_pool_3x3 skip_connect, skip_connect dil_conv_3x3, "
    "dil_conv_3x3 dil_conv_5x5, dil_conv_3x3 dil_conv_5x5"
)
_REDUCE_1 = (
    "max_pool_3x3 avg_pool_3x3, max_pool_3x3 dil_conv_3x3, max_pool_3x3 avg_pool_3x3, max_pool_3x3 avg_pool_3x3, "
    "skip_connect dil_conv_5x5, max_pool_3x3 avg_pool_3x3, max_pool_3x3 sep_conv_3x3, skip_connect dil_conv_3x3, "
    "skip_connect dil_conv_5x5, max_pool_3x3 avg_pool_3x3, max_pool_3x3 avg_pool_3x3, skip_connect dil_conv_5x5, "
    "skip_connect dil_conv_5x5, skip_connect dil_conv_5x5"
)


def _everywhere(primitives: Sequence[str]) -> dict[str, list[list[str]]]:
    return {name: [list(primitives) for _ in range(14)] for name in ("primitives_normal", "primitives_reduct")}


spaces_dict: dict[str, dict[str, list[list[str]]]] = {
    "s1": {
        "primitives_normal": [edge.split() for edge in _NORMAL_1.split(",")],
        "primitives_reduct": [edge.split() for edge in _REDUCE_1.split(",")],
    },
    "s2": _everywhere(["skip_connect", "sep_conv_3x3"]),
    "s3": _everywhere(["none", "skip_connect", "sep_conv_3x3"]),
    "s4": _everywhere(["noise", "sep_conv_3x3"]),
    "s5": _everywhere(PRIMITIVES),
}


class NoiseOp(nn.Module):
    """Normal noise in the shape of its input, whatever the input is: the harmful candidate of S4."""

    def __init__(self, stride: int, mean: float, std: float) -> None:
        super().__init__()
        self.stride = stride
        self.mean = mean
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C, H / stride, W / stride)."""
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride]) * self.std + self.mean


@primitive("noise")
def _noise(C: int, stride: int, affine: bool) -> nn.Module:
    return NoiseOp(stride, 0.0, 1.0)


def _of_edges(primitives: Primitives, reduction: bool, edges: int) -> list[list[str]]:
    """Returns the candidates of each edge of a cell.

    Raises:
        ValueError: where there are not as many for each edge, or an edge has none of use.
    """
    if isinstance(primitives, Mapping):
        name = "primitives_reduct" if reduction else "primitives_normal"
        if name not in primitives:
            raise ValueError(f"primitives has no {name!r}, only {', '.join(map(repr, primitives)) or 'nothing'}")
        rows = [list(row) for row in primitives[name]]
    else:
        rows = [list(primitives) for _ in range(edges)]
    if len(rows) != edges or len({len(row) for row in rows}) != 1:
        raise ValueError(f"primitives must name as many candidates for each of {edges} edges, got {rows}")
    if any(set(row) <= {"none"} for row in rows):
        raise ValueError("primitives: every edge needs a candidate that is not 'none'")
    return rows


def _mixed_ops(rows: Sequence[Sequence[str]], steps: int, C: int, reduction: bool) -> nn.ModuleList:
    inputs = [j for i in range(steps) for j in range(2 + i)]
    return nn.ModuleList(MixedOp(C, 2 if reduction and j < 2 else 1, row) for j, row in zip(inputs, rows, strict=True))


def _with_drop_path(cell: _nn.Cell, s0: Tensor, s1: Tensor, weights: Tensor, drop_prob: float) -> Tensor:
    """The cell's output where each edge is dropped for an image with probability ``drop_prob``."""
    states = [cell.preprocess0(s0), cell.preprocess1(s1)]
    edge = 0
    for _ in range(cell._steps):
        ends = [_drop_path(cell._ops[edge + j](state, weights[edge + j]), drop_prob) for j, state in enumerate(states)]
        edge += len(states)
        states.append(torch.stack(ends).sum(0))
    return torch.cat(states[-cell._multiplier :], dim=1)


class Cell(_nn.Cell):
    """A search cell; ``forward(s0, s1, weights, drop_prob)``.

    Args:
        steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev: as those of :class:`fastnas.nn.Cell`.
        primitives: the candidates; where None, what a script has set as ``torch.nn.Module.PRIMITIVES``, or those of S5.
    """

    def __init__(
        self,
        steps: int,
        multiplier: int,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
        *,
        primitives: Primitives | None = None,
    ) -> None:
        # the edges are made below, and a candidate without parameters draws nothing
        super().__init__(*(steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev), primitives=("none",))
        if primitives is None:
            primitives = getattr(nn.Module, "PRIMITIVES", PRIMITIVES)
        self._ops = _mixed_ops(_of_edges(primitives, reduction, len(self._ops)), steps, C, reduction)

    def forward(  # type: ignore[override]
        self, s0: Tensor, s1: Tensor, weights: Tensor | Sequence[Tensor], drop_prob: float = 0.0
    ) -> Tensor:
        """Returns the cell's output; in training, an image loses an edge with probability ``drop_prob``."""
        if self.training and drop_prob > 0:
            return _with_drop_path(self, s0, s1, as_table(weights, s0.device), drop_prob)
        return super().forward(s0, s1, weights)


class Network(_Network):
    """The supernet of SmoothDARTS together with its architecture parameters.

    Args:
        C, num_classes, layers, criterion, steps, multiplier, stem_multiplier, in_channels: as those of
            :class:`fastnas.compat.darts.Network`.
        primitives: the candidates, such as ``spaces_dict["s5"]``.
        drop_path_prob: in training, the probability with which an image loses an edge.
    """

    _primitives = ("skip_connect",)  # until each edge gets its own

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        criterion: Criterion,
        primitives: Primitives,
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        drop_path_prob: float = 0.0,
        *,
        in_channels: int = 3,
    ) -> None:
        super().__init__(
            *(C, num_classes, layers, criterion, steps, multiplier, stem_multiplier), in_channels=in_channels
        )
        self.drop_path_prob = drop_path_prob
        self._rows = {
            name: _of_edges(primitives, name == "reduce", steps * (steps + 3) // 2) for name in ("normal", "reduce")
        }
        width = C
        for cell in self.cells:
            assert isinstance(cell, _nn.Cell)
            width *= 2 if cell.reduction else 1
            rows = self._rows["reduce" if cell.reduction else "normal"]
            cell._ops = _mixed_ops(rows, steps, width, cell.reduction)
        for name, alpha in zip(self._rows, self._arch_parameters, strict=True):
            rows = self._rows[name]
            alpha.data = 1e-3 * torch.randn(len(rows), len(rows[0]))
        self._unperturbed: list[Tensor] = []

    def forward(self, input: Tensor, updateType: str = "alpha") -> Tensor:  # type: ignore[override]
        """Returns the logits, (N, num_classes).

        Args:
            input: (N, in_channels, H, W).
            updateType: ``alpha``: the weights are softmax of the alphas; ``weight``: the alphas themselves, between
                ``softmax_arch_parameters`` and ``restore_arch_parameters``.

        Raises:
            ValueError: for another ``updateType``.
        """
        if updateType not in ("alpha", "weight"):
            raise ValueError(f"updateType={updateType!r}: expected 'alpha' or 'weight'")
        return self._logits(input, self._weights() if updateType == "alpha" else self._tables())

    def _logits(self, input: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            assert isinstance(cell, _nn.Cell)
            table = weights["reduce" if cell.reduction else "normal"]
            if self.training and self.drop_path_prob > 0:
                s0, s1 = s1, _with_drop_path(cell, s0, s1, table, self.drop_path_prob)
            else:
                s0, s1 = s1, cell(s0, s1, table)
        logits: Tensor = self.classifier(self.global_pooling(s1).flatten(1))
        return logits

    def _loss(self, input: Tensor, target: Tensor, updateType: str = "alpha") -> Tensor:
        return self._criterion(self(input, updateType), target)

    def softmax_arch_parameters(self) -> None:
        """Writes softmax of the alphas into them; ``restore_arch_parameters`` takes it back."""
        self._unperturbed = [alpha.detach().clone() for alpha in self._arch_parameters]
        for alpha in self._arch_parameters:
            alpha.data.copy_(torch.softmax(alpha.data, dim=-1))

    def restore_arch_parameters(self) -> None:
        """Puts the alphas back to what they were at ``softmax_arch_parameters``.

        Raises:
            RuntimeError: where that has not been called.
        """
        if not self._unperturbed:
            raise RuntimeError("there is nothing to restore: call softmax_arch_parameters first")
        for alpha, value in zip(self._arch_parameters, self._unperturbed, strict=True):
            alpha.data.copy_(value)
        self._unperturbed = []

    def clip(self) -> None:
        """Clips the alphas to [0, 1] and divides each row by its sum.

        Of a row without a positive entry the largest becomes 1, where the division would give NaN.
        """
        for alpha in self._arch_parameters:
            largest = torch.zeros_like(alpha.data).scatter_(-1, alpha.data.argmax(-1, keepdim=True), 1.0)
            clipped = alpha.data.clamp(0, 1)
            total = clipped.sum(-1, keepdim=True)
            alpha.data.copy_(torch.where(total > 0, clipped / total, largest))

    def genotype(self) -> Genotype:
        """Returns the architecture that the architecture parameters stand for now, from each edge's own candidates."""
        names = tuple(dict.fromkeys(p for rows in self._rows.values() for row in rows for p in row))
        scores = {}
        for cell_type, weights in self._weights().items():
            # a candidate that an edge does not have loses against each that it has
            scores[cell_type] = torch.full((len(weights), len(names)), -1.0)
            for edge, row in enumerate(self._rows[cell_type]):
                scores[cell_type][edge, [names.index(p) for p in row]] = weights[edge].detach().to("cpu", torch.float32)
        space = DartsSpace(primitives=names, steps=self._steps, multiplier=self._multiplier)
        return space.derive(scores)

    def show_alphas(self) -> None:
        """Logs the weights of the candidates."""
        for name, weights in self._weights().items():
            _LOG.info("%s\n%s", name, weights.detach().cpu())


def Random_alpha(model: Network, X: Tensor, y: Tensor, epsilon: float) -> None:  # noqa: N802
    """Moves each alpha by a uniform number from -epsilon to epsilon, and clips (SDARTS-RS).

    Args:
        model: between ``softmax_arch_parameters`` and ``restore_arch_parameters``.
        X: images; not used.
        y: labels; not used.
        epsilon: radius.
    """
    _assign(model, random(model._tables(), epsilon))


def Linf_PGD_alpha(model: Network, X: Tensor, y: Tensor, epsilon: float, steps: int = 7) -> None:  # noqa: N802
    """Moves the alphas to where the loss is worse, in evaluation mode (SDARTS-ADV).

    See :func:`fastnas.search.perturbation.adversarial`. Gradients that parameters have stay as they are.

    Args:
        model: between ``softmax_arch_parameters`` and ``restore_arch_parameters``.
        X: images, (N, in_channels, H, W).
        y: their labels.
        epsilon: radius in the maximum norm.
        steps: of the ascent.
    """
    training = model.training
    model.eval()
    try:
        found = adversarial(
            *(model._tables(), epsilon, lambda weights: model._criterion(model._logits(X, weights), y)),
            parameters=model.parameters(),
            steps=steps,
        )
    finally:
        model.train(training)
    _assign(model, found)


def _assign(model: Network, weights: Mapping[str, Tensor]) -> None:
    for name, alpha in model._tables().items():
        alpha.data.copy_(weights[name])
