"""What comes before the cells of DARTS' networks (arXiv:1806.09055, appendix A.2)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Stem = Literal["cifar", "imagenet"]
"""``cifar``: one convolution at full size. ``imagenet``: three of stride 2, so that cells start at an eighth of it."""

STEMS: tuple[Stem, ...] = get_args(Stem)


def check_stem(stem: str, channels: int) -> None:
    """Checks the name of a stem, and that the first cells' channels can be made by it.

    Raises:
        ValueError: where it is unknown, or ``channels`` is odd and the stem halves it.
    """
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: expected cifar or imagenet")
    if stem == "imagenet" and channels % 2:
        raise ValueError(f"channels={channels} must be even: the stem of imagenet starts with half of them")


def cifar_stem(C_in: int, C_out: int) -> nn.Sequential:
    """Returns a 3x3 convolution and a batch norm."""
    return nn.Sequential(nn.Conv2d(C_in, C_out, 3, padding=1, bias=False), nn.BatchNorm2d(C_out))


def imagenet_stems(C_in: int, C: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Returns the two stems: to C channels at a quarter of the size, and from there to C channels at an eighth."""
    stem0 = nn.Sequential(
        nn.Conv2d(C_in, C // 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(C // 2),
        nn.ReLU(),
        nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(C),
    )
    stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C))
    return stem0, stem1
