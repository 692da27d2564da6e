"""Images from files, as a model takes them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fastnas._files import first_line


def read_image(path: str | os.PathLike[str], channels: int, size: int, crop: float = 1.0) -> Tensor:
    """Returns the image in a file, uint8 (channels, size, size): the square in its centre, resized.

    Args:
        path: of any format that Pillow reads.
        channels: 3 for RGB, 1 for grey.
        size: height and width.
        crop: the square, as a part of the shorter side; :attr:`TrainedModel.crop` is that of a model.

    Raises:
        ValueError: where the file holds no image that can be read, or an image cannot have so many channels.
        OSError: where there is no such file.
    """
    from PIL import Image

    from fastnas.data import image_folder

    if channels not in (1, 3):
        raise ValueError(f"the model reads images of {channels} channels, which image files do not have")
    path = Path(path)
    with path.open("rb") as file:
        try:
            with Image.open(file) as opened:
                image = image_folder.upright(opened)
                box = image_folder.centre_box(*image.size, crop)
                return image_folder.crop(image, box, size, "RGB" if channels == 3 else "L")
        except Exception as error:  # damaged bytes make decoders raise nearly anything
            raise ValueError(f"{path} holds no image that can be read ({first_line(error)})") from error


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
        found = sorted(
            p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file() and not p.name.startswith(".")
        )
        if not found:
            raise ValueError(f"there is no image in the folder {path}")
        files += found
    return files
