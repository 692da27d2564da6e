"""mixed_sum: the weighted sum over candidate outputs, any candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common

MAX_SUMMANDS = 32  # kMaxSummands in csrc/mixed_sum.h


def mixed_sum_reference(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Returns sum_k weights[k] * xs[k] in plain PyTorch."""
    total = weights[0].to(xs[0].dtype) * xs[0]
    for w, x in zip(weights[1:], xs[1:], strict=True):
        total = total + w.to(x.dtype) * x
    return total


class _MixedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Any, weights: Tensor, *xs: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(weights, *xs)
        return ops.mixed_sum(xs, weights)  # type: ignore[no-any-return]

    @staticmethod
    @_common.differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *xs = saved
        need_weights, need_xs = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:])
        grad = _common.like(grad, xs[0])
        grad_xs, grad_weights = ctx.ops._mixed_sum_backward(grad, xs, weights, need_xs, need_weights)
        return None, grad_weights if need_weights else None, *(grad_xs if need_xs else [None] * len(xs))


def mixed_sum(xs: Sequence[Tensor], weights: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Returns ``sum_k weights[k] * xs[k]``, with the gradients of ``xs`` and ``weights`` from one backward pass.

    Args:
        xs: the candidates' outputs, all of one shape, floating dtype and device.
        weights: shape (len(xs),), any floating dtype, same device.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Raises:
        TypeError, ValueError: where ``xs`` is empty or its tensors disagree, or ``weights`` does not fit.
    """
    xs = list(xs)
    _common.check_tensors("xs", xs)
    _common.check_weights(weights, len(xs), xs[0])
    ops = _library.namespace(backend, *xs)
    if ops is None:
        return mixed_sum_reference(xs, weights)
    weights = weights.to(_common.compute_dtype(xs[0])).contiguous()
    xs = _common.same_layout(xs)
    if len(xs) <= MAX_SUMMANDS:
        return _MixedSum.apply(ops, weights, *xs)  # type: ignore[no-any-return,no-untyped-call]
    total: Tensor = _MixedSum.apply(ops, weights[:MAX_SUMMANDS], *xs[:MAX_SUMMANDS])  # type: ignore[no-untyped-call]
    for i in range(MAX_SUMMANDS, len(xs), MAX_SUMMANDS):
        rest = slice(i, i + MAX_SUMMANDS)
        total = total + _MixedSum.apply(ops, weights[rest], *xs[rest])  # type: ignore[no-untyped-call]
    return total


def _fake(xs: list[Tensor], weights: Tensor) -> Tensor:
    return torch.empty_like(xs[0])


def _fake_backward(
    grad: Tensor, xs: list[Tensor], weights: Tensor, need_xs: bool, need_weights: bool
) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(x) for x in xs] if need_xs else [], weights.new_empty(len(xs) if need_weights else 0)


_common.register_fakes({"mixed_sum": _fake, "_mixed_sum_backward": _fake_backward})
