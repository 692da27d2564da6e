"""relu_pointwise: ReLU and 1x1 convolutions as one autograd node.

What DARTS' cells (arXiv:1806.09055) do to their inputs before batch norm: one convolution, or, where the input is to be
halved, two convolutions of stride 2 of which the second begins one pixel further down and right (FactorizedReduce).
relu(x) is never written: the forward and the backward take it on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common


def relu_pointwise_reference(x: Tensor, weights: Sequence[Tensor], stride: int = 1) -> Tensor:
    """Returns what :func:`relu_pointwise` does, in plain PyTorch."""
    x = F.relu(x)
    return torch.cat(
        [F.conv2d(x[:, :, g:, g:] if stride == 2 else x, w, None, stride) for g, w in enumerate(weights)], 1
    )


class _ReluPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Any, stride: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.ops, ctx.stride = ops, stride
        ctx.save_for_backward(x, *weights)
        return ops.relu_pointwise(x, weights, stride)  # type: ignore[no-any-return]

    @staticmethod
    @_common.differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = saved
        need_x, need_weights = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:])
        grad_x, grad_weights = ctx.ops._relu_pointwise_backward(
            grad.contiguous(memory_format=torch.channels_last), x, weights, ctx.stride, need_x, need_weights
        )
        return None, None, grad_x if need_x else None, *(grad_weights if need_weights else (None,) * len(weights))


def relu_pointwise(x: Tensor, weights: Sequence[Tensor], stride: int = 1, *, backend: Backend | None = None) -> Tensor:
    """Returns the concatenation over g of ``weights[g]`` applied to every pixel of relu(x).

    With stride 2, output pixel (i, j) of ``weights[g]`` reads input pixel (2 i + g, 2 j + g). The result is in
    channels_last memory where a native backend runs; ``x`` and the weights are all that is saved for the backward.

    Args:
        x: shape (N, C_in, H, W), floating.
        weights: each of shape (C_out_g, C_in, 1, 1); one or two of them where the stride is 2.
        stride: 1 or 2; with 2, H and W must be even.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Returns:
        shape (N, sum of C_out_g, H / stride, W / stride).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check(x, weights, stride)
    ops = _library.namespace(backend, x)
    if ops is None or x.numel() == 0:
        return relu_pointwise_reference(x, weights, stride)
    if stride == 1 and len(weights) > 1:
        weights = [torch.cat(list(weights))]
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu" and ops is torch.ops.fastnas:
        x = x.float()  # the CPU kernels take float32 and float64
    y: Tensor = _ReluPointwise.apply(  # type: ignore[no-untyped-call]
        *(ops, stride, x.contiguous(memory_format=torch.channels_last)), *(w.to(x.dtype).contiguous() for w in weights)
    )
    return y.to(dtype)


def _check(x: Tensor, weights: Sequence[Tensor], stride: int) -> None:
    _common.check_tensors("x", [x])
    if x.dim() != 4:
        raise ValueError(f"x has {x.dim()} dimensions: expected (N, C_in, H, W)")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}: expected 1 or 2")
    if stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"x is {x.shape[2]}x{x.shape[3]}: with stride 2 the height and width must be even; pad x")
    if isinstance(weights, Tensor) or not weights:
        raise ValueError("weights must be a sequence of at least one tensor: pass [weight]")
    if stride == 2 and len(weights) > 2:
        raise ValueError(f"weights has {len(weights)} tensors: with stride 2 expected one or two")
    for g, w in enumerate(weights):
        _common.check_tensors(f"weights[{g}]", [w])
        if w.dim() != 4 or w.shape[0] == 0 or tuple(w.shape[1:]) != (x.shape[1], 1, 1):
            raise ValueError(f"weights[{g}] has shape {tuple(w.shape)}: expected (C_out, {x.shape[1]}, 1, 1)")
        if w.device != x.device:
            raise ValueError(f"weights[{g}] is on {w.device} but x is on {x.device}: move one of them")
        if w.dtype != x.dtype:
            raise ValueError(f"weights[{g}] has dtype {w.dtype} but x has {x.dtype}: they must agree")


def _empty(like: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(x: Tensor, weights: list[Tensor], stride: int) -> Tensor:
    n, _, h, w = x.shape
    return _empty(x, (n, sum(t.shape[0] for t in weights), h // stride, w // stride))


def _fake_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], stride: int, need_x: bool, need_weights: bool
) -> tuple[Tensor, list[Tensor]]:
    return (
        _empty(x, tuple(x.shape)) if need_x else x.new_empty(0),
        [torch.empty_like(w) for w in weights] if need_weights else [],
    )


_common.register_fakes({"relu_pointwise": _fake, "_relu_pointwise_backward": _fake_backward})
