import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from fastnas.data import ImageData, augment, normalize
from fastnas.runs.checkpoint import CheckpointError
from fastnas.runs.machine import DivergenceError
from fastnas.train import TrainConfig, TrainFolder, Training
from fastnas.train.loop import CHECKPOINTS

CELL = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"


def state(training):
    return {**training.network.state_dict(), **_momenta(training)}


def _momenta(training):
    state = training.state_dict()["optimizer"]["state"]
    return {f"momentum {i}": s["momentum_buffer"] for i, s in state.items()}


def numbers(training):
    return [dataclasses.replace(record, seconds=0) for record in training.history]


def test_a_step_is_the_published_one(noise):
    """Label smoothing, auxiliary loss, clipping and SGD, computed apart."""
    config = TrainConfig(
        genotype="DARTS_V2",
        data="npz",
        recipe="cifar",
        channels=2,
        layers=3,
        batch_size=21,
        epochs=2,
        label_smoothing=0.1,
        drop_path=0.0,
        clip=0.7,
        pad=0,
        flip=False,
        cutout=0,
        device="cpu",
    )
    training = Training(config, data=noise)
    twin = copy.deepcopy(training.network).double().train()
    (batch,) = training._batches(0)
    images, labels = noise.images[batch], noise.labels[batch]
    with torch.no_grad():
        assert torch.equal(batch.sort().values, torch.arange(21))
    training.network.train()
    training._update(images, labels)

    logits, auxiliary = twin(normalize(images, noise.mean, noise.std).double())
    target = 0.9 * F.one_hot(labels, 3).double() + 0.1 / 3
    main, second = (-(target * x.log_softmax(1)).sum(1).mean() for x in (logits, auxiliary))
    loss = main + 0.4 * second
    loss.backward()
    assert training.progress()["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert training.progress()["train_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in twin.parameters()))
    assert norm > 0.7  # clipping does something
    trained = dict(training.network.named_parameters())
    for name, p in twin.named_parameters():
        expected = p - 0.025 * (p.grad * 0.7 / norm + 3e-4 * p)
        torch.testing.assert_close(trained[name].double(), expected, rtol=1e-4, atol=2e-6)


def test_accumulated_parts_are_a_mean(noise):
    """Without batch norm's statistics in between there would be no difference; with them, each part has its own."""
    base = {"genotype": CELL, "data": "npz", "recipe": "nb201", "channels": 4, "layers": 1, "batch_size": 21}
    base |= {"epochs": 1, "pad": 0, "flip": False, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    base |= {"device": "cpu"}
    training = Training(TrainConfig(**base, accumulate=2), data=noise)
    twin = copy.deepcopy(training.network).train()
    training.network.train()
    training._update(noise.images, noise.labels)
    x = normalize(noise.images, noise.mean, noise.std)
    for part, labels in zip(x.tensor_split(2), noise.labels.tensor_split(2), strict=True):
        (F.cross_entropy(twin(part), labels, reduction="sum") / 21).backward()
    for ours, theirs in zip(training.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-4, atol=1e-6)


def test_batches_that_lack_images(noise):
    """Parts have two images or more, however few could be read; one image alone is no batch."""
    options = {"genotype": CELL, "data": "npz", "recipe": "nb201", "channels": 4, "layers": 1, "device": "cpu"}
    training = Training(TrainConfig(**options, batch_size=8, accumulate=4), data=noise)
    training.network.train()
    seen = []
    training.network.register_forward_pre_hook(lambda network, args: seen.append(len(args[0])))
    for n in (8, 5, 3, 1, 0):
        training._update(noise.images[:n], noise.labels[:n])
    assert seen == [2, 2, 2, 2, 3, 2, 3]
    assert training._totals[2] == 16


def test_history(tiny, digits):
    training = Training(tiny, data=digits)
    seen = []
    assert training.run(on_step=lambda t: seen.append((t.epoch, t.step, t.network.drop_path)))
    assert seen == [(e, s, 0.2 * e) for e in (0, 1) for s in (1, 2, 3, 4)]  # 0.4 * epoch / 2
    assert [r.epoch for r in training.history] == [1, 2]
    assert [r.drop_path for r in training.history] == [0.0, 0.2]
    assert [r.lr for r in training.history] == pytest.approx([0.1, 0.05])

    logits = training.network.eval()(normalize(digits.test_images, digits.mean, digits.std))
    last = training.history[-1]
    assert last.test_loss == pytest.approx(F.cross_entropy(logits, digits.test_labels).item(), rel=1e-4)
    ranks = (logits.argsort(1, descending=True) == digits.test_labels[:, None]).nonzero()[:, 1]
    assert (last.top1, last.top5) == ((ranks < 1).double().mean().item(), (ranks < 5).double().mean().item())


def test_what_is_dropped_does_not_depend_on_what_is_cropped(tiny, digits, monkeypatch):
    training, seeds = Training(tiny, data=digits), []

    def spy(*args, **kwargs):
        seeds.append(args[4].initial_seed())
        return augment(*args, **kwargs)

    monkeypatch.setattr("fastnas.train.loop.augment", spy)
    training.network.register_forward_pre_hook(lambda network, args: seeds.append(torch.initial_seed()))
    training.run(on_step=lambda t: t.step == 2 and t.stop())
    assert len(set(seeds)) == len(seeds) == 4


def test_the_same_seed_gives_the_same_bits_and_leaves_chance_alone(tiny, digits):
    trainings = [Training(dataclasses.replace(tiny, seed=seed), data=digits) for seed in (3, 3, 4)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for training in trainings:
        training.run()
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        before = torch.get_rng_state()
    first, second, other = (state(t) for t in trainings)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert numbers(trainings[0]) == numbers(trainings[1])


@pytest.mark.parametrize(("kind", "stop"), [("darts", (0, 3)), ("nb201", (1, 1)), ("nb201", (0, 4))])
def test_stopped_and_resumed(kind, stop, noise, tmp_path):
    options = {"genotype": CELL, "recipe": "nb201", "channels": 4, "layers": 1}
    if kind == "darts":
        options = {"genotype": "DARTS_V1", "recipe": "imagenet", "stem": "cifar", "channels": 2, "layers": 3}
        options |= {"drop_path": 0.5, "cutout": 8, "pad": 2, "amp": "bf16"}
    config = TrainConfig(data="npz", batch_size=5, epochs=2, accumulate=2, device="cpu", **options)
    whole = Training(config, data=noise)
    assert whole.steps_per_epoch == 4  # of 21 images; the last one alone is left out
    whole.run()

    first = Training(config, data=noise)
    finished = first.run(on_step=lambda t: (t.epoch, t.step) == stop and t.stop())
    assert not finished
    CHECKPOINTS.save(tmp_path / "c.pt", first.state_dict())
    torch.manual_seed(5)
    second = Training(config, data=noise)
    second.load_state_dict(CHECKPOINTS.load(tmp_path / "c.pt"))
    assert second.run()
    ours, expected = state(second), state(whole)
    assert all(torch.equal(ours[k], expected[k]) for k in expected)
    assert numbers(second) == numbers(whole)


def test_checkpoints_of_others(tiny, digits, tmp_path):
    training = Training(tiny, data=digits)
    with pytest.raises(CheckpointError, match=r"of a training with lr=0\.1, this one has lr=0\.2"):
        Training(dataclasses.replace(tiny, lr=0.2), data=digits).load_state_dict(training.state_dict())
    older = training.state_dict()
    del older["config"]["lr_decay"]
    with pytest.raises(CheckpointError, match="from before there was the option lr_decay; resume with the release"):
        training.load_state_dict(older)
    torch.save({"format": "fastnas search checkpoint", "version": 2, "state": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a fastnas training"):
        TrainFolder(tmp_path).resume(training)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*; start the training anew"):
        TrainFolder(tmp_path).resume(training)


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (".checkpoint.pt.123.tmp", ".mine.tmp"):
        (tmp_path / name).touch()
    with TrainFolder(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".mine.tmp"]


def test_divergence_is_named_and_never_saved(tiny, digits, tmp_path):
    config = dataclasses.replace(tiny, lr=1e30, clip=0.0, checkpoint_every=1e-9)
    training = Training(config, data=digits)
    with TrainFolder(tmp_path) as folder:
        folder.start(config)
        folder.save(training)
        with pytest.raises(DivergenceError, match=r"not a finite number in epoch 1, step \d; the last checkpoint"):
            training.run(on_checkpoint=folder.save)
    kept = CHECKPOINTS.load(tmp_path / "checkpoint.pt")["network"]
    assert all(torch.isfinite(t).all() for t in kept.values())


def test_data_without_test_images(digits):
    whole = dataclasses.replace(digits, test_images=None, test_labels=None)
    sources = [
        Training(
            TrainConfig(genotype=CELL, channels=4, layers=1, holdout=0.25, seed=seed, device="cpu"), data=whole
        ).source
        for seed in (0, 1)
    ]
    assert sources[0].counts == (48, 16)
    (first, _), (second, _) = (next(s.test()) for s in sources)
    assert torch.equal(first, second)
    trained = {x.numpy().tobytes() for x in sources[0]._data.images}
    assert sum(x.numpy().tobytes() in trained for x in first) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "cifar"}, "auxiliary=0.4 with images of 8x8: that head wants 32x32"),
        ({"stem": "imagenet"}, "the images are 8x8: the network wants multiples of 32"),
        ({"jitter": [0.1, 0.1, 0.1, 0.1]}, "with images of 1 channels"),
    ],
)
def test_images_that_do_not_fit(tiny, digits, options, message):
    given = {"genotype": "DARTS_V2", "channels": 4, "layers": 3, "epochs": 1, "device": "cpu", **options}
    with pytest.raises(ValueError, match=message):
        Training(TrainConfig(**given), data=digits)


def test_images_are_squares(tiny, digits):
    narrow = dataclasses.replace(digits, images=digits.images[..., 4:], test_images=digits.test_images[..., 4:])
    with pytest.raises(ValueError, match="the images are 8x4: crop or pad them to squares"):
        Training(tiny, data=narrow)


def test_size_leaves_the_auxiliary_head_out():
    config = TrainConfig(genotype="DARTS_V2", recipe="cifar", data="npz", device="cpu")
    assert config.auxiliary == 0.4
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    data = ImageData("npz", images, labels, tuple(map(str, range(10))), (0.5,) * 3, (0.2,) * 3, images, labels)
    assert Training(config, data=data).size.parameters == 3_349_342  # 3.3 million, DARTS' table 1
