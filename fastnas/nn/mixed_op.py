"""MixedOp: the weighted sum over an edge's candidate operations (DARTS, arXiv:1806.09055, Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnas.nn.operations import OPS, PRIMITIVES


class MixedOp(nn.Module):
    """Temporary eager form; the native one has the same signature."""

    def __init__(
        self,
        C: int | Sequence[nn.Module],
        stride: int = 1,
        third: int | Sequence[str] | None = None,
        *,
        k: int | None = None,
        primitives: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(C, int)
        if isinstance(third, int):
            k = third
        elif third is not None:
            primitives = third
        self.k = k or 1
        self._ops = nn.ModuleList()
        for p in primitives or PRIMITIVES:
            op = OPS[p](C // self.k, stride, False)
            if "pool" in p:
                op = nn.Sequential(op, nn.BatchNorm2d(C // self.k, affine=False))
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns sum_o w_o * o(x), shape (N, C, H/stride, W/stride)."""
        return torch.stack([w * op(x) for w, op in zip(weights, self._ops, strict=True)]).sum(0)
