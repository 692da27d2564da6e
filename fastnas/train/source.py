"""Where a training's images come from: held in memory on the device, or read from a folder by worker processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastnas.data import ImageData, channel_statistics, load, split, to_device
from fastnas.train.config import TrainConfig

Batch = tuple[Tensor, Tensor]
"""Images, uint8 (N, C, H, W), and labels, int64 (N,), on the device."""


class UnreadableImageError(ValueError):
    """An image that cannot be read; the message names the file."""


class Source(Protocol):
    """What a training asks of its images.

    Attributes:
        classes: names of the classes.
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        shape: (C, H, W) of an image.
        crop: the square that test images were cut to, as a part of the shorter side; 1 where they are taken whole.
        counts: numbers of training and of test images.
        unreadable: paths of images that were left out so far.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    crop: float
    counts: tuple[int, int]
    unreadable: set[str]

    def train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """Yields the training images with these indices, as the epoch (counted from 0) has them."""

    def test(self) -> Iterator[Batch]:
        """Yields all test images."""

    def close(self) -> None:
        """Ends the processes that read them; the next ones start others."""


class MemorySource:
    """Images held in memory, on the device.

    Args:
        data: With or without test images.
        config: The options; see ``holdout`` and ``validate``.
        device: Where they are kept.
    """

    def __init__(self, data: ImageData, config: TrainConfig, device: torch.device) -> None:
        if data.test_images is None:
            data = _held_out(data, config.holdout)
            mean, std = channel_statistics(data.images)
            data = dataclasses.replace(data, mean=mean, std=std)
        if config.validate:
            data = _held_out(data, config.validate)
        assert data.test_images is not None
        self.classes: tuple[str, ...] = data.classes
        self.mean: tuple[float, ...] = data.mean
        self.std: tuple[float, ...] = data.std
        channels, height, width = data.images.shape[1:]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.crop: float = 1.0
        self.counts: tuple[int, int] = (len(data.images), len(data.test_images))
        self.unreadable: set[str] = set()
        self._data = data.to(device)
        self._device = device
        self._batch_size = config.batch_size

    def train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """Yields the images with these indices."""
        for indices in batches:
            on_device = to_device(indices, self._device)
            yield self._data.images[on_device], self._data.labels[on_device]

    def test(self) -> Iterator[Batch]:
        """Yields all test images."""
        assert self._data.test_images is not None
        assert self._data.test_labels is not None
        parts = (self._data.test_images, self._data.test_labels)
        return zip(*(torch.split(part, self._batch_size) for part in parts), strict=True)

    def close(self) -> None:
        """Does nothing: there are no processes."""


def _held_out(data: ImageData, portion: float) -> ImageData:
    """Returns the data with this part of the training images, drawn at random, as its test images."""
    # not the training's seed: seeds are compared on the same images
    train, test = split(len(data.images), 1 - portion, torch.Generator().manual_seed(0))
    return dataclasses.replace(
        data,
        images=data.images[train],
        labels=data.labels[train],
        test_images=data.images[test],
        test_labels=data.labels[test],
    )


class FolderSource:
    """Images in folders (:mod:`fastnas.data.image_folder`), read as they are needed.

    Args:
        config: The options.
        device: Where batches go.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        from fastnas.data.image_folder import MEAN, STD, TEST_CROP, FolderBatches, ImageFolder

        if config.root is None:
            raise ValueError("root is missing: imagefolder needs root=, the folder with train and val")
        folder = ImageFolder(config.root, config.image_size)
        self.classes: tuple[str, ...] = folder.classes
        self.mean: tuple[float, ...] = MEAN
        self.std: tuple[float, ...] = STD
        self.shape: tuple[int, int, int] = (3, config.image_size, config.image_size)
        self.crop: float = TEST_CROP
        self.counts: tuple[int, int] = (folder.count("train"), folder.count("val"))
        self.unreadable: set[str] = set()
        self._batches = FolderBatches(
            folder,
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=device.type == "cuda",
        )
        self._device = device
        self._skip = config.skip_corrupt

    def train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """Yields the images with these indices, cropped at random; a batch lacks those that cannot be read."""
        return self._usable(lambda: self._batches.train(batches, epoch))

    def test(self) -> Iterator[Batch]:
        """Yields all test images but those that cannot be read."""
        return self._usable(self._batches.test)

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()

    def _usable(self, read: Callable[[], Iterator[tuple[Tensor, Tensor, list[tuple[str, str]]]]]) -> Iterator[Batch]:
        for images, labels, unreadable in read():
            for path, reason in unreadable:
                if not self._skip:
                    raise UnreadableImageError(
                        f"{path} cannot be read as an image ({reason}); repair or remove it, or skip such images "
                        "(--skip_corrupt true)"
                    )
                self.unreadable.add(path)
            yield to_device(images, self._device), to_device(labels, self._device)


def open_source(config: TrainConfig, device: torch.device, data: ImageData | None = None) -> Source:
    """Returns the images that the options name, or ``data`` instead.

    Raises:
        ValueError: where they are not what they should be; the message says what is wrong.
        OSError: where they cannot be read.
    """
    if data is not None:
        return MemorySource(data, config, device)
    if config.data == "imagefolder":
        return FolderSource(config, device)
    return MemorySource(load(config.data, config.root), config, device)
