import csv
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import torch

from fastnas.data import load
from fastnas.inference import load_model
from fastnas.train import TrainConfig, TrainFolder, Training
from fastnas.train.loop import CHECKPOINTS

KILLS = 3


def _go_on(path, npz, started):
    """Runs the training in a folder from where it is to its end."""
    torch.set_num_threads(1)
    config = TrainConfig(
        genotype="DARTS_V2",
        data="npz",
        root=npz,
        recipe="digits",
        channels=4,
        layers=3,
        batch_size=16,
        epochs=4,
        drop_path=0.3,
        pad=1,
        cutout=3,
        device="cpu",
        threads=1,
        checkpoint_every=0.02,
    )
    training, folder = Training(config), TrainFolder(path)
    if (folder.path / "checkpoint.pt").exists():
        folder.resume(training)
    else:
        folder.start(config, overwrite=True)
    started.set()
    with folder:
        training.run(on_epoch=folder.record, on_checkpoint=folder.save)
        folder.finish(training)


def _rows(path):
    with (path / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for v in values for tensor in _tensors(v)]


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    digits = load("digits")
    x, y = digits.images[:96, 0].numpy(), digits.labels[:96].numpy()
    np.savez(tmp_path / "digits.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fastnas.train", "torch.utils.tensorboard", "torch._dynamo"])
    moments = random.Random(0)

    def start(path):
        started = processes.Event()
        process = processes.Process(target=_go_on, args=(path, str(tmp_path / "digits.npz"), started))
        process.start()
        assert started.wait(120)
        return process

    whole = start(tmp_path / "whole")
    begin = time.perf_counter()
    whole.join()
    assert whole.exitcode == 0
    seconds = time.perf_counter() - begin

    kills, run, finished = 0, 0, False
    while kills < KILLS or not finished:
        folder = tmp_path / f"killed-{run}"
        process = start(folder)
        if kills < KILLS:
            process.join(moments.uniform(0, seconds / KILLS))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join()
        finished = process.exitcode == 0
        run += finished
    for read in (
        lambda path: CHECKPOINTS.load(path / "checkpoint.pt"),
        lambda path: load_model(path / "best.pt").network.state_dict(),
    ):
        ours, theirs = (_tensors(read(path)) for path in (folder, tmp_path / "whole"))
        assert len(ours) == len(theirs) > 100
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert _rows(folder) == _rows(tmp_path / "whole")
    assert len(_rows(folder)) == 4
