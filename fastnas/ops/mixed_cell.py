"""mixed_cell: a whole cell of mixed edges as one autograd node.

``state_n = sum over edges (s, n) of sum_o weights[edge, o] * candidate_o(state_s)`` (DARTS, arXiv:1806.09055, Eq. 1
and 2), and the last states concatenated. The candidates of all edges that leave a state run together, so that its ReLU,
its pools and their statistics are computed once; sums grow in place inside the cell's output; the gradient of a state
is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common
from fastnas.ops.mixed_op import (
    MAX_EDGES,
    MAX_STAGES,
    MAX_TERMS,
    Candidate,
    MixedOpResult,
    check_norms,
    mean_and_invstd,
    mixed_op_reference,
)
from fastnas.ops.partial_channels import check_split, partial_channels_reference, partial_channels_split_reference


class CellEdge(NamedTuple):
    """An edge of a cell: the inputs are states 0, 1, ...; the nodes follow."""

    source: int  # the state that it leaves
    node: int  # the state that it leads to
    stride: int  # 2 only from an input
    row: int  # of the weights; no two edges have the same
    candidates: tuple[Candidate, ...]


def mixed_cell_reference(
    inputs: Sequence[Tensor],
    weights: Tensor,
    edges: Sequence[CellEdge],
    params: Sequence[Tensor],
    maps: Sequence[Tensor],
    concat: int,
    eps: Sequence[float],
    statistics: tuple[Tensor, Tensor] | None,
    k: int = 1,
    edge_weights: Tensor | None = None,
) -> MixedOpResult:
    """Returns what :func:`mixed_cell` does, in plain PyTorch."""
    states = dict(enumerate(inputs))
    c = inputs[0].shape[1] // k
    means: list[Tensor] = []
    variances: list[Tensor] = []
    param = mapped = norm = 0
    for e in edges:
        norms = sum(o.norms for o in e.candidates)
        count = sum(len(o.shapes(c)) for o in e.candidates)
        outside = sum(o.kind == "map" for o in e.candidates)
        given = None if statistics is None else (statistics[0][norm : norm + norms], statistics[1][norm : norm + norms])
        x = states[e.source]
        result = mixed_op_reference(
            *(partial_channels_split_reference(x, k), weights[e.row], e.candidates, params[param : param + count]),
            *(maps[mapped : mapped + outside], e.stride, eps[norm : norm + norms], given),
        )
        param, mapped, norm = param + count, mapped + outside, norm + norms
        y = partial_channels_reference(result.y, x, k, e.stride)
        if edge_weights is not None:
            y = edge_weights[e.row].to(y.dtype) * y
        states[e.node] = states[e.node] + y if e.node in states else y
        if result.mean is not None and result.variance is not None:
            means.append(result.mean)
            variances.append(result.variance)
    y = torch.cat([states[n] for n in sorted(states)[-concat:]], 1)
    if statistics is not None:
        return MixedOpResult(y, None, None)
    return MixedOpResult(y, torch.cat(means), torch.cat(variances))


class _MixedCell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        plan: list[int],
        edges: list[int],
        concat: int,
        k: int,
        eps: list[float],
        statistics: tuple[Tensor, Tensor] | None,
        counts: tuple[int, int],
        weights: Tensor,
        edge_weights: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_inputs, n_params = counts
        inputs, params, maps = tensors[:n_inputs], tensors[n_inputs:][:n_params], tensors[n_inputs + n_params :]
        given = statistics if statistics is not None else (None, None)
        y, states, outs, mean, invstd, variance = ops.mixed_cell(
            inputs, weights, edge_weights, params, maps, plan, edges, concat, k, eps, *given
        )
        ctx.call = (ops, plan, edges, concat, k, statistics is None, counts)
        ctx.save_for_backward(y, states, outs, *(statistics or (mean, invstd)), weights, edge_weights, *tensors)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @_common.differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        ops, plan, edges, concat, k, training, (n_inputs, n_params) = ctx.call
        y, states, outs, mean, invstd, weights, edge_weights, *tensors = saved
        inputs, params, maps = tensors[:n_inputs], tensors[n_inputs:][:n_params], tensors[n_inputs + n_params :]
        need_weights, need_edge_weights, *need = ctx.needs_input_grad[8:]
        need_inputs = need[:n_inputs]
        need_params, need_maps = any(need[n_inputs:][:n_params]), any(need[n_inputs + n_params :])
        y, *inputs = (t.contiguous(memory_format=torch.channels_last) for t in (y, *inputs))  # hooks may have unpacked
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]  # them in another layout
        grad_inputs, grad_weights, grad_edge_weights, grad_params, grad_maps = ops._mixed_cell_backward(
            *(grad.contiguous(memory_format=torch.channels_last), inputs, y, states, weights, edge_weights, params),
            *(maps, outs, mean, invstd, plan, edges, concat, k, training),
            *([int(n) for n in need_inputs], need_edge_weights, need_params, need_maps),
        )
        return (
            *(None,) * 8,
            grad_weights if need_weights else None,
            grad_edge_weights if need_edge_weights else None,
            *(g if n else None for g, n in zip(grad_inputs, need_inputs, strict=True)),
            *(grad_params if need_params else (None,) * n_params),
            *(grad_maps if need_maps else (None,) * len(maps)),
        )


def mixed_cell(
    inputs: Sequence[Tensor],
    weights: Tensor,
    edges: Sequence[CellEdge],
    params: Sequence[Tensor] = (),
    maps: Sequence[Tensor] = (),
    *,
    concat: int,
    eps: Sequence[float] | float = 1e-5,
    statistics: tuple[Tensor, Tensor] | None = None,
    k: int = 1,
    edge_weights: Tensor | None = None,
    backend: Backend | None = None,
) -> MixedOpResult:
    """Returns the last ``concat`` states of a cell, concatenated, and the batch statistics of its batch norms.

    ``params``, ``maps`` and the batch norms are those of the edges in order, each edge's as
    :func:`fastnas.ops.mixed_op.mixed_op` lists them. With k > 1 every edge sends the first C/k channels through its
    candidates, as :mod:`fastnas.ops.partial_channels` does (PC-DARTS, arXiv:1907.05737). Cells in which too much leaves
    one state (more than 8 edges, 40 candidates or 32 convolutional stages), or with k > 1 more than 8 edges lead to
    one, run on the reference.

    Args:
        inputs: states 0, 1, ...: shape (N, C, H, W) each; those that edges of stride 2 leave are twice as large.
        weights: (rows, candidates), any floating dtype; edges have equally many candidates.
        edges: sorted by source; each node has edges in, and has edges out unless it is concatenated. All edges that
            leave one state have one stride.
        params: parameters of the convolutional candidates, which have C/k channels.
        maps: tensors of the candidates of kind ``map``, from before their batch norm where they have one; C/k channels.
        concat: how many of the last nodes are concatenated to the result, (N, concat * C, OH, OW).
        eps: of the batch norms: one for all, or one each.
        statistics: mean and biased variance to normalise with instead of the batch's, each (norms, C/k).
        k: one channel in k goes to the candidates; with stride 2 and k > 1 heights and widths must be even.
        edge_weights: (rows,), any floating dtype: factors of the edges' outputs; all 1 where None.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    out = _check(inputs, weights, edges, params, maps, concat, k, edge_weights)
    norms = sum(o.norms for e in edges for o in e.candidates)
    eps = check_norms(norms, eps, statistics, out)
    x = inputs[0]
    ops = _library.namespace(backend, x)
    if ops is None or any(i.numel() == 0 for i in inputs) or not fits(edges, k):
        return mixed_cell_reference(inputs, weights, edges, params, maps, concat, eps, statistics, k, edge_weights)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu" and ops is torch.ops.fastnas:
        inputs = [i.float() for i in inputs]  # the CPU kernels take float32 and float64
    native = inputs[0].dtype
    compute = _common.compute_dtype(inputs[0])
    if statistics is not None:
        statistics = mean_and_invstd(statistics, eps, compute)
    weights = weights.to(compute)
    if edge_weights is not None:
        edge_weights = edge_weights.to(compute).contiguous()
        weights = weights * edge_weights[:, None]
    y, mean, variance = _MixedCell.apply(  # type: ignore[no-untyped-call]
        *(ops, [v for e in edges for o in e.candidates for v in o.row], [v for e in edges for v in e[:4]], concat),
        *(k, eps, statistics, (len(inputs), len(params)), weights.contiguous(), edge_weights if k > 1 else None),
        *(i.contiguous(memory_format=torch.channels_last) for i in inputs),
        *((p if p.dtype == native else p.to(native)).contiguous() for p in params),
        *(m.to(native).contiguous(memory_format=torch.channels_last) for m in maps),
    )
    y = y.to(dtype)
    return MixedOpResult(y, None, None) if statistics is not None else MixedOpResult(y, mean, variance)


def evaluate_cell(
    inputs: Sequence[Tensor],
    edges: Sequence[CellEdge],
    params: Sequence[Tensor],
    maps: Sequence[Tensor],
    concat: int,
    statistics: tuple[Tensor, Tensor],
) -> Tensor:
    """Returns what :func:`mixed_cell` does natively with every weight 1, without its checks and without a graph.

    Args:
        inputs: as those of :func:`mixed_cell`, as the next four.
        edges: of one candidate each.
        params: likewise.
        maps: likewise.
        concat: likewise.
        statistics: (m, s), each (norms, C), of what the inputs are computed in: batch norms give ``(z - m) * s``.
    """
    ops = _library.namespace(None, inputs[0])
    assert ops is not None
    mean, scale = statistics
    y: Tensor = ops.mixed_cell(
        [i.contiguous(memory_format=torch.channels_last) for i in inputs],
        torch.ones((len(edges), 1), dtype=mean.dtype, device=mean.device),
        None,
        [p.contiguous() for p in params],
        [m.contiguous(memory_format=torch.channels_last) for m in maps],
        [v for e in edges for o in e.candidates for v in o.row],
        [v for e in edges for v in e[:4]],
        *(concat, 1, [1.0] * len(mean), mean, scale),
    )[0]
    return y


def fits(edges: Sequence[CellEdge], k: int = 1) -> bool:
    """Tells whether the native ops can take what leaves each state, and with k > 1 what leads to each node."""
    nodes = [e.node for e in edges]
    if k > 1 and max(map(nodes.count, nodes)) > MAX_EDGES:
        return False
    for source in {e.source for e in edges}:
        fan = [e for e in edges if e.source == source]
        candidates = [o for e in fan for o in e.candidates]
        if len(fan) > MAX_EDGES or len(candidates) > MAX_TERMS or sum(o.stages for o in candidates) > MAX_STAGES:
            return False
    return True


def _check(
    inputs: Sequence[Tensor],
    weights: Tensor,
    edges: Sequence[CellEdge],
    params: Sequence[Tensor],
    maps: Sequence[Tensor],
    concat: int,
    k: int,
    edge_weights: Tensor | None,
) -> tuple[int, int, int, int]:
    if isinstance(inputs, Tensor) or not inputs or not edges:
        raise ValueError("inputs must be a sequence of tensors and edges one of CellEdge, neither empty")
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}: expected a tensor of shape (rows, candidates)")
    x = inputs[0]
    for i, t in enumerate(inputs):
        _common.check_tensors(f"inputs[{i}]", [t])
        if t.dim() != 4 or t.shape[:2] != x.shape[:2] or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"inputs[{i}] has shape {tuple(t.shape)}, {t.dtype} on {t.device}: expected (N, C, H, W) with N, C, "
                f"dtype and device of inputs[0], {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
    check_split(x, k, 1)
    if [e.source for e in edges] != sorted(e.source for e in edges):
        raise ValueError("edges must be sorted by source")
    sizes: dict[int, tuple[int, int]] = {i: (t.shape[2], t.shape[3]) for i, t in enumerate(inputs)}
    strides: dict[int, int] = {}
    for i, e in enumerate(edges):
        if not 0 <= e.source < e.node or e.node < len(inputs):
            raise ValueError(
                f"edges[{i}] leads from state {e.source} to {e.node}: expected an earlier state and a node"
            )
        if e.stride not in (1, 2) or (e.stride == 2 and e.source >= len(inputs)):
            raise ValueError(f"edges[{i}] has stride {e.stride}: expected 1, or 2 from an input")
        if strides.setdefault(e.source, e.stride) != e.stride:
            raise ValueError(f"edges[{i}] has stride {e.stride}: the edges that leave a state must have one stride")
        if e.stride == 2 and any(o.kind == "skip" for o in e.candidates):
            raise ValueError(f"edges[{i}]: a skip candidate returns its input, which stride 2 does not allow")
        if e.source not in sizes:
            raise ValueError(f"state {e.source} has no edge in")
        h, w = sizes[e.source]
        if k > 1 and e.stride == 2 and (h % 2 or w % 2):
            raise ValueError(f"inputs[{e.source}] is {h}x{w}: with k > 1 and stride 2 height and width must be even")
        size = (-(-h // e.stride), -(-w // e.stride))
        if sizes.setdefault(e.node, size) != size or size != sizes[edges[0].node]:
            raise ValueError(f"edges[{i}] gives maps of {size}: expected {sizes[edges[0].node]}, as all nodes have")
        if len(e.candidates) != len(edges[0].candidates):
            raise ValueError(f"edges[{i}] has {len(e.candidates)} candidates, edges[0] {len(edges[0].candidates)}")
    nodes = max(e.node for e in edges) + 1 - len(inputs)
    if not 1 <= concat <= nodes:
        raise ValueError(f"concat={concat}: expected 1 to {nodes}, the number of nodes")
    for n in range(len(inputs), len(inputs) + nodes):
        if n not in sizes or (n < len(inputs) + nodes - concat and n not in strides):
            raise ValueError(f"state {n} has no edge in, or none out")
    rows = max(e.row for e in edges) + 1
    if min(e.row for e in edges) < 0 or len({e.row for e in edges}) < len(edges):
        raise ValueError("edges must have different rows of weights, counted from 0")
    if weights.dim() != 2 or weights.shape[0] < rows or weights.shape[1] != len(edges[0].candidates):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}: expected at least {rows} rows of {len(edges[0].candidates)}"
        )
    _common.check_weights(weights.flatten(), weights.numel(), x)
    if edge_weights is not None:
        _check_edge_weights(edge_weights, weights)
    n, c = x.shape[0], x.shape[1] // k
    out = (n, c, *sizes[edges[0].node])
    every = [o for e in edges for o in e.candidates]
    for name, tensors, expected in (
        ("params", params, [s for o in every for s in o.shapes(c)]),
        ("maps", maps, [out] * sum(o.kind == "map" for o in every)),
    ):
        if not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"{name} must hold tensors, got {sorted({type(t).__name__ for t in tensors})}")
        if [tuple(t.shape) for t in tensors] != expected:
            raise ValueError(f"{name} has shapes {[tuple(t.shape) for t in tensors]}: expected {expected}")
        if any(t.device != x.device or t.dtype != x.dtype for t in tensors):
            raise ValueError(f"{name} must have the dtype and device of inputs, {x.dtype} on {x.device}")
    return out


def _check_edge_weights(edge_weights: Tensor, weights: Tensor) -> None:
    if not isinstance(edge_weights, Tensor) or not edge_weights.is_floating_point():
        what = edge_weights.dtype if isinstance(edge_weights, Tensor) else type(edge_weights).__name__
        raise TypeError(f"edge_weights is {what}: expected a floating tensor")
    if edge_weights.shape != weights.shape[:1] or edge_weights.device != weights.device:
        raise ValueError(
            f"edge_weights has shape {tuple(edge_weights.shape)} on {edge_weights.device}: expected one entry for each "
            f"of the {len(weights)} rows of weights, on {weights.device}"
        )


def _geometry(inputs: list[Tensor], edges: list[int], concat: int) -> tuple[int, int, int, int, int]:
    """N, C, OH, OW and the number of nodes that are not concatenated."""
    n, c = inputs[0].shape[:2]
    h, w = inputs[edges[0]].shape[2:]
    stride = edges[2]
    return n, c, (h - 1) // stride + 1, (w - 1) // stride + 1, max(edges[1::4]) + 1 - len(inputs) - concat


def _fake(
    inputs: list[Tensor],
    weights: Tensor,
    edge_weights: Tensor | None,
    params: list[Tensor],
    maps: list[Tensor],
    plan: list[int],
    edges: list[int],
    concat: int,
    k: int,
    eps: list[float],
    mean: Tensor | None,
    invstd: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = inputs[0]
    n, c, oh, ow, kept = _geometry(inputs, edges, concat)
    y = torch.empty((n, concat * c, oh, ow), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    rows = len(eps) if mean is None else 0
    new_mean, new_invstd, variance = (x.new_empty((rows, c // k), dtype=_common.compute_dtype(x)) for _ in range(3))
    states, outs = x.new_empty((kept, n, oh, ow, c)), x.new_empty((sum(plan[4::5]), n, oh, ow, c // k))
    return y, states, outs, new_mean, new_invstd, variance


def _fake_backward(
    grad: Tensor,
    inputs: list[Tensor],
    y: Tensor,
    states: Tensor,
    weights: Tensor,
    edge_weights: Tensor | None,
    params: list[Tensor],
    maps: list[Tensor],
    outs: Tensor,
    mean: Tensor,
    invstd: Tensor,
    plan: list[int],
    edges: list[int],
    concat: int,
    k: int,
    training: bool,
    need_inputs: list[int],
    need_edge_weights: bool,
    need_params: bool,
    need_maps: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    return (
        [torch.empty_like(i) if need else i.new_empty(0) for i, need in zip(inputs, need_inputs, strict=True)],
        torch.empty_like(weights),
        weights.new_empty(len(weights) if need_edge_weights and edge_weights is not None else 0),
        [torch.empty_like(p) for p in params] if need_params else [],
        [torch.empty_like(m) for m in maps] if need_maps else [],
    )


_common.register_fakes({"mixed_cell": _fake, "_mixed_cell_backward": _fake_backward})
