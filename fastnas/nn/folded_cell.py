"""A derived cell in evaluation: one op, as long as the cell is what that op knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas import _library
from fastnas.nn.batch_norm import folded_statistics, hooks_of
from fastnas.nn.mixed_op import describe, facts
from fastnas.ops.mixed_cell import CellEdge, evaluate_cell, fits
from fastnas.ops.mixed_op import Candidate

_DENSE = Candidate("conv", kernel=3, stages=1)


@dataclass(frozen=True)
class _Call:
    """How the op is told of a cell's operations."""

    edges: list[CellEdge]
    convs: list[nn.Conv2d]
    norms: list[nn.BatchNorm2d]
    heads: list[tuple[int, int, Callable[[Tensor], Tensor]]]  # input, stride and what is called, of each map


@dataclass(frozen=True)
class _Known:
    """What was found of a cell's operations, and what it was found of."""

    ops: list[nn.Module]
    inside: list[nn.Module]
    facts: list[tuple[object, ...]]
    hooks: list[dict[int, Callable[..., object]]]
    hooked: list[bool]
    call: _Call | None

    def holds(self, ops: Sequence[nn.Module]) -> bool:
        return (
            len(ops) == len(self.ops)
            and all(a is b for a, b in zip(ops, self.ops, strict=True))
            and list(map(bool, self.hooks)) == self.hooked
            and list(map(facts, self.inside)) == self.facts
        )


class FoldedCell:
    """Runs the operations of a cell, one an edge with affine batch norms, without a graph.

    A stage's norm in evaluation is ``(z - mean) * scale`` for some mean and scale, which is what the op applies to
    what it reads. They are computed anew in each call, from tensors of C values, so nothing can be out of date.

    Args:
        edges: (state that it leaves, state that it leads to, stride) of each; the inputs are states 0, 1, ...
        inputs: how many.
        concat: the states that are concatenated to the output.
    """

    def __init__(self, edges: Sequence[tuple[int, int, int]], inputs: int, concat: Sequence[int]) -> None:
        self._edges = edges
        self._inputs = inputs
        self._concat = concat
        self._order = sorted(range(len(edges)), key=edges.__getitem__)
        self._known: _Known | None = None  # written at once, for threads
        last = max((node for _, node, _ in edges), default=0)
        nodes = range(inputs, last + 1)
        left, led = {source for source, _, _ in edges}, {node for _, node, _ in edges}
        self._wired = (
            len(nodes) >= len(concat) > 0
            and list(concat) == list(nodes[-len(concat) :])
            and led == set(nodes)
            and left | set(concat) >= set(nodes)
            and all(stride == 1 for source, _, stride in edges if source >= inputs)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> FoldedCell:
        return FoldedCell(self._edges, self._inputs, self._concat)  # the copy's modules are others

    def __reduce__(self) -> tuple[type[FoldedCell], tuple[object, ...]]:
        return FoldedCell, (self._edges, self._inputs, self._concat)

    def run(self, ops: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor | None:
        """Returns the cell's output; None where its modules have to be called instead.

        Args:
            ops: the edges' operations.
            inputs: the first states, (N, C, H, W).
        """
        x = inputs[0]
        if (
            not self._wired
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or x.device.type != "cpu"
            or 2 * len(x) < torch.get_num_threads()  # an image is one thread's: half may be idle
            or x.dtype not in (torch.float32, torch.float64)
            or torch.is_autocast_enabled("cpu")
            or any(i.dim() != 4 or i.numel() == 0 or i.dtype != x.dtype for i in inputs)
            or _library.namespace(None, x) is None
        ):
            return None
        call = self._current(ops)
        if call is None:
            return None
        params = [c.weight for c in call.convs]
        if any(p.dtype != x.dtype for p in params) or any(n.num_features != x.shape[1] for n in call.norms):
            return None
        maps = []
        for source, stride, head in call.heads:
            n, c, h, w = inputs[source].shape
            maps.append(head(inputs[source]))
            if maps[-1].shape != (n, c, -(-h // stride), -(-w // stride)) or maps[-1].dtype != x.dtype:
                return None
        return evaluate_cell(inputs, call.edges, params, maps, len(self._concat), folded_statistics(call.norms, x))

    def _current(self, ops: Sequence[nn.Module]) -> _Call | None:
        known = self._known
        if known is None or not known.holds(ops):
            inside = [m for op in ops for m in op.modules()]
            hooks = [hooks for m in inside for hooks in hooks_of(m)]
            hooked = list(map(bool, hooks))
            call = None if any(hooked) else self._describe(ops)
            self._known = known = _Known(list(ops), inside, list(map(facts, inside)), hooks, hooked, call)
        return known.call

    def _describe(self, ops: Sequence[nn.Module]) -> _Call | None:
        if any(op.training for op in ops):
            return None
        entries = [(self._edges[i], i, describe(ops[i], self._edges[i][2], False, True)) for i in self._order]
        if 2 * sum(entry.candidate == _DENSE for *_, entry in entries) > len(entries):
            return None  # torch's own are faster than what is saved around them
        edges = [CellEdge(*edge, i, (entry.candidate,)) for edge, i, entry in entries]
        if not fits(edges) or any(entry.head is not None and edge[0] >= self._inputs for edge, _, entry in entries):
            return None
        return _Call(
            edges,
            [c for *_, entry in entries for c in entry.convs],
            [n for *_, entry in entries for n in entry.norms],
            [(edge[0], edge[2], entry.head) for edge, _, entry in entries if entry.head is not None],
        )
