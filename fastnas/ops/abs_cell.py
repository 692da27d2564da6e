"""abs_cell: a cell as a linear map of its input, every weight by its absolute value, as one autograd node.

SynFlow (arXiv:2006.05467, Eq. 6) scores a parameter by θ ∂R/∂θ, where R = 1ᵀ Π_l |θ_l| 1 is what a network of absolute
weights makes of an input of ones; taken for the weights α of candidate operations, it selects them. Batch norm is left
out and ReLU does nothing to values that are not negative, so the sum of an edge's candidates is one convolution: theirs
are added up before anything is convolved, and ∂R/∂α_o is an inner product with the sum's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common

AbsOp = Literal["none", "skip", "conv_1x1", "conv_3x3", "avg_pool_3x3"]
ABS_OPS: tuple[AbsOp, ...] = ("none", "skip", "conv_1x1", "conv_3x3", "avg_pool_3x3")  # csrc/abs_cell.h
MAX_NODES, MAX_OPS = 8, 16  # csrc/abs_cell.h
_WIDTHS = {"conv_1x1": 1, "conv_3x3": 3}
_CODES = {op: code for code, op in enumerate(ABS_OPS)}
_NODES = {n * (n - 1) // 2: n for n in range(2, MAX_NODES + 1)}  # by edges
_PAD = 16  # csrc/abs_cell.h: elements at the end of a pixel of the states


def abs_cell_reference(x: Tensor, weights: Tensor, ops: Sequence[AbsOp], kernels: Sequence[Tensor]) -> Tensor:
    """Returns what :func:`abs_cell` does, in plain PyTorch: every candidate of every edge by itself."""
    magnitudes = torch.where(weights < 0, -weights, weights).to(x.dtype)  # whose derivative at 0 is 1
    rest = iter(kernels)
    nodes = [x]
    nothing = x.masked_fill(x.new_ones((), dtype=torch.bool), 0)
    edge = 0
    while edge < len(weights):
        total = nothing
        for state in nodes:
            for o, op in enumerate(ops):
                if op in _WIDTHS:
                    z = F.conv2d(state, next(rest).abs(), padding=_WIDTHS[op] // 2)
                elif op == "avg_pool_3x3":
                    z = F.avg_pool2d(state, 3, 1, 1, count_include_pad=False)
                else:
                    z = state if op == "skip" else nothing
                total = total + magnitudes[edge, o] * z
            edge += 1
        nodes.append(total)
    return nodes[-1]


class _AbsCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, namespace: Any, codes: list[int], x: Tensor, weights: Tensor, *kernels: Tensor) -> Tensor:
        y, states = namespace.abs_cell(x, weights, codes, kernels)
        ctx.namespace, ctx.codes = namespace, codes
        ctx.save_for_backward(states, weights, *kernels)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @_common.differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weights, *kernels = saved
        need_x, need_weights = ctx.needs_input_grad[2:4]
        need_kernels = any(ctx.needs_input_grad[4:])
        grad_x, grad_weights, grad_kernels = ctx.namespace._abs_cell_backward(
            grad.contiguous(memory_format=torch.channels_last),
            *(states, weights, ctx.codes, kernels, need_x, need_weights, need_kernels),
        )
        return (
            *(None, None, grad_x if need_x else None, grad_weights if need_weights else None),
            *(grad_kernels if need_kernels else (None,) * len(kernels)),
        )


def abs_cell(
    x: Tensor, weights: Tensor, ops: Sequence[AbsOp], kernels: Sequence[Tensor], *, backend: Backend | None = None
) -> Tensor:
    """Returns the last node of a densely connected cell of absolute weights; node 0 is ``x``.

    ``node_j = sum over i < j and o of |weights[e, o]| |ops[o]|(node_i)``, where e is the edge from i to j in the order
    (1, 0), (2, 0), (2, 1), ... and |op| is the candidate with its kernel's absolute values. Neither ``weights`` nor
    the kernels are written. The gradient of ``weights`` is sign(w) times that of |w|, where **sign(0) is +1**: a
    weight of zero has the derivative that it would have were it to grow. That of a kernel is sign(W) times that of
    |W|, and 0 where W is 0, as torch.abs has it.

    The op is linear in ``x`` and takes it as it is. All terms are positive where ``x`` is, so nothing cancels: in
    float32 the result is that of float64 to about 1e-6. Products of many cells may leave float32's range all the
    same: rescale between them. Infinity or NaN in ``x`` reaches every channel of the pixels around.

    Args:
        x: shape (N, C, H, W), floating.
        weights: shape (E, O), E = n (n - 1) / 2 for n nodes (2 to 8), floating.
        ops: the O candidates of every edge (1 to 16): ``"none"``, ``"skip"``, ``"conv_1x1"``, ``"conv_3x3"`` (dense,
            C to C channels, zero padding, no bias) or ``"avg_pool_3x3"`` (stride 1, padding not counted), in any number
            and order.
        kernels: the convolutions' weights, (C, C, k, k), edge after edge and in the candidates' order; x's dtype.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Returns:
        shape (N, C, H, W); in channels_last memory where a native backend runs.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check(x, weights, ops, kernels)
    namespace = _library.namespace(backend, x)
    if namespace is None or x.numel() == 0:
        return abs_cell_reference(x, weights, ops, kernels)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu" and namespace is torch.ops.fastnas:
        x = x.float()  # the CPU kernels take float32 and float64
    y: Tensor = _AbsCell.apply(  # type: ignore[no-untyped-call]
        *(namespace, [_CODES[op] for op in ops], x.contiguous(memory_format=torch.channels_last)),
        weights.to(_common.compute_dtype(x)).contiguous(),
        *(w.to(x.dtype).contiguous() for w in kernels),
    )
    return y.to(dtype)


def _check(x: Tensor, weights: Tensor, ops: Sequence[str], kernels: Sequence[Tensor]) -> None:
    _common.check_tensors("x", [x])
    if x.dim() != 4:
        raise ValueError(f"x has {x.dim()} dimensions: expected (N, C, H, W)")
    if isinstance(ops, str) or not 1 <= len(ops) <= MAX_OPS:
        raise ValueError(f"ops is {ops!r}: expected a sequence of 1 to {MAX_OPS} of {', '.join(ABS_OPS)}")
    for o, op in enumerate(ops):
        if op not in _CODES:
            raise ValueError(f"ops[{o}] is {op!r}: expected one of {', '.join(ABS_OPS)}")
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}: expected a tensor of shape (edges, {len(ops)})")
    if not weights.is_floating_point():
        raise TypeError(f"weights has dtype {weights.dtype}: expected a floating dtype")
    if weights.dim() != 2 or weights.shape[1] != len(ops) or weights.shape[0] not in _NODES:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}: expected (edges, {len(ops)}), one column a candidate, and "
            f"n (n - 1) / 2 edges for n nodes: {', '.join(map(str, _NODES))}"
        )
    if weights.device != x.device:
        raise ValueError(f"weights is on {weights.device} but x is on {x.device}: move one of them")
    if _library.debugging() and bool(torch.isnan(weights).any()):
        raise ValueError(f"weights holds NaN: {weights.detach().tolist()}")
    widths = [_WIDTHS[op] for op in ops if op in _WIDTHS] * weights.shape[0]
    if isinstance(kernels, Tensor) or len(kernels) != len(widths):
        raise ValueError(
            f"kernels has {len(kernels)} tensors: expected {len(widths)}, one for each convolution of each edge"
        )
    C = x.shape[1]
    for k, (w, width) in enumerate(zip(kernels, widths, strict=True)):
        if not isinstance(w, Tensor):
            raise TypeError(f"kernels[{k}] is a {type(w).__name__}: expected a tensor")
        if w.shape != (C, C, width, width):
            raise ValueError(f"kernels[{k}] has shape {tuple(w.shape)}: expected ({C}, {C}, {width}, {width})")
        if w.device != x.device:
            raise ValueError(f"kernels[{k}] is on {w.device} but x is on {x.device}: move one of them")
        if w.dtype != x.dtype:
            raise ValueError(f"kernels[{k}] has dtype {w.dtype} but x has {x.dtype}: they must agree")


def _fake(x: Tensor, weights: Tensor, ops: list[int], kernels: list[Tensor]) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    nodes = _NODES[int(weights.shape[0])]
    y = torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty((n, h + 2, w + 2, nodes * c + _PAD))


def _fake_backward(
    grad: Tensor,
    states: Tensor,
    weights: Tensor,
    ops: list[int],
    kernels: list[Tensor],
    need_x: bool,
    need_weights: bool,
    need_kernels: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        torch.empty_like(grad, memory_format=torch.channels_last) if need_x else grad.new_empty(0),
        torch.empty_like(weights) if need_weights else weights.new_empty(0),
        [torch.empty_like(w) for w in kernels] if need_kernels else [],
    )


_common.register_fakes({"abs_cell": _fake, "_abs_cell_backward": _fake_backward})
