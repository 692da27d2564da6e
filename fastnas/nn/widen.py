"""Widening of trained layers (DrNAS, arXiv:2006.10355, Eq. 7 and 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas.nn.operations import FactorizedReduce


@dataclass(frozen=True)
class Replaced:
    """A parameter that another one stands for since its layer was widened.

    Attributes:
        old: the parameter before.
        new: the parameter in its place.
        select: gives of any tensor of the old one's shape, such as a momentum buffer, what the new one got of the old.
    """

    old: nn.Parameter
    new: nn.Parameter
    select: Callable[[Tensor], Tensor]


def widen(
    op: nn.Module,
    old: int,
    new: int,
    generator: torch.Generator | None = None,
    replaced: list[Replaced] | None = None,
) -> None:
    """Widens a candidate operation from ``old`` to ``new`` channels, in place.

    Channel j of each widened layer copies channel g(j) of the old layer, with g(j) = j for j < old and a random old
    channel beyond; a layer's input channels follow the g of the layer before. As published, nothing is divided by the
    number of copies, so that the function is not preserved exactly.

    Args:
        op: made of convolutions, batch norms, pools, ReLU, FactorizedReduce; what has no parameters stays as it is.
        old: its channels, in and out.
        new: the channels wanted; at least ``old``.
        generator: source of the random channels.
        replaced: gets a record of every parameter that is replaced, for optimizers.

    Raises:
        ValueError: where a layer cannot be widened.
    """
    _Widening(generator, [] if replaced is None else replaced).widen(op, _indices(old, new, generator))


def _indices(old: int, new: int, generator: torch.Generator | None) -> Tensor:
    """Eq. 7's g as an index vector of length ``new``."""
    return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])


def _along(out: Tensor, channels: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Returns the function that takes rows ``out`` of a tensor and, where given, columns ``channels`` of them."""

    def select(t: Tensor) -> Tensor:
        t = t[out.to(t.device)]
        return t if channels is None else t[:, channels.to(t.device)]

    return select


@dataclass(frozen=True)
class _Widening:
    generator: torch.Generator | None
    replaced: list[Replaced]

    def widen(self, op: nn.Module, channels: Tensor) -> Tensor:
        """Widens ``op`` whose input channels are copies ``channels``; returns what its output channels copy."""
        if isinstance(op, nn.Conv2d):
            return self._conv(op, channels, op.out_channels * len(channels) // op.in_channels)
        if isinstance(op, nn.BatchNorm2d):
            self._norm(op, channels)
            return channels
        if isinstance(op, FactorizedReduce):
            half = op.conv_1.out_channels
            size = op.bn.num_features * len(channels) // op.conv_1.in_channels // 2
            first = self._conv(op.conv_1, channels, size)
            second = self._conv(op.conv_2, channels, size)
            channels = torch.cat([first, half + second])
            self._norm(op.bn, channels)
            return channels
        children = list(op.children())
        if not children and next(op.parameters(), None) is not None:
            raise ValueError(f"{type(op).__name__} cannot be widened: only convolutions, batch norms and pools can")
        for child in children:
            channels = self.widen(child, channels)
        return channels

    def _conv(self, conv: nn.Conv2d, channels: Tensor, size: int) -> Tensor:
        pointwise = conv.kernel_size == (1, 1)  # of a single channel it has groups == channels, too
        if conv.groups == conv.in_channels == conv.out_channels and not pointwise:  # depthwise: a filter a channel
            out = channels
            self._replace(conv, "weight", _along(out))
            conv.groups = len(channels)
        elif conv.groups == 1:
            out = _indices(conv.out_channels, size, self.generator)
            self._replace(conv, "weight", _along(out, channels))
        else:
            raise ValueError(
                f"a convolution with groups={conv.groups} cannot be widened: only dense and depthwise ones can"
            )
        self._replace(conv, "bias", _along(out))
        conv.in_channels, conv.out_channels = len(channels), len(out)
        return out

    def _norm(self, norm: nn.BatchNorm2d, channels: Tensor) -> None:
        norm.num_features = len(channels)
        select = _along(channels)
        for name in ("weight", "bias"):
            self._replace(norm, name, select)
        for name in ("running_mean", "running_var"):
            value = getattr(norm, name)
            if value is not None:
                setattr(norm, name, select(value))

    def _replace(self, layer: nn.Module, name: str, select: Callable[[Tensor], Tensor]) -> None:
        old = getattr(layer, name)
        if old is None:
            return
        new = nn.Parameter(select(old.detach()), requires_grad=old.requires_grad)
        setattr(layer, name, new)
        self.replaced.append(Replaced(old, new, select))
