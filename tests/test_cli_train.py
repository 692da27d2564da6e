import csv
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnas.cli import _advice, main
from fastnas.data import load
from fastnas.inference.model_file import load_model
from fastnas.train.loop import CHECKPOINTS

TINY = ["train", "--genotype=DARTS_V2", "--channels=4", "--layers=3", "--batch-size=16", "--device=cpu"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    digits = load("digits")
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    x, y = digits.images[:96, 0].numpy(), digits.labels[:96].numpy()
    np.savez(path, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return path


@pytest.fixture(scope="module")
def tiny(npz):
    return [*TINY, "--data=npz", f"--root={npz}", "--recipe=digits", "--epochs=2"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*tiny, "--out", str(folder)]) == 0
    return folder


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def network(folder):
    return CHECKPOINTS.load(folder / "checkpoint.pt")["network"]


def test_digits(tmp_path, capsys):
    out = tmp_path / "run [a]"
    assert main([*TINY, "--epochs=2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"run folder {out}" in lines
    assert f"in {out}: model.pt, checkpoint.pt, best.pt, metrics.csv, config.yaml" in lines
    assert "1,437 images train, 360 test; augmentation: pad 1" in lines
    assert re.fullmatch(
        r"test error \d+\.\d\d% \(top-5 \d+\.\d\d%\), 2,642 parameters, 0\.\d M multiply-adds, \d:\d\d:\d\d", lines[-1]
    )
    error = float(lines[-1].split()[2].rstrip("%"))
    assert error < 70  # guessing is wrong in 90 %
    assert error == pytest.approx(100 - 100 * float(metrics(out)[-1]["top1"]), abs=0.01)


def test_run_folder(run, npz):
    files = {p.name for p in run.iterdir() if not p.name.startswith("events.out.tfevents")}
    assert files == {
        *("config.yaml", "metrics.csv", "checkpoint.pt", "best.pt", "model.pt", "genotype.json", "genotype.txt")
    }
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "lr", "drop_path", "train_loss", "train_accuracy", "test_loss", "top1", "top5"]
    events = EventAccumulator(str(run)).Reload()
    assert [e.value for e in events.Scalars("accuracy/test")] == pytest.approx([float(r["top1"]) for r in rows])
    model = load_model(run / "model.pt")
    images, labels = (torch.from_numpy(np.load(npz)[name]) for name in ("x_test", "y_test"))
    right = (model.predict(images[:, None]).argmax(1) == labels).double().mean().item()
    assert right == float(rows[-1]["top1"]) == model.metrics["top1"]
    assert load_model(run / "best.pt").metrics["top1"] == max(float(row["top1"]) for row in rows)


def test_config_repeats_the_run(run, tmp_path):
    out = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(out)]) == 0
    ours, theirs = network(out), network(run)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert metrics(out) == metrics(run)
    ours, theirs = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (out, run))
    assert ours == theirs


def test_interrupt_and_resume(tiny, tmp_path):
    command = [sys.executable, "-m", "fastnas", *tiny, "--epochs=300", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.splitlines()[-1] == "  fastnas train --resume --out run"
    found = re.search(r"stopped after epoch (\d+), step (\d+); to go on:", out)
    state = CHECKPOINTS.load(tmp_path / "run" / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == (int(found[1]), int(found[2]))


def test_resume_a_finished_run(run, tiny, capsys):
    before = metrics(run)
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("test error ")
    assert metrics(run) == before
    assert main([*tiny, "--resume", "--lr=0.3", "--out", str(run)]) == 2
    assert "with lr=0.1; leave out --lr" in capsys.readouterr().err


def test_help_and_advice_are_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "(36; imagenet 48; nb201 16; digits 16)" in " ".join(capsys.readouterr().out.split())
    assert _advice("train") == "; a smaller batch_size or channels, or a larger accumulate, needs less"
    assert _advice("predict") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--genotype is missing: give a name, a file or an architecture written out"),
        (["--genotype=DARTS_V2", "--epochs=x"], "epochs=x: expected a whole number"),
        (["--genotype=DARTS_V2", "--data=cifar10"], "root is missing: cifar10 needs root="),
        (["--genotype=DARTS_V2", "--recipe=none.yaml"], "none.yaml: No such file or directory"),
        (["--genotype=DARTS_V2", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--resume", "--out=nowhere"], "nowhere holds no run of fastnas train to resume"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_the_folder_of_a_search_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("# A search of fastnas 0.2.0\n")
    assert main([*TINY, "--overwrite", "--out", str(tmp_path)]) == 2
    assert "holds no run of fastnas train; choose another folder" in capsys.readouterr().err


def test_a_page_is_of_a_search(run, capsys):
    assert main(["report", str(run)]) == 2
    assert "is a training's, and pages are of searches" in capsys.readouterr().err
