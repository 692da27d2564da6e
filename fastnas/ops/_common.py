"""Checks, layouts and fake registration that every op shares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas import _library
from fastnas._library import DOUBLE_BACKWARD

_fakes: dict[str, Callable[..., Any]] = {}


def register_fakes(fakes: Mapping[str, Callable[..., Any]], namespace: str = "fastnas") -> None:
    """Registers shape functions for the ops of ``namespace``, for fake tensors and torch.compile."""
    for name, fake in fakes.items():
        _fakes[name] = fake
        torch.library.register_fake(f"{namespace}::{name}")(fake)


def register_fakes_for(namespace: str) -> None:
    """Registers every known fake once more, for a second library with the same ops."""
    register_fakes(dict(_fakes), namespace)


class _Refuse(torch.autograd.Function):
    """Passes gradients through; differentiating them with respect to anything behind them raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(DOUBLE_BACKWARD)


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Returns an autograd.Function's backward whose results refuse, by name of the remedy, to be differentiated.

    ``backward`` is called with ctx, its saved tensors and the gradients.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: unpacking may recompute
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return results
        behind = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
        present = [r for r in results if r is not None]
        marked = iter(_Refuse.apply(len(present), *present, *behind))  # type: ignore[no-untyped-call]
        return tuple(None if r is None else next(marked) for r in results)

    return wrapped


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns what ``x`` is computed in: float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Tells whether ``x`` is 4-d and dense in the order N, H, W, C."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def like(x: Tensor, other: Tensor) -> Tensor:
    """Returns ``x`` with the strides of the dense tensor ``other``."""
    if x.stride() == other.stride():
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)


def same_layout(xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors all dense in the layout of the first: channels_last where it is so, else contiguous."""
    memory_format = torch.channels_last if is_channels_last(xs[0]) else torch.contiguous_format
    first = xs[0].contiguous(memory_format=memory_format)
    return [first, *(like(x, first) for x in xs[1:])]


def check_tensors(name: str, xs: Sequence[Tensor]) -> None:
    """Checks that ``xs`` holds floating tensors of one shape, dtype and device.

    Raises:
        TypeError, ValueError: naming the argument and the entry that differs.
    """
    if not xs:
        raise ValueError(f"{name} is empty: expected at least one tensor")
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] is a {type(x).__name__}: expected a tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}: expected a floating dtype")
        for what, mine, first in (
            ("shape", tuple(x.shape), tuple(xs[0].shape)),
            ("dtype", x.dtype, xs[0].dtype),
            ("device", x.device, xs[0].device),
        ):
            if mine != first:
                raise ValueError(f"{name}[{i}] has {what} {mine} but {name}[0] has {first}: they must agree")


def check_weights(weights: Tensor, count: int, x: Tensor) -> None:
    """Checks that ``weights`` is a floating vector of ``count`` entries on x's device (and, in debug mode, not NaN).

    Raises:
        TypeError, ValueError: naming the remedy.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is a {type(weights).__name__}: expected a tensor of shape ({count},)")
    if not weights.is_floating_point():
        raise TypeError(f"weights has dtype {weights.dtype}: expected a floating dtype")
    if weights.shape != (count,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected ({count},), one entry a candidate")
    if weights.device != x.device:
        raise ValueError(f"weights is on {weights.device} but the input is on {x.device}: move weights there")
    if _library.debugging() and bool(torch.isnan(weights).any()):
        raise ValueError(f"weights holds NaN: {weights.detach().tolist()}")
