"""What the tests of every op share: layouts, errors against float64, a record of the ops that were dispatched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Returns a tensor of x's shape in the layout; ``expanded`` repeats x's first entries along N and W."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = x.shape
        room = x.new_full((n, c + 2, h + 1, 2 * w + 1), float("nan"))
        view = room[:, 1 : c + 1, :h, 1::2]
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:1, :, :, :1].expand_as(x)
    return x.contiguous()


def gradients(
    function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """Returns the function's output and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def error(x: Tensor, exact: Tensor) -> float:
    """Returns |x - exact| / |exact|, norm-wise."""
    if exact.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(x.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp_min(1e-30))


def distance(x: Tensor, y: Tensor) -> float:
    """Returns |x - y|."""
    return float(torch.linalg.vector_norm((x.double() - y.double()).flatten()))


def assert_close_by_norm(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Checks that each tensor's distance is at most ``tolerance`` of the expected one's norm, or of 1e-3 if larger."""
    assert len(got) == len(expected)
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert x.shape == y.shape, i
        norm = float(y.double().norm())
        assert distance(x, y) <= tolerance * max(1e-3, norm), (i, distance(x, y), norm)


def assert_as_precise(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Checks that each of our tensors is at most twice as far from the exact one as theirs in the same dtype.

    Some roundings come on top where theirs may be exact by luck; in float64 the exact one is theirs.
    """
    assert len(ours) == len(theirs) == len(exact)
    for i, (x, y, z) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert x.shape == y.shape == z.shape, i
        assert x.dtype == y.dtype, i
        roundings = {torch.float64: 64, torch.float32: 4}.get(x.dtype, 1)
        assert error(x, z) <= 2 * error(y, z) + roundings * torch.finfo(x.dtype).eps, i


class Record(TorchDispatchMode):
    """Keeps the names of the ops that are dispatched inside it, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().split("::")[-1].split(".")[0])
        return func(*args, **(kwargs or {}))
