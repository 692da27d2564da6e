"""The edges of a cell: one op, as long as they are what that op knows, and one by one otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastnas import _library
from fastnas.nn._common import check_choice
from fastnas.nn.batch_norm import given_statistics, special, update_tracked
from fastnas.nn.mixed_op import MixedOp, Plan, as_table
from fastnas.ops.mixed_cell import CellEdge, fits, mixed_cell
from fastnas.ops.partial_channels import partial_channels_split

_Known: TypeAlias = tuple[list[Plan], list[CellEdge] | None, int]


class FusedCell:
    """Runs a cell's edges: as :func:`fastnas.ops.mixed_cell.mixed_cell` where they are what that knows.

    Args:
        wiring: (state that it leaves, state that it leads to) of each edge; the inputs are states 0, 1, ...
        inputs: how many.
        concat: how many of the last nodes are concatenated to the cell's output.
    """

    def __init__(self, wiring: Sequence[tuple[int, int]], inputs: int, concat: int) -> None:
        self._wiring = wiring
        self._inputs = inputs
        self._concat = concat
        self._order = sorted(range(len(wiring)), key=wiring.__getitem__)
        self._known: _Known = ([], None, 1)  # in this order; written at once, for threads

    def __deepcopy__(self, memo: dict[int, object]) -> FusedCell:
        return FusedCell(self._wiring, self._inputs, self._concat)  # the copy's modules are others

    def __reduce__(self) -> tuple[type[FusedCell], tuple[object, ...]]:
        return FusedCell, (self._wiring, self._inputs, self._concat)

    def run(
        self,
        ops: nn.ModuleList,
        inputs: Sequence[Tensor],
        weights: Tensor | Sequence[Tensor],
        edge_weights: Tensor | Sequence[Tensor] | None = None,
        path: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns the cell's output.

        Args:
            ops: the edges, as in the wiring.
            inputs: the first states, (N, C, H, W).
            weights: (E, O), or E rows of O.
            edge_weights: E factors of the edges' outputs; all 1 where None.
            path: the only candidate that is computed of each edge; all where None.

        Raises:
            TypeError, ValueError: where the inputs have other channels than the edges, or the path other candidates.
        """
        if path is not None:
            if len(path) != len(ops):
                raise ValueError(f"path has {len(path)} entries: expected one for each of {len(ops)} edges")
            for i, (choice, op) in enumerate(zip(path, ops, strict=True)):
                check_choice(f"path[{i}]", choice, len(op._ops))  # type: ignore[arg-type]
        x = inputs[0]
        weights = as_table(weights, x.device)[: len(ops)]
        if edge_weights is not None:
            edge_weights = as_table(edge_weights, x.device)[: len(ops)]
        plans, edges, k = self._current(ops, path)
        unknown = edges is None or any(i.dim() != 4 or i.numel() == 0 for i in inputs)
        if unknown or _library.namespace(None, x) is None:
            return self._run_apart(ops, inputs, weights, edge_weights, path)
        assert edges is not None
        params: list[Tensor] = [c.weight for plan in plans for c in plan.convs]
        norms = [n for plan in plans for n in plan.norms]
        wrong = [n.num_features * k for n in norms if n.num_features * k != x.shape[1]]
        if wrong:
            raise ValueError(f"x has {x.shape[1]} channels: expected {wrong[0]}, as the candidates were made for")
        heads = {e.source for e, plan in zip(edges, plans, strict=True) if plan.heads}
        active = {s: partial_channels_split(inputs[s], k)[0] if k > 1 else inputs[s] for s in heads}
        maps = [h(active[e.source]) for e, plan in zip(edges, plans, strict=True) for h in plan.heads]
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            inputs, params, maps = ([t.to(dtype) for t in ts] for ts in (inputs, params, maps))
        result = mixed_cell(
            inputs,
            weights,
            edges,
            params,
            maps,
            concat=self._concat,
            eps=[n.eps for n in norms],
            statistics=None if plans[0].training or not norms else given_statistics(norms),
            k=k,
            edge_weights=edge_weights,
        )
        update_tracked(norms, result)
        return result.y

    def _run_apart(
        self,
        ops: nn.ModuleList,
        inputs: Sequence[Tensor],
        weights: Tensor,
        edge_weights: Tensor | None,
        path: Sequence[int] | None,
    ) -> Tensor:
        """The same one edge after the other."""
        states = dict(enumerate(inputs))
        for i, (source, node) in enumerate(self._wiring):
            choice = () if path is None else (path[i],)  # edges of other classes need not know of choices
            y = ops[i](states[source], weights[i], *choice)
            if edge_weights is not None:
                y = edge_weights[i] * y
            states[node] = states[node] + y if node in states else y
        ends = [states[n] for n in sorted(states)[-self._concat :]]
        return torch.cat(ends, dim=1) if len(ends) > 1 else ends[0]

    def _current(self, ops: nn.ModuleList, path: Sequence[int] | None) -> _Known:
        """Returns what the edges are now, in the op's order, how the op is told (None where it cannot be), and k."""
        modules: list[MixedOp] = []
        for i in self._order:
            edge = ops[i]
            if type(edge) is not MixedOp or special(edge):
                return [], None, 1
            modules.append(edge)
        if path is None:
            plans = [e.described() for e in modules]
        else:
            plans = [e.described(path[i]) for i, e in zip(self._order, modules, strict=True)]
        known = self._known
        if len(plans) == len(known[0]) and all(a is b for a, b in zip(plans, known[0], strict=True)):
            return known
        k = modules[0].k
        edges = [
            CellEdge(*self._wiring[i], plan.stride, i, plan.candidates)
            for i, plan in zip(self._order, plans, strict=True)
        ]
        strides = {(e.source, e.stride) for e in edges}
        inner = [(e, p) for e, p in zip(edges, plans, strict=True) if e.source >= self._inputs]
        fused = (
            len({p.training for p in plans}) == len({len(p.candidates) for p in plans}) == 1
            and len(strides) == len({source for source, _ in strides})
            and all(e.stride == 1 and not p.heads for e, p in inner)
            and all(p.known for p in plans)
            and all(m.k == k for m in modules)
            and fits(edges, k)
        )
        self._known = (plans, edges if fused else None, k)
        return self._known
