"""Images from files, as a model takes them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_image(path: str | os.PathLike[str], channels: int, size: int) -> Tensor:
    """Returns the image in a file, uint8 (channels, size, size): its shorter side resized, the middle of the longer.

    Args:
        path: of any format that Pillow reads.
        channels: 3 for RGB, 1 for grey.
        size: height and width.

    Raises:
        ValueError: where the file holds no image that can be read, or an image cannot have so many channels.
        OSError: where there is no such file.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"the model reads images of {channels} channels, which image files do not have")
    path = Path(path)
    with path.open("rb") as file:
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):  # of which a conversion would keep what is above 255 as white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = ImageOps.fit(
                    image.convert("RGB" if channels == 3 else "L"), (size, size), Image.Resampling.BILINEAR
                )
        except Exception as error:  # damaged bytes make decoders raise nearly anything
            raise ValueError(f"{path} holds no image that can be read ({_line(error)})") from error
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous() if channels == 3 else pixels[None]


def image_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Returns the files, with folders replaced by the images in them, by name.

    Raises:
        ValueError: where a folder holds no image.
    """
    from PIL import Image

    suffixes = Image.registered_extensions()
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file())
        if not found:
            raise ValueError(f"there is no image in the folder {path}")
        files += found
    return files


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
