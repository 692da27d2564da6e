"""Labelled images held in memory, and the readers that make them."""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import cifar

DATASETS = ("digits", "cifar10", "cifar100", "npz")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of images, whole, in memory.

    Attributes:
        name: what `load` was asked for.
        images: uint8 (N, C, H, W), the training images.
        labels: int64 (N,), each from 0 to len(classes) - 1.
        classes: the names of the classes.
        mean: per channel, of the training images scaled to [0, 1].
        std: likewise.
        test_images: uint8 (M, C, H, W), or None for a data set without a test part.
        test_labels: int64 (M,), or None.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_images: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("test_images and test_labels: give both or neither")
        _check_part("images", self.images, "labels", self.labels, len(self.classes))
        if self.test_images is not None and self.test_labels is not None:
            _check_part("test_images", self.test_images, "test_labels", self.test_labels, len(self.classes))
            if self.test_images.shape[1:] != self.images.shape[1:]:
                raise ValueError(
                    f"test_images are {tuple(self.test_images.shape[1:])} and images {tuple(self.images.shape[1:])}; "
                    "they must have the same channels and size"
                )
        channels = self.images.shape[1]
        for argument in ("mean", "std"):
            if len(getattr(self, argument)) != channels:
                raise ValueError(f"{argument} needs one value for each of the {channels} channels")

    def to(self, device: torch.device | str) -> ImageData:
        """Returns the same data on `device`."""
        tensors: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


def _check_part(images_name: str, images: Tensor, labels_name: str, labels: Tensor, classes: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"{images_name} must be uint8 (N, C, H, W) and not empty, not {images.dtype} {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{labels_name} must be int64 ({len(images)},), one for each image, "
            f"not {labels.dtype} {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{labels_name} must be from 0 to {classes - 1}, the number of classes less one; found {low} to {high}"
        )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the (population) standard deviation of each channel, of images scaled to [0, 1].

    A constant channel gets the standard deviation 1, so that normalising with it is always possible.

    Args:
        images: uint8 (N, C, H, W).
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        # 256 counts give exact sums, without a floating-point copy of the images.
        share = torch.bincount(channel.flatten().cpu(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        variance = float(share @ (values - mean) ** 2)
        means.append(mean)
        stds.append(variance**0.5 if int((share > 0).sum()) > 1 else 1.0)
    return tuple(means), tuple(stds)


def load(name: str, root: str | os.PathLike[str] | None = None, *, allow_partial: bool = False) -> ImageData:
    """Returns the data set called `name`.

    * `digits`: the 1,797 handwritten digits that scikit-learn carries, 1×8×8, without a test part. No root.
    * `cifar10`, `cifar100`: 50,000 + 10,000 images, 3×32×32, from the official python or binary version.
    * `npz`: your own, with the arrays `x_train`, uint8 (N, H, W) or (N, H, W, C), `y_train`, integers (N,), and
      optionally `x_test`, `y_test`.

    Nothing that a file contains is executed, and nothing is extracted to disk.

    Args:
        name: one of `DATASETS`.
        root: the .npz file; or CIFAR's archive, the folder it extracts to, or a folder with either in it.
        allow_partial: accept CIFAR files that hold fewer images than the official ones.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: an unknown name, or files that are damaged, cut short or of the wrong content.
    """
    if name == "digits":
        return _digits()
    if name not in DATASETS:
        raise ValueError(f"name={name!r} is no data set; choose one of {', '.join(DATASETS)}")
    if root is None:
        hint = "the .npz file" if name == "npz" else f"a folder with {cifar.ARCHIVES[name]} (from {cifar.SOURCE})"
        raise ValueError(f"root is missing: {name} needs root=, the path of {hint}")
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"root={str(path)!r} does not exist")
    if name == "npz":
        return _npz(path)
    train, test = cifar.read(name, path, allow_partial)
    return ImageData(
        name=name,
        images=torch.from_numpy(train[0]),
        labels=torch.from_numpy(train[1]),
        classes=cifar.CLASSES[name],
        mean=cifar.MEAN[name],
        std=cifar.STD[name],
        test_images=torch.from_numpy(test[0]),
        test_labels=torch.from_numpy(test[1]),
    )


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Strokes are counted from 0 to 16 in the source.
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None])
    mean, std = channel_statistics(images)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return ImageData("digits", images, labels, tuple("0123456789"), mean, std)


def _npz(path: Path) -> ImageData:
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise ValueError("it holds a single array; write it with numpy.savez(path, x_train=..., y_train=...)")
            for key in ("x_train", "y_train", "x_test", "y_test"):
                if key in content.files:
                    arrays[key] = content[key]
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    for key in ("x_train", "y_train"):
        if key not in arrays:
            raise ValueError(
                f"{path} has no array {key!r}; it needs x_train and y_train (and x_test, y_test for a test part)"
            )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{path} has only one of x_test and y_test; it needs both or neither")

    labels = {
        part: _labels(path, f"y_{part}", arrays[f"y_{part}"]) for part in ("train", "test") if f"y_{part}" in arrays
    }
    images = {part: _images(path, f"x_{part}", arrays[f"x_{part}"]) for part in labels}
    mean, std = channel_statistics(images["train"])
    classes = 1 + max(int(part.max()) for part in labels.values())
    try:
        return ImageData(
            name="npz",
            images=images["train"],
            labels=labels["train"],
            classes=tuple(map(str, range(classes))),
            mean=mean,
            std=std,
            test_images=images.get("test"),
            test_labels=labels.get("test"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _images(path: Path, key: str, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(
            f"{path}: {key} must be uint8 (N, H, W) or (N, H, W, C) and not empty, not {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.reshape(*array.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()


def _labels(path: Path, key: str, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1 or array.size == 0 or array.min() < 0:
        raise ValueError(f"{path}: {key} must hold one integer ≥ 0 for each image, not {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.int64))
