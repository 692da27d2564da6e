"""Augmentation of whole batches, on the device where they lie.

No step looks at one image at a time: every image of a batch gets its own random numbers, all drawn in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import to_device
from .jitter import color_jitter


@dataclass(frozen=True)
class Augment:
    """What `augment` does to each image.

    Attributes:
        pad: pixels of black border from which a crop of the original size is taken at random.
        flip: mirror left to right with probability 1/2.
        cutout: side of the square that is set to zero, 0 for none (arXiv 1708.04552).
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for argument in ("pad", "cutout"):
            if getattr(self, argument) < 0:
                raise ValueError(f"{argument}={getattr(self, argument)} must be 0 (off) or more pixels")


_DEFAULTS = {
    "digits": Augment(pad=1, flip=False),  # a mirrored 2 is no 2; 1 of 8 pixels is CIFAR's 4 of 32
    "cifar10": Augment(),
    "cifar100": Augment(),
    "npz": Augment(pad=2, flip=False),  # mirroring is only safe for those who know the images
}


def default_augment(name: str) -> Augment:
    """Returns the augmentation that suits the data set `name`.

    For CIFAR it is that of the DARTS search (arXiv 1806.09055).
    """
    try:
        return _DEFAULTS[name]
    except KeyError:
        raise ValueError(f"name={name!r} has no default augmentation; choose one of {', '.join(_DEFAULTS)}") from None


def normalize(
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    *,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Returns `(images / 255 - mean) / std`, float32 (N, C, H, W).

    Args:
        images: uint8 (N, C, H, W).
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        memory_format: layout of the result.
    """
    _check(images)
    return _standardize(_scale(images, memory_format), mean, std)


def _scale(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    return images.to(torch.float32, memory_format=memory_format).div_(255)


def _standardize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Returns `(images - mean) / std`, in the memory of `images`."""
    channels = images.shape[1]
    moments = []
    for argument, value in (("mean", mean), ("std", std)):
        moment = torch.as_tensor(value, dtype=torch.float32, device=images.device)
        if moment.shape != (channels,):
            raise ValueError(
                f"{argument} needs {channels} values, one for each channel, not shape {tuple(moment.shape)}"
            )
        moments.append(moment.view(1, channels, 1, 1))
    return images.sub_(moments[0]).div_(moments[1])


def augment(
    images: Tensor,
    config: Augment,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    generator: torch.Generator,
    *,
    jitter: Sequence[float] = (),
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Returns the images cropped, flipped, recoloured, normalised and cut out at random, float32 (N, C, H, W).

    The border is black before normalising and the cut-out square is zero after it, as in the DARTS code (arXiv
    1806.09055). The square's centre is anywhere in the image, so that it may lie partly outside.

    Args:
        images: uint8 (N, C, H, W), on any device; left as they are.
        config: what to do.
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        generator: source of every random number. One on the CPU gives the same numbers for images on any device.
        jitter: strengths of :func:`~fastnas.data.color_jitter`; none is off.
        memory_format: layout of the result.
    """
    _check(images)
    n, _, height, width = images.shape
    draws = _draw(config, n, height, width, generator, images.device)
    if draws.offset is not None or draws.flip is not None:
        images = _crop_and_flip(images, config.pad, draws)
    out = _scale(images, memory_format)
    if any(jitter):
        out = color_jitter(out, jitter, generator)
    out = _standardize(out, mean, std)
    if draws.centre is not None:
        top, left = (draws.centre - config.cutout // 2).unbind(1)
        rows = _within(top, config.cutout, height)  # (N, H)
        columns = _within(left, config.cutout, width)  # (N, W)
        out.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)
    return out


class _Draws(NamedTuple):
    """A batch's random numbers; None for a step that is off."""

    offset: Tensor | None  # (N, 2), row and column of the crop in the padded image, 0 to 2·pad
    flip: Tensor | None  # (N,) bool
    centre: Tensor | None  # (N, 2), row and column of the square's centre


def _draw(config: Augment, n: int, height: int, width: int, generator: torch.Generator, device: torch.device) -> _Draws:
    def integers(high: int, *shape: int) -> Tensor:
        # Drawn where the generator is, so that a CPU generator's numbers don't depend on the images' device.
        drawn = torch.randint(high, shape, generator=generator, device=generator.device)
        return to_device(drawn, device)

    offset = integers(2 * config.pad + 1, n, 2) if config.pad else None
    flip = integers(2, n).bool() if config.flip else None
    centre = torch.stack((integers(height, n), integers(width, n)), 1) if config.cutout else None
    return _Draws(offset, flip, centre)


def _crop_and_flip(images: Tensor, pad: int, draws: _Draws) -> Tensor:
    n, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(n, -1)  # (N, H), the row that each output row reads
    columns = torch.arange(width, device=images.device).expand(n, -1)  # (N, W)
    if draws.flip is not None:
        columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
    if draws.offset is not None:
        images = F.pad(images, (pad, pad, pad, pad))
        rows = rows + draws.offset[:, :1]
        columns = columns + draws.offset[:, 1:]
    which = torch.arange(n, device=images.device)
    # Pixels are gathered as whole (C,) vectors, which leaves the result in channels_last memory.
    pixels = images.permute(0, 2, 3, 1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return pixels.permute(0, 3, 1, 2)


def _within(start: Tensor, length: int, size: int) -> Tensor:
    """Returns whether each of `size` positions lies in `length` positions from `start`, bool (N, size)."""
    position = torch.arange(size, device=start.device)
    return (position >= start[:, None]) & (position < start[:, None] + length)


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
