"""The step from one stage of a progressive search to the next (DrNAS, arXiv:2006.10355, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.widen import Replaced


class _Supernet(Protocol):
    def mixed_ops(self) -> Iterator[tuple[str, int, MixedOp]]: ...


def reshape(
    supernet: _Supernet, kept: Mapping[str, Tensor], k: int, generator: torch.Generator | None = None
) -> list[Replaced]:
    """Prunes the candidates of every edge and sends more channels through those that are left, in place.

    Args:
        supernet: its :class:`~fastnas.nn.MixedOp` modules are changed.
        kept: the operations that edges keep, (E, n) indices for each cell type; all where it is empty.
        k: partial channels from now on; as now, or smaller.
        generator: source of the channels that are copied (Eq. 7).

    Returns:
        The parameters that others took the place of, for their optimizer.
    """
    replaced: list[Replaced] = []
    lists = {name: table.tolist() for name, table in kept.items()}
    for cell_type, edge, op in supernet.mixed_ops():
        if lists:
            op.keep(lists[cell_type][edge])
        if k < op.k:
            op.wider(k, generator, replaced)
    return replaced
