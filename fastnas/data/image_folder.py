"""Folders of images, a class a folder: read by worker processes, cropped at random as the image is read."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
"""What files of images are called, in any case."""

# The usual statistics of ImageNet's training images scaled to [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_LAYOUT = "ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg"
TEST_CROP = 224 / 256
"""The square that is tested on, as a part of the shorter side."""

_ORIENTATION = 0x0112  # of Exif; 1 is upright


class Loaded(NamedTuple):
    """A batch that was read.

    Attributes:
        images: uint8 (N, 3, S, S).
        labels: int64 (N,).
        unreadable: the images that are missing in it, each with what is wrong.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]


class _Item(NamedTuple):
    """What a worker is asked for."""

    part: str
    image: int
    seed: str  # of the crop; "" is the centre


class _Part:
    """The images of a part: names in one block of memory, which workers share, and labels."""

    def __init__(self, root: Path, names: list[str], labels: list[int]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._root = root
        self._text = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self._ends = torch.tensor([len(name) for name in encoded]).cumsum(0)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        start = int(self._ends[index - 1]) if index else 0
        return self._root / os.fsdecode(bytes(self._text[start : int(self._ends[index])].tolist()))


_Read = tuple[Tensor | None, int, tuple[str, str]]


class ImageFolder(Dataset[_Read]):
    """The images in ``ROOT/train/CLASS`` and ``ROOT/val/CLASS``, in the order of their names.

    Training images are cropped at random: 8 % to 100 % of the area, an aspect ratio of 3/4 to 4/3, resized to a square.
    Of test images it is the centre, 224/256 of the shorter side. An image is in no other way changed, but shown as its
    Exif orientation says.

    Args:
        root: the folder with train and val.
        size: side of the squares, in pixels.

    Attributes:
        classes: names of the classes' folders, sorted.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a class has no images, or train and val have different classes, or there is only one.
    """

    def __init__(self, root: str | os.PathLike[str], size: int = 224) -> None:
        self.root = Path(root).expanduser()
        self.size = size
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={str(self.root)!r} is no folder; expected {_LAYOUT}")
        classes = {part: _classes(self.root / part) for part in ("train", "val")}
        self.classes = classes["train"]
        for here, there in (("train", "val"), ("val", "train")):
            if missing := sorted(set(classes[here]) - set(classes[there])):
                raise ValueError(
                    f"{self.root / here} has the class {missing[0]!r} and {self.root / there} has not "
                    f"({len(classes['train'])} and {len(classes['val'])} classes in train and val); "
                    "both need the same folders"
                )
        if len(self.classes) < 2:
            raise ValueError(f"{self.root / 'train'} has one class, {self.classes[0]!r}: training needs 2 or more")
        self._parts = {part: _part(self.root / part, self.classes) for part in classes}

    def count(self, part: str) -> int:
        """Returns the number of images in ``train`` or ``val``."""
        return len(self._parts[part])

    def __getitem__(self, item: _Item) -> _Read:
        """Returns an image, uint8 (3, S, S), or None where it cannot be read; its label; its path and what is wrong."""
        part = self._parts[item.part]
        path, label = part.path(item.image), int(part.labels[item.image])
        try:
            with Image.open(path) as file:
                image = upright(file)
                size = image.size
                box = random_box(*size, random.Random(item.seed)) if item.seed else centre_box(*size, TEST_CROP)
                return crop(image, box, self.size), label, (str(path), "")
        except Exception as error:  # damaged bytes make the reader raise nearly anything
            return None, label, (str(path), " ".join(str(error).split()) or type(error).__name__)


class _Asked:
    """The batches that the loader is to read next, once."""

    def __init__(self) -> None:
        self.batches: Iterator[list[_Item]] = iter(())

    def __iter__(self) -> Iterator[list[_Item]]:
        return self.batches


class FolderBatches:
    """Batches of an :class:`ImageFolder`, read by worker processes that live until :meth:`close`.

    Args:
        images: the folder.
        batch_size: images a batch.
        seed: what the order and the crops depend on, beside the epoch and the image: never on the workers.
        workers: processes; 0 reads in this one.
        pin_memory: for a GPU.
    """

    def __init__(
        self, images: ImageFolder, batch_size: int, *, seed: int, workers: int = 0, pin_memory: bool = False
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._workers = workers
        self._pin_memory = pin_memory
        self._asked = _Asked()
        self._loader: DataLoader[Any] | None = None

    def train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Loaded]:
        """Yields training images, cropped as the epoch has it.

        Args:
            batches: indices of each batch, int64 (B,).
            epoch: counted from 0.
        """
        return self._read([_Item("train", i, f"{self._seed} {epoch} {i}") for i in batch.tolist()] for batch in batches)

    def test(self) -> Iterator[Loaded]:
        """Yields all test images in their order."""
        n, size = self._images.count("val"), self._batch_size
        return self._read([_Item("val", i, "") for i in range(j, min(j + size, n))] for j in range(0, n, size))

    def close(self) -> None:
        """Ends the workers; the next batches start new ones."""
        self._loader = None

    def _read(self, asked: Iterator[list[_Item]]) -> Iterator[Loaded]:
        self._asked.batches = asked
        if self._loader is None:
            self._loader = DataLoader(
                self._images,
                batch_sampler=self._asked,
                num_workers=self._workers,
                collate_fn=_collate,
                pin_memory=self._pin_memory,
                persistent_workers=self._workers > 0,
                worker_init_fn=_defer_signals,
            )
        return iter(self._loader)


def _defer_signals(worker: int) -> None:
    # Ctrl-C, and what job managers send, reach all processes: they are for the main one, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The main process itself may send the second one, to a worker that does not come to its end.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _collate(items: Sequence[_Read]) -> Loaded:
    images = [image for image, _, _ in items if image is not None]
    return Loaded(
        torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8),
        torch.tensor([label for image, label, _ in items if image is not None], dtype=torch.int64),
        [where for image, _, where in items if image is None],
    )


Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""


def random_box(width: int, height: int, chance: random.Random) -> Box:
    """Returns 8 % to 100 % of an image's area with an aspect ratio of 3/4 to 4/3, anywhere in it.

    After ten draws that do not fit, it is the largest box in the centre whose ratio is allowed.
    """
    for _ in range(10):
        area = width * height * chance.uniform(0.08, 1)
        ratio = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = chance.randint(0, width - w), chance.randint(0, height - h)
            return left, upper, left + w, upper + h
    return _centred(width, height, min(width, height * 4 / 3), min(height, width * 4 / 3))


def centre_box(width: int, height: int, part: float) -> Box:
    """Returns the square in the centre, this part of the shorter side."""
    side = min(width, height) * part
    return _centred(width, height, side, side)


def _centred(width: int, height: int, w: float, h: float) -> Box:
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def upright(image: Image.Image) -> Image.Image:
    """Returns an image as its Exif orientation says, of 8 bits a channel; most are returned as they are, unread."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged Exif; the pixels may be whole
        turned = False
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # of which a conversion would keep what is above 255 as white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def crop(image: Image.Image, box: Box, size: int, mode: str = "RGB") -> Tensor:
    """Returns a box of an image, resized to a square, uint8 (channels, size, size).

    A JPEG that is larger than needed is decoded at a half, a quarter or an eighth of its size.

    Args:
        image: of 8 bits a channel.
        box: what is kept of it.
        size: side of the square.
        mode: ``RGB``, or ``L`` for grey.
    """
    width, height = image.size
    shrink = min(box[2] - box[0], box[3] - box[1]) / size
    if shrink >= 2:
        image.draft(mode, (int(width / shrink), int(height / shrink)))
        w, h = image.size
        x, y = w / width, h / height
        box = (box[0] * x, box[1] * y, min(box[2] * x, w), min(box[3] * y, h))  # rounding must not lead outside
    square = image.convert(mode).resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    return torch.from_numpy(np.array(square)).view(size, size, -1).permute(2, 0, 1).contiguous()


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; expected {_LAYOUT}")
    names = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))
    if not names:
        raise ValueError(f"{folder} has no folders of classes; expected {_LAYOUT}")
    return names


def _part(folder: Path, classes: Sequence[str]) -> _Part:
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [
            os.path.relpath(os.path.join(where, file), folder)
            for where, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")  # macOS leaves ._NAME.jpg beside a file
        ]
        if not found:
            raise ValueError(f"{folder / name} holds no image ({', '.join(SUFFIXES)}); fill or remove the folder")
        names += sorted(found)
        labels += [label] * len(found)
    return _Part(folder, names, labels)
