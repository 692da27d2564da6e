"""The space of ProxylessNAS (arXiv:1812.00332, and the published search script)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fastnas.nn.chain import Skeleton
from fastnas.spaces._chain import ChainSpace
from fastnas.spaces._registry import register

PROXYLESS_PRIMITIVES: tuple[str, ...] = (
    "mbconv3_3x3",
    "mbconv6_3x3",
    "mbconv3_5x5",
    "mbconv6_5x5",
    "mbconv3_7x7",
    "mbconv6_7x7",
    "skip_connect",
)
"""The choices of a layer in the published order; the published code calls the last one ``Zero``: the block is zero, and
its shortcut remains."""

_IMAGENET = Skeleton(
    stem=32,
    stem_stride=2,
    first=16,
    stages=((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)),
    head=1280,
    activation=nn.ReLU6,
    eps=1e-3,
)

PROXYLESS = register(ChainSpace("proxyless", PROXYLESS_PRIMITIVES, _IMAGENET, projections=False, divisor=8))

# Not published: for images of 32 pixels, which the last stages see in 4 x 4 as the first ones see ImageNet's in 7 x 7.
_CIFAR_STAGES = ((24, 4, 1), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
PROXYLESS_CIFAR = register(
    replace(PROXYLESS, name="proxyless-cifar", skeleton=replace(_IMAGENET, stem_stride=1, stages=_CIFAR_STAGES))
)
