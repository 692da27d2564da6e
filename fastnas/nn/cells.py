"""The search cell of DARTS (arXiv:1806.09055, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastnas.nn.fused_cell import FusedCell
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import PRIMITIVES, FactorizedReduce, ReLUConvBN


class Cell(nn.Module):
    """A cell whose every edge is a MixedOp.

    State 0 and 1 are the preprocessed outputs of the two previous cells; node i = 2, 3, ... is Σ_j MixedOp_(i, j)(state
    j) over all j < i; the output concatenates the last ``multiplier`` states. Edges are ordered by (node, input). The
    backward reads the output, so it must not be changed in place.

    Args:
        steps: number of nodes.
        multiplier: number of nodes that are concatenated.
        C_prev_prev: channels of the cell before the previous one.
        C_prev: channels of the previous cell.
        C: channels of every state; the output has ``multiplier * C``.
        reduction: halve height and width: the edges from state 0 and 1 have stride 2.
        reduction_prev: the previous cell was a reduction, so that its predecessor's output is twice as large.
        primitives: the candidates of an edge.
        k: partial channels: the candidates see 1/k of the channels.
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
        primitives: Sequence[str] = PRIMITIVES,
        k: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= multiplier <= steps:
            raise ValueError(f"multiplier={multiplier} must be from 1 to steps={steps}: it counts concatenated nodes")
        self.reduction = reduction
        self.preprocess0: nn.Module
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._steps = steps
        self._multiplier = multiplier
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and j < 2 else 1, primitives=primitives, k=k)
            for i in range(steps)
            for j in range(2 + i)
        )
        self._fused = self._fuse()

    def _fuse(self) -> FusedCell:
        return FusedCell([(j, 2 + i) for i in range(self._steps) for j in range(2 + i)], 2, self._multiplier)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_fused" not in state:  # pickled by fastnas 0.1
            self._fused = self._fuse()

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        weights: Tensor | Sequence[Tensor],
        edge_weights: Tensor | Sequence[Tensor] | None = None,
        path: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns the cell's output, (N, multiplier * C, H, W), or (N, multiplier * C, H / 2, W / 2) of a reduction.

        Args:
            s0: output of the cell before the previous one.
            s1: output of the previous cell.
            weights: (E, O), or E rows of O.
            edge_weights: E factors of the edges' outputs (PC-DARTS' edge normalisation); all 1 where None.
            path: E indices of candidates: of each edge only that one is computed, times its weight.

        Raises:
            TypeError, ValueError: where the path does not fit the edges.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        return self._fused.run(self._ops, states, weights, edge_weights, path)
