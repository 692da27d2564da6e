"""partial_channels: the two ends of an edge that sends only a part of its channels through the candidates.

PC-DARTS (arXiv:1907.05737): the first C/k channels go to the candidates; the others bypass them (2x2 max-pooled where
the edge has stride 2) and are concatenated to the result, and a channel shuffle of k groups mixes the two::

    active, bypass = partial_channels_split(x, k, stride)
    y = partial_channels(mixed_op(active), bypass)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common


@dataclass(frozen=True)
class Bypass:
    """What :func:`partial_channels` needs of an edge's input; made by :func:`partial_channels_split`.

    Attributes:
        x: the edge's input (N, C, H, W); in channels_last memory for the native ops.
        k: one channel in k goes to the candidates.
        stride: of the edge, 1 or 2.
        ops: the namespace of the native ops, or None for the reference.
        handle: has the shape of the edge's output and no content. It carries the output's gradient back to the split,
            which so writes the whole gradient of ``x`` at once.
    """

    x: Tensor
    k: int
    stride: int
    ops: Any | None = None
    handle: Tensor | None = None


def partial_channels_split_reference(x: Tensor, k: int) -> Tensor:
    """Returns the first C/k channels of ``x``."""
    return x[:, : x.shape[1] // k]


def partial_channels_reference(mixed: Tensor, x: Tensor, k: int, stride: int = 1) -> Tensor:
    """Returns shuffle(cat([mixed, x[:, C/k:]], 1), k) in plain PyTorch, the latter 2x2 max-pooled for stride 2."""
    if k == 1:
        return mixed
    bypass = x[:, x.shape[1] // k :]
    if stride == 2:
        bypass = functional.max_pool2d(bypass, 2, 2)
    y = torch.cat([mixed, bypass], 1)
    n, c, h, w = y.shape
    return y.view(n, k, c // k, h, w).transpose(1, 2).reshape(n, c, h, w)


class _Split(torch.autograd.Function):
    """x -> (active, handle): receives the gradients of both ends, and writes x's gradient once."""

    @staticmethod
    def forward(ctx: Any, ops: Any, x: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
        ctx.ops, ctx.size, ctx.k, ctx.stride = ops, list(x.shape), k, stride
        ctx.set_materialize_grads(False)
        if stride == 2:  # for the places of the maxima
            ctx.save_for_backward(x)
        n, c, h, w = x.shape
        return ops.partial_channels_split(x, k), x.new_empty(()).expand(n, c, h // stride, w // stride)

    @staticmethod
    @_common.differentiable_once
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_active: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_active is None and grad is None:
            return None, None, None, None
        x = saved[0] if ctx.stride == 2 else None
        grads = [None if g is None else g.contiguous(memory_format=torch.channels_last) for g in (grad_active, grad)]
        return None, ctx.ops._partial_channels_split_backward(*grads, x, ctx.size, ctx.k, ctx.stride), None, None


class _Merge(torch.autograd.Function):
    """(mixed, handle) -> y; the handle's gradient is y's own."""

    @staticmethod
    def forward(ctx: Any, ops: Any, mixed: Tensor, handle: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
        ctx.ops, ctx.k = ops, k
        return ops.partial_channels(mixed, x, k, stride)  # type: ignore[no-any-return]

    @staticmethod
    @_common.differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_mixed = ctx.ops._partial_channels_backward(grad, ctx.k) if ctx.needs_input_grad[1] else None
        return None, grad_mixed, grad, None, None, None


def check_split(x: Tensor, k: int, stride: int) -> None:
    """Checks that x can be split.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype if isinstance(x, Tensor) else type(x).__name__}: expected a floating tensor")
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (N, C, H, W)")
    if not isinstance(k, int) or k < 1 or x.shape[1] % k:
        raise ValueError(f"k={k} does not divide the {x.shape[1]} channels of x: choose a k that does")
    if stride not in (1, 2):
        raise ValueError(f"stride={stride}: expected 1 or 2")
    if stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(
            f"x is {x.shape[2]}x{x.shape[3]}: with stride 2 the height and width must be even, since the pooled bypass "
            "rounds down and the candidates round up"
        )


def partial_channels_split(
    x: Tensor, k: int, stride: int = 1, *, backend: Backend | None = None
) -> tuple[Tensor, Bypass]:
    """Returns what goes to the candidates, (N, C/k, H, W), and what :func:`partial_channels` needs of the rest.

    Args:
        x: the edge's input (N, C, H, W), floating.
        k: one channel in k goes to the candidates; a divisor of C.
        stride: of the edge, 1 or 2; with 2, H and W must be even.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Raises:
        TypeError, ValueError: where an argument does not fit.
    """
    check_split(x, k, stride)
    ops = _library.namespace(backend, x)
    if ops is None:
        return partial_channels_split_reference(x, k), Bypass(x, k, stride)
    x = x.contiguous(memory_format=torch.channels_last)
    active, handle = _Split.apply(ops, x, k, stride)  # type: ignore[no-untyped-call]
    return active, Bypass(x, k, stride, ops, handle)


def partial_channels(mixed: Tensor, bypass: Bypass) -> Tensor:
    """Returns ``shuffle(cat([mixed, rest], 1), k)``, (N, C, H/stride, W/stride), in one write.

    ``rest`` is ``x[:, C/k:]``, 2x2 max-pooled where the stride is 2.

    Args:
        mixed: the candidates' output (N, C/k, H/stride, W/stride).
        bypass: from :func:`partial_channels_split`.

    Raises:
        ValueError: where ``mixed`` differs from x in dtype or device or does not have that shape.
    """
    x, k, stride = bypass.x, bypass.k, bypass.stride
    n, c, h, w = x.shape
    for what, got, expected in (
        ("shape", tuple(mixed.shape), (n, c // k, h // stride, w // stride)),
        ("dtype", mixed.dtype, x.dtype),
        ("device", mixed.device, x.device),
    ):
        if got != expected:
            raise ValueError(f"mixed has {what} {got}: expected {expected}, as the input that was split asks for")
    if bypass.ops is None:
        return partial_channels_reference(mixed, x, k, stride)
    mixed = mixed.contiguous(memory_format=torch.channels_last)
    return _Merge.apply(bypass.ops, mixed, bypass.handle, x.detach(), k, stride)  # type: ignore[no-any-return,no-untyped-call]


def _empty(like: Tensor, size: list[int]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake_split(x: Tensor, k: int) -> Tensor:
    n, c, h, w = x.shape
    return _empty(x, [n, c // k, h, w])


def _fake_split_backward(
    grad_active: Tensor | None, grad: Tensor | None, x: Tensor | None, size: list[int], k: int, stride: int
) -> Tensor:
    like = grad if grad is not None else grad_active
    assert like is not None
    return _empty(like, size)


def _fake(mixed: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
    n, c, h, w = x.shape
    return _empty(x, [n, c, h // stride, w // stride])


_common.register_fakes(
    {
        "partial_channels_split": _fake_split,
        "_partial_channels_split_backward": _fake_split_backward,
        "partial_channels": _fake,
        "_partial_channels_backward": _fake_split,
    }
)
