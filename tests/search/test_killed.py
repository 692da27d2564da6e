import csv
import dataclasses
import multiprocessing
import os
import random
import signal
import time

import torch

from fastnas.data import load
from fastnas.search import Search, SearchConfig, checkpoint
from fastnas.search.run import RunFolder

KILLS = 20


def _config():
    """A search with chance everywhere: a progressive one, with Dirichlet samples and dropout."""
    return SearchConfig(
        space="nb201",
        method="drnas-progressive",
        channels=4,
        layers=1,
        batch_size=16,
        stages=[[2, 0, 12, 1], [1, 3, 12, 1]],
        skip_dropout=0.3,
        device="cpu",
        threads=1,
    )


def _search():
    digits = load("digits")
    return Search(_config(), data=dataclasses.replace(digits, images=digits.images[:64], labels=digits.labels[:64]))


def _go_on(path, started):
    """Runs the search in a folder from where it is to its end."""
    torch.set_num_threads(1)
    search, folder = _search(), RunFolder(path)
    if (folder.path / "checkpoint.pt").exists():
        folder.resume(search)
    else:
        folder.start(search.config, overwrite=True)
    started.set()
    with folder:
        search.run(on_epoch=folder.record)


def _rows(path):
    with (path / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in csv.DictReader(file)]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for v in values for tensor in _tensors(v)]


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fastnas.search.run", "sklearn.datasets", "torch._dynamo"])
    moments = random.Random(0)

    def start(path):
        started = processes.Event()
        process = processes.Process(target=_go_on, args=(path, started))
        process.start()
        assert started.wait(120)
        return process

    begin = time.perf_counter()
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
            process.join(moments.uniform(0, 3 * seconds / KILLS))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join()
        finished = process.exitcode == 0
        if finished:
            state, expected = (checkpoint.load(tmp_path / n / "checkpoint.pt") for n in (folder.name, "whole"))
            ours, theirs = _tensors({**state, "totals": 0}), _tensors({**expected, "totals": 0})
            assert len(ours) == len(theirs) > 100
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert _rows(folder) == _rows(tmp_path / "whole")
            assert (folder / "genotype.json").read_bytes() == (tmp_path / "whole" / "genotype.json").read_bytes()
            run += 1
    assert run >= 1
