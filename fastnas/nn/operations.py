"""The candidate operations of DARTS' (arXiv:1806.09055, section 3.1) and NAS-Bench-201's spaces and their registry.

Attributes and indices are named as in the published code, so that its checkpoints load with ``strict=True``. An
operation of your own registers itself::

    @primitive("conv_3x3")
    def conv_3x3(C, stride, affine):
        return ReLUConvBN(C, C, 3, stride, 1, affine)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastnas._registry import Registry
from fastnas.nn.batch_norm import normalise, special
from fastnas.ops.relu_pointwise import relu_pointwise

Builder = Callable[[int, int, bool], nn.Module]

OPS: Registry[Builder] = Registry("primitive")
"""Every known primitive: ``OPS[name](C, stride, affine)`` builds it, from C channels to C channels."""

PRIMITIVES: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The eight candidates of the DARTS space, in the published order (the columns of ``alphas``)."""


def primitive(name: str) -> Callable[[Builder], Builder]:
    """Returns a decorator that registers ``(C, stride, affine) -> Module`` in ``OPS`` under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another builder.
    """
    return OPS.named(name)


def _is_pointwise(m: nn.Module, stride: int) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain 1x1 convolution of this stride without a bias."""
    return (
        type(m) is nn.Conv2d
        and not special(m)
        and (m.kernel_size, m.stride, m.padding, m.groups) == ((1, 1), (stride, stride), (0, 0), 1)
        and m.bias is None
    )


def _relu_pointwise(x: Tensor, relu: nn.Module, convs: Sequence[nn.Module], stride: int) -> Tensor | None:
    """The convolutions of relu(x) side by side, from the fused op; None where that would not be what the modules do."""
    weights: list[Tensor] = [c.weight for c in convs if _is_pointwise(c, stride)]
    if x.dim() != 4 or type(relu) is not nn.ReLU or relu.inplace or special(relu) or len(weights) < len(convs):
        return None
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    return relu_pointwise(x, weights, stride)


class ReLUConvBN(nn.Module):
    """ReLU, convolution, batch norm.

    A plain 1x1 convolution of stride 1 is computed together with its ReLU, and a ``BatchNorm2d(affine=False)`` by the
    fused op. Whatever has hooks, is of another class or has another forward is called.
    """

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H', W') from (N, C_in, H, W)."""
        layers = list(self.op) if type(self.op) is nn.Sequential and not special(self.op) else []
        if len(layers) == 3:
            z = _relu_pointwise(x, layers[0], layers[1:2], 1)
            if z is not None:
                return normalise(layers[2], z)
        y: Tensor = self.op(x)
        return y


class DilConv(nn.Module):
    """ReLU, dilated depthwise convolution, pointwise convolution, batch norm."""

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation=dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / stride, W / stride) from (N, C_in, H, W)."""
        y: Tensor = self.op(x)
        return y


class SepConv(nn.Module):
    """Twice: ReLU, depthwise convolution, pointwise convolution, batch norm. Only the first has the stride."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / stride, W / stride) from (N, C_in, H, W)."""
        y: Tensor = self.op(x)
        return y


class Identity(nn.Module):
    """The input itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x``."""
        return x


class Zero(nn.Module):
    """Zeros in the shape that a convolution of this stride would give."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C, H / stride, W / stride) zeros."""
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    """ReLU, two pointwise convolutions of stride 2, the second one pixel further down and right, and batch norm.

    Computed by the fused ops as :class:`ReLUConvBN` is, where its parts are the plain ones.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        if C_out % 2:
            raise ValueError(f"FactorizedReduce: C_out={C_out} must be even, each half comes from one convolution")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / 2, W / 2) from (N, C_in, H, W).

        Raises:
            ValueError: where H or W is odd.
        """
        return normalise(self.bn, self.reduce(x))

    def reduce(self, x: Tensor) -> Tensor:
        """Returns the forward's result from before the batch norm."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"FactorizedReduce: x has height {x.shape[2]} and width {x.shape[3]}, both must be even: pad or resize "
                "the images to a multiple of 2 for every reduction cell (of 4 in the DARTS space)"
            )
        z = _relu_pointwise(x, self.relu, (self.conv_1, self.conv_2), 2)
        if z is not None:
            return z
        x = self.relu(x)
        return torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)


@primitive("none")
def _none(C: int, stride: int, affine: bool) -> nn.Module:
    return Zero(stride)


@primitive("max_pool_3x3")
def _max_pool_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride=stride, padding=1)


@primitive("avg_pool_3x3")
def _avg_pool_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)


@primitive("skip_connect")
def _skip_connect(C: int, stride: int, affine: bool) -> nn.Module:
    return Identity() if stride == 1 else FactorizedReduce(C, C, affine)


@primitive("sep_conv_3x3")
def _sep_conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(C, C, 3, stride, 1, affine)


@primitive("sep_conv_5x5")
def _sep_conv_5x5(C: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(C, C, 5, stride, 2, affine)


@primitive("sep_conv_7x7")
def _sep_conv_7x7(C: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(C, C, 7, stride, 3, affine)


@primitive("dil_conv_3x3")
def _dil_conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return DilConv(C, C, 3, stride, 2, 2, affine)


@primitive("dil_conv_5x5")
def _dil_conv_5x5(C: int, stride: int, affine: bool) -> nn.Module:
    return DilConv(C, C, 5, stride, 4, 2, affine)


@primitive("conv_7x1_1x7")
def _conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


@primitive("nor_conv_1x1")
def _nor_conv_1x1(C: int, stride: int, affine: bool) -> nn.Module:
    return ReLUConvBN(C, C, 1, stride, 0, affine)


@primitive("nor_conv_3x3")
def _nor_conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return ReLUConvBN(C, C, 3, stride, 1, affine)
