"""Dropout of skip connections in training (P-DARTS, arXiv:1904.12760, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from fastnas.nn.operations import FactorizedReduce, Identity

if TYPE_CHECKING:
    from fastnas.nn.nasbench201 import NASBench201Supernet
    from fastnas.nn.supernet import Supernet


class SkipDropout(Identity):
    """The input itself, through dropout in training.

    Args:
        p: probability with which a number is zeroed; the others are divided by 1 - p. May be set at any time.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``dropout(x)``."""
        return functional.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Returns p."""
        return f"p={self.p}"


class ReduceDropout(FactorizedReduce):
    """A FactorizedReduce whose output goes through dropout in training; ``p`` is that of :class:`SkipDropout`."""

    p: float

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / 2, W / 2) from (N, C_in, H, W)."""
        return functional.dropout(super().forward(x), self.p, self.training)

    def extra_repr(self) -> str:
        """Returns p."""
        return f"p={self.p}"


def set_skip_dropout(supernet: Supernet | NASBench201Supernet, p: float) -> None:
    """Puts dropout onto the ``skip_connect`` candidates of all edges, in place; with p = 0 takes it away.

    Parameters and their names stay. In training, cells with dropout on edges between their nodes run edge by edge.

    Args:
        supernet: of which the candidates are.
        p: probability with which a number is zeroed.

    Raises:
        ValueError: where p is not from 0 to below 1.
    """
    if not 0 <= p < 1:
        raise ValueError(
            f"p={p} must be from 0 to below 1: with that probability a skip connection's numbers are zeroed"
        )
    for _, _, edge in supernet.mixed_ops():
        for i, op in enumerate(edge._ops):
            if type(op) in (Identity, SkipDropout):
                if p == 0:
                    edge._ops[i] = Identity().train(op.training)
                elif isinstance(op, SkipDropout):
                    op.p = p
                else:
                    edge._ops[i] = SkipDropout(p).train(op.training)
            elif type(op) in (FactorizedReduce, ReduceDropout):
                # another class, not another module: its parameters, and whoever holds them, stay
                op.__class__ = ReduceDropout if p else FactorizedReduce
                op.__dict__["p"] = p
