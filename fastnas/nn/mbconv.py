"""Inverted residual blocks (MobileNetV2, arXiv:1801.04381) and the registry of blocks of chains.

Unlike a primitive of :mod:`fastnas.nn.operations`, a block may change the number of channels. One of your own registers
itself::

    @block("conv_3x3")
    def conv_3x3(C_in, C_out, stride, affine):
        return ReLUConvBN(C_in, C_out, 3, stride, 1, affine)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fastnas._registry import Registry
from fastnas.nn.operations import Identity

BlockBuilder = Callable[[int, int, int, bool], nn.Module]

BLOCKS: Registry[BlockBuilder] = Registry("block")
"""Every known block: ``BLOCKS[name](C_in, C_out, stride, affine)`` builds it."""


def block(name: str) -> Callable[[BlockBuilder], BlockBuilder]:
    """Returns a decorator that registers ``(C_in, C_out, stride, affine) -> Module`` in ``BLOCKS`` under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another builder.
    """
    return BLOCKS.named(name)


class InvertedResidual(nn.Module):
    """Pointwise convolution to more channels, depthwise convolution, pointwise convolution; the input is added.

    Every convolution is followed by a batch norm, the first two by an activation, too. With an expansion of 1 there is
    no first one. The input is added where the block changes neither size nor channels. Children are named as in the
    published code of NAS-Bench-Macro.

    Args:
        C_in: channels of the input.
        C_out: channels of the output.
        kernel_size: of the depthwise convolution; odd.
        stride: of the depthwise convolution.
        expansion: the depthwise convolution has so many times the input's channels.
        affine: whether batch norms have weights and biases.
        activation: its class: MobileNetV2 and ProxylessNAS have ReLU6, NAS-Bench-Macro has ReLU.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        affine: bool = True,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        C = expansion * C_in
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(C_in, C, 1, bias=False), nn.BatchNorm2d(C, affine=affine), activation()]
        layers += [
            nn.Conv2d(C, C, kernel_size, stride, kernel_size // 2, groups=C, bias=False),
            nn.BatchNorm2d(C, affine=affine),
            activation(),
            nn.Conv2d(C, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and C_in == C_out

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, ceil(H / stride), ceil(W / stride)) from (N, C_in, H, W)."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class Projection(nn.Module):
    """Pointwise convolution and batch norm: what stands for an identity between different sizes or channels."""

    def __init__(self, C_in: int, C_out: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        self.downsample = nn.Sequential(
            nn.Conv2d(C_in, C_out, 1, stride, bias=False), nn.BatchNorm2d(C_out, affine=affine)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, ceil(H / stride), ceil(W / stride)) from (N, C_in, H, W)."""
        y: Tensor = self.downsample(x)
        return y


@block("skip_connect")
def _skip_connect(C_in: int, C_out: int, stride: int, affine: bool) -> nn.Module:
    return Identity() if stride == 1 and C_in == C_out else Projection(C_in, C_out, stride, affine)


def _inverted_residual(
    C_in: int, C_out: int, stride: int, affine: bool, *, kernel_size: int, expansion: int, activation: type[nn.Module]
) -> nn.Module:
    return InvertedResidual(C_in, C_out, kernel_size, stride, expansion, affine, activation)


for _name, _activation, _sizes in (
    ("mb", nn.ReLU, ((3, 3), (6, 5))),
    ("mbconv", nn.ReLU6, ((3, 3), (6, 3), (3, 5), (6, 5), (3, 7), (6, 7))),
):
    for _expansion, _kernel in _sizes:
        block(f"{_name}{_expansion}_{_kernel}x{_kernel}")(
            partial(_inverted_residual, kernel_size=_kernel, expansion=_expansion, activation=_activation)
        )
