"""Readers of CIFAR-10 and CIFAR-100 as published.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _unpickle

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
ARCHIVES = {
    "cifar10": "cifar-10-python.tar.gz or cifar-10-binary.tar.gz",
    "cifar100": "cifar-100-python.tar.gz or cifar-100-binary.tar.gz",
}

# Of the training images, scaled to [0, 1]. CIFAR-10: the constants of the DARTS code (arXiv 1806.09055); CIFAR-100:
# those of NAS-Bench-201 (arXiv 2001.00326), which are published out of 255.
MEAN = {
    "cifar10": (0.49139968, 0.48215827, 0.44653124),
    "cifar100": (129.3 / 255, 124.1 / 255, 112.4 / 255),
}
STD = {
    "cifar10": (0.24703233, 0.24348505, 0.26158768),
    "cifar100": (68.2 / 255, 65.4 / 255, 70.4 / 255),
}

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_CIFAR100.split()),
}

_PIXELS = 3 * 32 * 32
_MAX_BYTES = 1 << 28  # the largest official file, CIFAR-100's train, has 155 MB

Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # images (N, 3, 32, 32), labels (N,)


@dataclass(frozen=True)
class _Version:
    """One of the official versions: its names, and the images that each file holds."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    train_images: int  # in each training file
    classes: int
    label_key: str = ""  # python version: the dictionary's key
    label_bytes: int = 0  # binary version: a record's bytes before the pixels; the last of them is the label

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_VERSIONS = {
    "cifar10": (
        _Version(
            folder="cifar-10-batches-py",
            archive="cifar-10-python.tar.gz",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test="test_batch",
            train_images=10_000,
            classes=10,
            label_key="labels",
        ),
        _Version(
            folder="cifar-10-batches-bin",
            archive="cifar-10-binary.tar.gz",
            train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test="test_batch.bin",
            train_images=10_000,
            classes=10,
            label_bytes=1,
        ),
    ),
    "cifar100": (
        _Version(
            folder="cifar-100-python",
            archive="cifar-100-python.tar.gz",
            train=("train",),
            test="test",
            train_images=50_000,
            classes=100,
            label_key="fine_labels",
        ),
        _Version(
            folder="cifar-100-binary",
            archive="cifar-100-binary.tar.gz",
            train=("train.bin",),
            test="test.bin",
            train_images=50_000,
            classes=100,
            label_bytes=2,
        ),
    ),
}


def read(name: str, root: Path, allow_partial: bool = False) -> tuple[Part, Part]:
    """Returns the training part and the test part of `name`, "cifar10" or "cifar100".

    Args:
        name: which of the two.
        root: an official archive, the folder that it extracts to, or a folder with either in it.
        allow_partial: accept files that hold fewer images than the official ones.

    Raises:
        FileNotFoundError: nothing of the data set is at `root`, or one of its files is missing.
        ValueError: a file is damaged, cut short, or holds something else.
    """
    versions = _VERSIONS[name]
    parts: dict[str, Part] = {}
    place, files = _locate(root, versions)
    for file, raw in files:
        version = next(version for version in versions if file in version.files)
        where = f"{place}/{file}" if place.is_dir() else f"{file} in {place}"
        parts[file] = _decode(raw, version, where)
        expected = 10_000 if file == version.test else version.train_images
        found = len(parts[file][1])
        if found > expected or (found < expected and not (allow_partial and found)):
            raise ValueError(
                f"{where} holds {found:,} images where the official file has {expected:,}; get it again from {SOURCE}"
                ", or pass allow_partial=True if a part of the images is what you want"
            )
    version = max(versions, key=lambda version: sum(file in parts for file in version.files))
    missing = [file for file in version.files if file not in parts]
    if missing:
        raise FileNotFoundError(f"{place} has no {', '.join(missing)} of {name}; get {version.archive} from {SOURCE}")
    train = [parts[file] for file in version.train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return (images, labels), parts[version.test]


def _locate(root: Path, versions: tuple[_Version, ...]) -> tuple[Path, Iterator[tuple[str, bytes]]]:
    """Returns the folder or archive to read, and its data files as they are read, `(file name, content)`."""
    if root.is_file():
        return root, _archive_files(root, versions)
    for version in versions:
        for folder in (root / version.folder, root):
            if any((folder / file).is_file() for file in version.files):
                return folder, _folder_files(folder, version)
    for version in versions:
        if (root / version.archive).is_file():
            return root / version.archive, _archive_files(root / version.archive, versions)
    wanted = ", ".join(part for version in versions for part in (version.folder, version.archive))
    raise FileNotFoundError(f"root={str(root)!r} has none of {wanted}; get an archive from {SOURCE}")


def _folder_files(folder: Path, version: _Version) -> Iterator[tuple[str, bytes]]:
    for file in version.files:
        path = folder / file
        if path.is_file():
            _check_size(path.stat().st_size, str(path))
            yield file, path.read_bytes()


def _archive_files(archive: Path, versions: tuple[_Version, ...]) -> Iterator[tuple[str, bytes]]:
    wanted = {file for version in versions for file in version.files}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                file = PurePosixPath(member.name).name
                if file in wanted and member.isreg():
                    _check_size(member.size, f"{file} in {archive}")
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file has content
                    yield file, content.read()
            # To the very end, where the compressed stream's checksum is.
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{archive} is not a whole tar archive ({' '.join(str(error).split())}); it may be cut short: "
            f"get it again from {SOURCE}"
        ) from error


def _check_size(size: int, where: str) -> None:
    if size > _MAX_BYTES:
        raise ValueError(f"{where} has {size:,} bytes, far more than any CIFAR file; get it again from {SOURCE}")


def _decode(raw: bytes, version: _Version, where: str) -> Part:
    """Returns the images and labels of one file."""
    data: Any
    labels: Any
    if version.label_bytes:
        record = version.label_bytes + _PIXELS
        if not raw or len(raw) % record:
            raise ValueError(
                f"{where} has {len(raw):,} bytes, which is no whole number of {record}-byte records; "
                f"it may be cut short: get it again from {SOURCE}"
            )
        records = np.frombuffer(raw, np.uint8).reshape(-1, record)
        data, labels = records[:, version.label_bytes :], records[:, version.label_bytes - 1]
    else:
        try:
            content = _unpickle.read_dict(raw)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{where} cannot be read: {error}; get it again from {SOURCE}") from error
        missing = [key for key in ("data", version.label_key) if key not in content]
        if missing:
            raise ValueError(f"{where} has no {' and no '.join(missing)}: is it a file of {version.folder}?")
        data, labels = content["data"], content[version.label_key]
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
            raise ValueError(f"{where}: data is not a uint8 array of {_PIXELS} columns; get it again from {SOURCE}")
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()
        if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(data):
            raise ValueError(f"{where}: {version.label_key} is not one whole number for each of the {len(data)} images")
    bad = [label for label in labels if not 0 <= label < version.classes]
    if bad:
        raise ValueError(
            f"{where} has the label {bad[0]}, outside 0 to {version.classes - 1}; it is damaged or of another data "
            f"set: get it again from {SOURCE}"
        )
    return data.reshape(-1, 3, 32, 32).copy(), np.array(labels, np.int64)
