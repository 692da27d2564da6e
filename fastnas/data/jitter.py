"""Random brightness, contrast, saturation and hue of whole batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batches import to_device

_GRAY = (0.299, 0.587, 0.114)  # of ITU-R BT.601


def color_jitter(images: Tensor, strengths: Sequence[float], generator: torch.Generator) -> Tensor:
    """Returns the images with random colours, float32 (N, 3, H, W) in [0, 1].

    Every image has its own factors: of brightness, contrast and saturation from ``1 - s`` (not below 0) to ``1 + s``,
    and a shift of the hue from ``-s`` to ``s`` of the colour circle. The order of the four is drawn once a batch.

    Args:
        images: float32 (N, 3, H, W) in [0, 1]; left as they are.
        strengths: s of brightness, contrast, saturation and hue; 0 is off.
        generator: source of every random number.
    """
    if images.shape[1] != 3:
        raise ValueError(f"jitter of colours wants 3 channels, these images have {images.shape[1]}: switch it off")
    draws = torch.rand(4, len(images), generator=generator, device=generator.device)
    order = torch.randperm(4, generator=generator, device=generator.device).tolist()
    draws = to_device(2 * draws - 1, images.device)[..., None, None, None]  # in [-1, 1)
    for o in order:
        amount = strengths[o] * draws[o]  # (N, 1, 1, 1)
        if strengths[o] == 0:
            continue
        if o == 3:
            images = _shift_hue(images, amount)
        elif o == 0:
            images = (images * (1 + amount).clamp_(min=0)).clamp_(0, 1)
        else:
            gray = _gray(images)
            base = gray.mean((1, 2, 3), keepdim=True) if o == 1 else gray
            images = torch.lerp(base, images, (1 + amount).clamp_(min=0)).clamp_(0, 1)
    return images


def _gray(images: Tensor) -> Tensor:
    red, green, blue = torch.split(images, 1, 1)
    gray: Tensor = _GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue  # (N, 1, H, W)
    return gray


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Returns the images after a turn of the hue (of HSV) by ``shift`` of the circle, (N, 1, 1, 1)."""
    value, largest = images.max(1, keepdim=True)  # (N, 1, H, W)
    chroma = value - images.amin(1, keepdim=True)
    red, green, blue = torch.split(images, 1, 1)
    numerator = torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red, red - green))
    hue = numerator / torch.where(chroma == 0, 1, chroma) + 2 * largest + 6 * shift  # in sixths of the circle
    # red, green and blue from hue, chroma and value: k = (n + hue) mod 6, value - chroma * clamp(min(k, 4 - k), 0, 1)
    n = torch.arange(5.0, 0.0, -2.0, device=images.device).view(1, 3, 1, 1)  # 5, 3, 1, made where it is read
    k = (n + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
