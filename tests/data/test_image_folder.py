import dataclasses
import io
import multiprocessing
import random
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastnas.data.image_folder import FolderBatches, ImageFolder, _defer_signals, centre_box, crop, random_box, upright
from fastnas.inference import load_model, read_image
from fastnas.train import TrainConfig, TrainFolder, Training

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning",  # of Python 3.12, at each fork
    "ignore:This DataLoader will create:UserWarning",  # on one core
)

CELL = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"


@pytest.fixture
def root(tmp_path):
    """Two classes: eight odd-sized images to train on, four for the test."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (40 + 3 * i, 51 - 7 * label, 3), dtype=np.uint8) + 100 * label
                suffix = ("JPEG", "png")[i % 2]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{suffix}")
    return tmp_path


def config(root, **options):
    return TrainConfig(
        **{
            "genotype": CELL,
            "data": "imagefolder",
            "root": str(root),
            "recipe": "nb201",
            "channels": 4,
            "layers": 1,
            "image_size": 32,
            "batch_size": 3,
            "epochs": 2,
            "workers": 0,
            "jitter": [0.4, 0.4, 0.4, 0.2],
            "device": "cpu",
            **options,
        }
    )


def read(root, workers, epoch=1):
    batches = FolderBatches(ImageFolder(root, 32), 3, seed=7, workers=workers)
    train = list(batches.train([torch.tensor([5, 0, 7]), torch.tensor([2, 3])], epoch))
    again = list(batches.train([torch.tensor([2, 3])], epoch))  # by the same workers
    assert torch.equal(again[0].images, train[1].images)
    return train + list(batches.test())


def test_batches(root):
    folder = ImageFolder(root, 32)
    assert folder.classes == ("cat", "dog")
    assert (folder.count("train"), folder.count("val")) == (8, 4)
    loaded = read(root, 0)
    assert [b.labels.tolist() for b in loaded] == [[1, 0, 1], [0, 0], [0, 0, 1], [1]]
    assert all(b.images.shape[1:] == (3, 32, 32) and b.images.dtype == torch.uint8 for b in loaded)
    first = Image.open(root / "val" / "cat" / "0.JPEG")
    side = 40 * 224 / 256
    box = (25.5 - side / 2, 20 - side / 2, 25.5 + side / 2, 20 + side / 2)
    expected = np.asarray(first.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR, box=box))
    assert np.array_equal(loaded[2].images[0].permute(1, 2, 0).numpy(), expected)


def test_crops_depend_on_seed_epoch_and_image_alone(root):
    alone = read(root, 0)
    workers = read(root, 2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, workers, strict=True))
    other = read(root, 0, epoch=2)
    assert not torch.equal(alone[0].images, other[0].images)
    assert torch.equal(alone[2].images, other[2].images)


def test_batches_are_asked_for_one_by_one(root):
    """An epoch's list of images would take seconds for a large data set."""
    asked = []
    batches = (asked.append(i) or torch.tensor([i]) for i in range(8))
    next(FolderBatches(ImageFolder(root, 32), 1, seed=7).train(batches, 0))
    assert asked == [0]


def _wait(ready):
    _defer_signals(0)
    ready.set()
    while True:
        time.sleep(1)


def test_workers_outlive_one_signal():
    """The one that a job manager sends to all processes; not those of the main process after it."""
    processes = multiprocessing.get_context("fork")
    ready = processes.Event()
    worker = processes.Process(target=_wait, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    worker.terminate()
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == -signal.SIGTERM


def test_random_boxes():
    chance = random.Random(0)
    areas = []
    for _ in range(500):
        left, upper, right, lower = random_box(640, 480, chance)
        assert 0 <= left < right <= 640
        assert 0 <= upper < lower <= 480
        assert 3 / 4 * 0.97 <= (right - left) / (lower - upper) <= 4 / 3 * 1.03
        areas.append((right - left) * (lower - upper) / (640 * 480))
    assert min(areas) >= 0.079
    assert max(areas) > 0.85
    assert random_box(1000, 10, chance) == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))
    assert centre_box(512, 256, 7 / 8) == (144, 16, 368, 240)


def test_large_jpegs_are_decoded_smaller():
    ramp = np.linspace(0, 255, 640 * 900).reshape(640, 900).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=95)
    with Image.open(file) as image:
        shrunk = crop(upright(image), (100, 37, 899, 640), 50)
        assert image.size == (113, 80)  # an eighth
    expected = Image.fromarray(ramp).convert("RGB").resize((50, 50), Image.Resampling.BILINEAR, box=(100, 37, 899, 640))
    difference = shrunk.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 3


def test_a_model_predicts_from_what_it_was_tested_on(root, tmp_path):
    colours = np.random.default_rng(1).integers(0, 99, (90, 70, 3), dtype=np.uint8)
    colours[:45] += 99
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colours).save(root / "val" / "cat" / "turned.jpg", exif=turned)
    Image.fromarray(colours).save(root / "val" / "cat" / "damaged.jpg", dpi=(72, 72), exif=b"Exif\0\0no Exif at all")
    Image.fromarray(colours[..., 0].astype(np.uint16) << 8).save(root / "val" / "cat" / "deep.png")
    (root / "val" / "cat" / "._turned.jpg").write_bytes(b"what macOS leaves beside a file")
    training = Training(config(root, epochs=1))
    training.run()
    model = load_model(TrainFolder(tmp_path).finish(training))
    images = [image for batch in FolderBatches(ImageFolder(root, 32), 3, seed=0).test() for image in batch.images]
    paths = sorted((root / "val" / "cat").glob("[!.]*")) + sorted((root / "val" / "dog").glob("*"))
    assert len(paths) == len(images) == 7
    read = [read_image(path, 3, model.image_size, model.crop) for path in paths]
    assert all(torch.equal(a, b) for a, b in zip(read, images, strict=True))
    deep, upright = (images[paths.index(root / "val" / "cat" / name)].float() for name in ("deep.png", "turned.jpg"))
    assert upright[..., 18:].mean() > upright[..., :14].mean() + 80  # what is above in the file is on the right
    assert deep.mean() < 150


def test_training_resumes_with_other_workers(root):
    whole = Training(config(root))
    assert whole.steps_per_epoch == 3
    whole.run()
    first = Training(config(root))
    first.run(on_step=lambda t: t.step == 2 and t.stop())
    second = Training(config(root, workers=2))
    second.load_state_dict(first.state_dict())
    second.run()
    assert not multiprocessing.active_children()
    ours, expected = second.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_unreadable_images(root):
    broken = root / "train" / "dog" / "2.JPEG"
    broken.write_bytes(broken.read_bytes()[:400])
    (root / "val" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/dog/2\.JPEG cannot be read as an image \(.*skip such"):
        Training(config(root)).run()
    stopped = Training(config(root, batch_size=2))
    training = Training(config(root, skip_corrupt=True, batch_size=2))
    training.load_state_dict(stopped.state_dict())  # as the message says
    training.run()
    assert {path.rpartition("/")[2] for path in training.source.unreadable} == {"2.JPEG", "1.png"}
    assert training.history[-1].top1 in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    for file in (root / "val").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 4 test images could be read"):
        Training(config(root, skip_corrupt=True)).run()


def test_folders_that_are_wrong(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder; expected ROOT/train"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="root is missing: imagefolder needs"):
        Training(dataclasses.replace(config(root), root=None))
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(ValueError, match=r"train has the class 'dog' and .*val has not \(2 and 2 classes"):
        ImageFolder(root)
    (root / "val" / "wolf").rename(root / "val" / "dog")
    (root / "train" / "empty").mkdir()
    (root / "val" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train/empty holds no image"):
        ImageFolder(root)
    for part in ("train", "val"):
        (root / part / "empty").rmdir()
        (root / part / "dog").rename(root / f"{part}-dog")
    with pytest.raises(ValueError, match="has one class, 'cat'"):
        ImageFolder(root)
    (root / "val").rename(root / "test")
    with pytest.raises(FileNotFoundError, match="val is missing; expected"):
        ImageFolder(root)
