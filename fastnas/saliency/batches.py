"""The mini-batch that scores look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.data import DATASETS, ImageData, load, normalize
from fastnas.saliency._registry import Batch

SOURCES = ("noise", *DATASETS)
"""Where a batch may come from; ``noise`` is normally distributed pixels under random labels, and needs no files."""


@dataclass(frozen=True)
class BatchSource:
    """Mini-batches, one a seed.

    Attributes:
        size: Images in a batch.
        per_class: Draw equally many of each class (GraSP's own batches); ``size`` is then a multiple of the classes.
        data: The data set, or None for noise.
        shape: (C, H, W) of an image.
        classes: Number of labels.
    """

    size: int
    per_class: bool
    data: ImageData | None
    shape: tuple[int, int, int]
    classes: int

    @classmethod
    def open(
        cls,
        data: str = "noise",
        root: str | os.PathLike[str] | None = None,
        size: int = 64,
        *,
        per_class: bool = False,
        image_size: int = 32,
        classes: int = 10,
    ) -> BatchSource:
        """Returns the source called ``data``, one of :data:`SOURCES`.

        Args:
            data: ``noise``, or a data set of :func:`fastnas.data.load`.
            root: Where the data set lies.
            size: Images in a batch.
            per_class: Equally many images of each class.
            image_size: Height and width of noise; a data set has its own.
            classes: Number of classes of noise.

        Raises:
            ValueError: for an unknown source, or sizes that don't fit it.
            FileNotFoundError: where the data set's files are not there.
        """
        if data not in SOURCES:
            raise ValueError(f"data={data!r}: expected one of {', '.join(SOURCES)}")
        images = None if data == "noise" else load(data, root)
        shape = (3, image_size, image_size) if images is None else tuple(images.images.shape[1:])
        classes = classes if images is None else len(images.classes)
        if min(size, image_size, classes) < 1 or (images is not None and size > len(images.images)):
            most = "" if images is None else f" and at most {len(images.images)}, the images there are"
            raise ValueError(f"batch_size={size}, image_size={image_size}: each must be at least 1{most}")
        if per_class and size % classes:
            raise ValueError(
                f"batch_size={size} must be a multiple of the {classes} classes to hold each equally often"
            )
        return cls(size, per_class, images, (shape[0], shape[1], shape[2]), classes)

    def draw(self, seed: int) -> Batch:
        """Returns the batch of ``seed``; images are normalised by the data set's mean and standard deviation.

        Raises:
            ValueError: where a class has too few images.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.data is None:
            images = torch.randn((self.size, *self.shape), generator=generator)
            if self.per_class:
                return Batch(images, torch.arange(self.size) % self.classes)
            return Batch(images, torch.randint(self.classes, (self.size,), generator=generator))
        if self.per_class:
            chosen = torch.cat(list(self._of_each_class(self.data, generator)))
        else:
            chosen = torch.randperm(len(self.data.images), generator=generator)[: self.size]
        return Batch(normalize(self.data.images[chosen], self.data.mean, self.data.std), self.data.labels[chosen])

    def _of_each_class(self, data: ImageData, generator: torch.Generator) -> Iterator[Tensor]:
        each = self.size // self.classes
        for c in range(self.classes):
            members = (data.labels == c).nonzero().flatten()
            if len(members) < each:
                raise ValueError(
                    f"batch_size={self.size}: class {data.classes[c]} has {len(members)} images, not {each}"
                )
            yield members[torch.randperm(len(members), generator=generator)[:each]]
