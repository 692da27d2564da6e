"""The embedded digits, .npz files, and ImageData's checks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.data import DATASETS, ImageData, channel_statistics, load


def test_digits():
    from sklearn.datasets import load_digits

    source = load_digits()
    data = load("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.test_images is data.test_labels is None
    assert data.labels.tolist() == source.target.tolist()
    assert (int(data.images.min()), int(data.images.max())) == (0, 255)
    # The 17 levels stay apart, in order, and at equal distances to within rounding.
    levels = torch.tensor([round(v * 255 / 16) for v in range(17)])
    assert torch.equal(data.images[:, 0].long(), levels[torch.from_numpy(source.images).long()])
    scaled = data.images.double() / 255
    assert data.mean == pytest.approx([float(scaled.mean())], abs=1e-12)
    assert data.std == pytest.approx([float(scaled.std(correction=0))], abs=1e-12)
    assert data.classes == tuple("0123456789")


def test_import_needs_no_sklearn():
    code = "import sys, fastnas.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_channel_statistics():
    images = torch.randint(256, (5, 3, 7, 6), generator=torch.Generator().manual_seed(0)).byte()
    images[:, 2] = 51
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std[:2] == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist()[:2], abs=1e-12)
    assert std[2] == 1.0  # a constant channel can be normalised


def test_names_and_roots(tmp_path):
    with pytest.raises(ValueError, match=r"name='mnist'.*digits, cifar10, cifar100, npz"):
        load("mnist")
    for name in set(DATASETS) - {"digits"}:
        with pytest.raises(ValueError, match=f"root is missing: {name} needs root="):
            load(name)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(name, tmp_path / "nowhere")


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz(tmp_path, channels):
    rng = np.random.default_rng(0)
    tail = () if channels is None else (channels,)
    x, y = rng.integers(0, 256, (6, 5, 4, *tail), dtype=np.uint8), np.array([0, 3, 1, 2, 0, 0], np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y)
    data = load("npz", tmp_path / "a.npz")
    assert torch.equal(data.images, torch.from_numpy(x.reshape(6, 5, 4, -1).transpose(0, 3, 1, 2).copy()))
    assert data.images.is_contiguous()
    assert data.labels.tolist() == y.tolist()
    assert data.classes == ("0", "1", "2", "3")
    assert data.test_images is None
    assert (data.mean, data.std) == channel_statistics(data.images)

    np.savez_compressed(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x[:2], y_test=np.array([5, 0], np.int32))
    data = load("npz", str(tmp_path / "b.npz"))
    assert data.test_labels.tolist() == [5, 0]
    assert torch.equal(data.test_images, data.images[:2])
    assert len(data.classes) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "has no array 'x_train'"),
        ({"y_train": None}, "has no array 'y_train'"),
        ({"x_test": np.zeros((1, 4, 4), np.uint8)}, "only one of x_test and y_test"),
        ({"x_train": np.zeros((3, 4, 4), np.float32)}, "x_train must be uint8"),
        ({"x_train": np.zeros((3, 4), np.uint8)}, "x_train must be uint8"),
        ({"x_train": np.zeros((0, 4, 4), np.uint8)}, "x_train must be uint8 .* not empty"),
        ({"x_train": np.zeros((2, 4, 4), np.uint8)}, "one for each image"),
        ({"y_train": np.array([0.0, 1.0, 2.0])}, "y_train must hold one integer"),
        ({"y_train": np.array([0, -1, 2])}, "y_train must hold one integer"),
        ({"y_train": np.zeros((3, 1), np.int64)}, "y_train must hold one integer"),
        ({"y_train": np.array(["cat", "dog", "cow"], object)}, "cannot be read as .npz: Object arrays"),
        ({"x_test": np.zeros((1, 4, 5), np.uint8), "y_test": np.array([0])}, "same channels and size"),
    ],
)
def test_npz_errors_name_the_file_and_the_array(tmp_path, change, message):
    arrays = {"x_train": np.zeros((3, 4, 4), np.uint8), "y_train": np.arange(3), **change}
    np.savez(tmp_path / "bad.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        load("npz", tmp_path / "bad.npz")


def test_npz_damaged(tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, x_train=np.zeros((3, 4, 4), np.uint8), y_train=np.arange(3))
    raw = path.read_bytes()
    for damaged in (b"", raw[:-30], b"not an archive"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut\.npz cannot be read"):
            load("npz", path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"numpy\.savez"):
        load("npz", tmp_path / "one.npy")


def test_npz_of_real_images():
    path = Path(__file__).parents[3] / "shared/data/cifar10/cifar10_small_rgb.npz"
    if not path.exists():
        pytest.skip("no CIFAR-10 images here")
    data = load("npz", path)
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.test_images.shape == (2000, 3, 32, 32)
    assert data.labels.bincount().tolist() == [1000] * 10
    with np.load(path) as file:
        assert np.array_equal(data.images[7, 1].numpy(), file["x_train"][7, :, :, 1])


def good():
    return {
        "name": "mine",
        "images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 0]),
        "classes": ("a", "b"),
        "mean": (0.5,),
        "std": (0.5,),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 1, 4, 4)}, "images must be uint8"),
        ({"labels": torch.tensor([0, 1])}, "labels must be int64"),
        ({"labels": torch.tensor([0, 2, 0])}, "labels must be from 0 to 1.*0 to 2"),
        ({"labels": torch.tensor([0, -1, 0])}, "labels must be from 0 to 1"),
        ({"test_images": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, "give both or neither"),
        ({"mean": (0.1, 0.2)}, "mean needs one value"),
        ({"std": ()}, "std needs one value"),
    ],
)
def test_image_data_checks(change, message):
    ImageData(**good())
    with pytest.raises(ValueError, match=message):
        ImageData(**good() | change)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
        ),
    ],
)
def test_to_device(device):
    data = ImageData(**good())
    moved = data.to(device)
    assert moved.images.device.type == moved.labels.device.type == device
    assert torch.equal(moved.images.cpu(), data.images)
    assert moved.test_images is None
    assert (moved.mean, moved.classes) == (data.mean, data.classes)
    assert data.images.device.type == "cpu"
