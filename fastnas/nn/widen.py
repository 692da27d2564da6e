"""Widening of trained layers (DrNAS, arXiv:2006.10355, Eq. 7 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.nn.operations import FactorizedReduce


def widen(op: nn.Module, old: int, new: int, generator: torch.Generator | None = None) -> None:
    """Widens a candidate operation from ``old`` to ``new`` channels, in place.

    Channel j of each widened layer copies channel g(j) of the old layer, with g(j) = j for j < old and a random old
    channel beyond; a layer's input channels follow the g of the layer before. As published, nothing is divided by the
    number of copies, so that the function is not preserved exactly.

    Args:
        op: made of convolutions, batch norms, pools, ReLU, FactorizedReduce.
        old: its channels, in and out.
        new: the channels wanted; at least ``old``.
        generator: source of the random channels.

    Raises:
        ValueError: where a layer cannot be widened.
    """
    _widen(op, _indices(old, new, generator), generator)


def _indices(old: int, new: int, generator: torch.Generator | None) -> Tensor:
    """Eq. 7's g as an index vector of length ``new``."""
    return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])


def _widen(op: nn.Module, channels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Widens ``op`` whose input channels are copies ``channels``; returns what its output channels copy."""
    if isinstance(op, nn.Conv2d):
        return _widen_conv(op, channels, op.out_channels * len(channels) // op.in_channels, generator)
    if isinstance(op, nn.BatchNorm2d):
        _widen_norm(op, channels)
        return channels
    if isinstance(op, FactorizedReduce):
        half = op.conv_1.out_channels
        size = op.bn.num_features * len(channels) // op.conv_1.in_channels // 2
        first = _widen_conv(op.conv_1, channels, size, generator)
        second = _widen_conv(op.conv_2, channels, size, generator)
        channels = torch.cat([first, half + second])
        _widen_norm(op.bn, channels)
        return channels
    children = list(op.children())
    if not children and next(op.parameters(), None) is not None:
        raise ValueError(f"{type(op).__name__} cannot be widened: only convolutions, batch norms and pools can")
    for child in children:
        channels = _widen(child, channels, generator)
    return channels


def _widen_conv(conv: nn.Conv2d, channels: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    pointwise = conv.kernel_size == (1, 1)  # of a single channel it has groups == channels, too
    if conv.groups == conv.in_channels == conv.out_channels and not pointwise:  # depthwise: a filter a channel
        out = channels
        weight = conv.weight.detach()[out.to(conv.weight.device)]
        conv.groups = len(channels)
    elif conv.groups == 1:
        out = _indices(conv.out_channels, size, generator)
        device = conv.weight.device
        weight = conv.weight.detach()[out.to(device)][:, channels.to(device)]
    else:
        raise ValueError(
            f"a convolution with groups={conv.groups} cannot be widened: only dense and depthwise ones can"
        )
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[out.to(conv.bias.device)], requires_grad=conv.bias.requires_grad)
    conv.in_channels, conv.out_channels = len(channels), len(out)
    return out


def _widen_norm(norm: nn.BatchNorm2d, channels: Tensor) -> None:
    norm.num_features = len(channels)
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        if value is not None:
            copied = value.detach()[channels.to(value.device)]
            setattr(norm, name, nn.Parameter(copied, requires_grad=value.requires_grad))
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, value[channels.to(value.device)])
