import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastnas
from fastnas.cli import main
from fastnas.data import load
from fastnas.genotype import Genotype, load_genotype
from fastnas.search import SearchConfig, checkpoint
from fastnas.spaces import get_space

TINY = {"channels": 4, "layers": 3, "batch_size": 10, "lr": 0.1, "epochs": 2, "device": "cpu"}
FILES = {
    "config.yaml",
    "metrics.csv",
    "checkpoint.pt",
    "genotype.json",
    "genotype.txt",
    "cell_normal.png",
    "cell_reduce.png",
    "alphas.png",
}


def alphas(folder):
    return checkpoint.load(folder / "checkpoint.pt")["alphas"]


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A file with 40 digits: two batches of ten train the weights, two the alphas."""
    digits = load("digits")
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=digits.images[:40, 0].numpy(), y_train=digits.labels[:40].numpy())
    return path


@pytest.fixture(scope="module")
def tiny(npz):
    """The arguments of a search of seconds."""
    return ["search", "--data=npz", f"--root={npz}", *(f"--{name}={value}" for name, value in TINY.items())]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a finished tiny search."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*tiny, "--out", str(folder)]) == 0
    return folder


def test_run_folder(run, npz):
    names = {p.name for p in run.iterdir()}
    assert {n for n in names if not n.startswith("events.out.tfevents")} == FILES

    genotype = Genotype.load(run / "genotype.json")
    assert genotype == Genotype.load(run / "genotype.txt")
    assert (run / "genotype.txt").read_text().startswith("Genotype(normal=[(")
    for name in ("cell_normal", "cell_reduce", "alphas"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["valid_accuracy"]) <= 1 for row in rows)

    config = SearchConfig.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert config == SearchConfig(**TINY, data="npz", root=str(npz))
    assert checkpoint.load(run / "checkpoint.pt")["config"] == config.to_dict()

    events = EventAccumulator(str(run)).Reload()
    points = events.Scalars("accuracy/valid")
    assert [p.step for p in points] == [1, 2]
    assert points[-1].value == pytest.approx(float(rows[-1]["valid_accuracy"]))


def test_written_config_reproduces_the_run(run, tmp_path):
    assert main(["search", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again") == metrics(run)
    for name, alpha in alphas(run).items():
        assert torch.equal(alpha, alphas(tmp_path / "again")[name])
    assert (tmp_path / "again" / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_command_line_wins_over_the_file(npz, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"data: npz\nroot: {npz}\nepochs: 2\nlr: 0.05\nchannels: 4\nlayers: 3\nbatch_size: 10\n"
    )
    assert main(["search", f"--config={tmp_path / 'mine.yaml'}", "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["epochs"], config["lr"], config["momentum"]) == (1, 0.05, 0.9)


def test_amp(tiny, tmp_path):
    folder = tmp_path / "run"
    assert main([*tiny, "--epochs=1", "--amp=bf16", "--out", str(folder)]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["amp"] == "bf16"
    assert checkpoint.load(folder / "checkpoint.pt")["config"]["amp"] == "bf16"


def test_output_without_a_terminal_is_plain(tiny, tmp_path, capsys):
    assert main([*tiny, "--epochs=1", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert re.search(r"^ +1  0\.1000 ", out, re.MULTILINE)
    assert "Genotype(normal=[" in out


def test_a_run_is_not_lost_by_accident(tiny, run, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert main([*tiny, "--out", str(run)]) == 2
    assert re.search(r"holds a run already; .*--resume.*--overwrite.*--out", capsys.readouterr().err)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before

    (tmp_path / "precious.txt").write_text("mine")
    for option in ([], ["--overwrite"]):
        assert main([*tiny, "--out", str(tmp_path), *option]) == 2
        assert "is not empty and holds no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_overwrite_replaces_the_run_and_nothing_else(tiny, tmp_path):
    folder = tmp_path / "run"
    assert main([*tiny, "--out", str(folder)]) == 0
    old = alphas(folder)
    (folder / "notes.txt").write_text("mine")
    assert main([*tiny, "--epochs=1", "--seed=1", "--overwrite", "--out", str(folder)]) == 0
    assert not torch.equal(alphas(folder)["normal"], old["normal"])
    assert len(metrics(folder)) == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(list(folder.glob("events.out.tfevents*"))) == 1


def test_resume_wants_the_same_options(run, capsys):
    assert main(["search", "--resume", "--out", str(run), "--lr=0.2"]) == 2
    assert "lr=0.1; leave out --lr" in capsys.readouterr().err
    assert main(["search", "--resume", "--overwrite", "--out", str(run)]) == 2
    assert main(["search", "--resume", "--out", str(run), "--amp=bf16"]) == 2
    assert "amp=none; leave out --amp" in capsys.readouterr().err
    # The same value, and options of the machine, may be given; a finished run stays as it is.
    before = (run / "metrics.csv").read_text()
    assert main(["search", "--resume", "--out", str(run), "--lr=0.1", "--threads=1", "--cuda-graphs=false"]) == 0
    assert (run / "metrics.csv").read_text() == before


@pytest.fixture(scope="module")
def long(tiny):
    """The arguments of a search with five steps an epoch, so that a signal can come inside one."""
    return [*tiny, "--batch-size=4", "--epochs=4"]


@pytest.fixture(scope="module")
def whole(long, tmp_path_factory):
    """The folder of that search when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*long, "--out", str(folder)]) == 0
    return folder


def start(arguments, **kwargs):
    """Starts the command in a process of its own, on one thread."""
    root = Path(fastnas.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "fastnas", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if re.match(rf" +{epoch}  ", line):
            return
    pytest.fail(f"the search ended before epoch {epoch}: {process.stderr.read()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_exactly(long, whole, tmp_path, number):  # a killed one: tests/search/test_killed.py
    folder = tmp_path / "a run"
    with start([*long, "--out", str(folder)]) as process:
        wait_for_epoch(process, 1)
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert not list(folder.glob(".*"))
    assert process.returncode == 128 + number, err
    assert err == ""
    assert re.search(r"stopped after epoch \d, step \d; to go on:\n  fastnas search --resume --out '.*a run'", out)
    assert (folder / "cell_normal.png").exists()

    with start(["search", "--resume", "--out", str(folder)]) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resumed after epoch" in out

    assert metrics(folder) == metrics(whole)
    for name, alpha in alphas(whole).items():
        assert torch.equal(alpha, alphas(folder)[name])
    assert (folder / "genotype.json").read_text() == (whole / "genotype.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["serch"], "invalid choice: 'serch'"),
        (["search", "--bogus=1"], "unrecognized arguments: --bogus=1 (see fastnas search --help)"),
        (["search", "--lr=fast"], "lr=fast: expected a number"),
        (["search", "--epochs=1.5"], "epochs=1.5: expected a whole number"),
        (["search", "--alpha-betas=0.5"], "alpha_betas=0.5: expected two numbers"),
        (["search", "--space=outer"], "space 'outer' is unknown: expected one of darts"),
        (["search", "--method=magic"], "method 'magic' is unknown: expected one of darts"),
        (["search", "--relaxation=yoga"], "relaxation 'yoga' is unknown"),
        (["search", "--data=mnist"], "choose one of digits"),
        (["search", "--device=cpu", "--cuda-graphs=true"], "cuda_graphs=True with device=cpu"),
        (["search", "--amp=fp16"], "amp='fp16': expected one of none, bf16"),
        (["search", "--data=cifar10"], "root is missing"),
        (["search", "--data=cifar10", "--root=/no/such/folder"], "root='/no/such/folder' does not exist"),
        (["search", "--batch-size=5000"], "batch_size=5000 is larger than the 898 training images"),
        (["search", "--config=none.yaml"], "File does not exist"),
        (["search", "--resume"], "holds no run of fastnas search to resume"),
        (["show", "none.json"], "none.json: No such file or directory"),
        (["show", "none"], "none is neither a file nor the name of an architecture: DARTS_V1"),
        (["show", "--draw=cells"], "--draw needs an architecture"),
        (["count", "DARTS_V2", "--layers=x"], "layers=x: expected a whole number"),
        (["count", "DARTS_V2", "--stem=vgg"], "stem='vgg': expected cifar or imagenet"),
        (["count", "DARTS_V2", "--image-size=0"], "image_size=0 must be at least 1"),
        (["count", "DARTS_V2", "--image-size=30"], "both must be even"),
        (["count", "NB201_skip", "--imagenet"], "imagenet: only the DARTS space has such a network"),
        (["count", "NB201_skip", "--stem=cifar"], "stem=cifar: only networks of the DARTS space"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastnas: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == [], "a refused search leaves nothing behind"


def test_bad_config_files(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    for text, message in [("epochs: [1\n", "parsing"), ("epoch: 1\n", "epoch"), ("epochs: many\n", "expected a whole")]:
        path.write_text(text)
        assert main(["search", f"--config={path}", "--out", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("how", ["option", "environment"])
def test_traceback_on_request(how, monkeypatch):
    arguments = ["search", "--space=outer"]
    if how == "option":
        arguments.append("--traceback")
    else:
        monkeypatch.setenv("FASTNAS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="outer"):
        main(arguments)


def test_damaged_run_folders(run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert main(["search", "--resume", "--out", str(folder)]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    (folder / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    assert main(["search", "--resume", "--out", str(folder)]) == 2
    assert "is damaged" in capsys.readouterr().err
    (folder / "config.yaml").write_text((run / "config.yaml").read_text() + "lr: fast\n")
    assert main(["search", "--resume", "--out", str(folder)]) == 2
    assert "config.yaml cannot be read: lr='fast'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["search", "--help"])
    assert exit_.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--alpha_lr X Learning rate of the alphas. (preset: " in out
    assert "(preset: 8 for digits, 50 for cifar10)" in out
    assert "null)" not in out
    assert "One of: none, bf16. (default: none)" in out


def test_version_and_info(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"fastnas {fastnas.__version__}"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for fact in (torch.__version__, "compiler", "instruction set", "cuda", "backends"):
        assert fact in out


def test_show(run, tmp_path, capsys):
    assert main(["show", str(run / "genotype.json"), "--to=text"]) == 0
    text = capsys.readouterr().out
    assert text == (run / "genotype.txt").read_text()
    (tmp_path / "g.txt").write_text(text)
    assert main(["show", str(tmp_path / "g.txt"), "--to=json", "--draw", str(tmp_path / "pictures")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "genotype.json").read_text())
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"cell_normal.png", "cell_reduce.png"}
    (tmp_path / "g.txt").write_text("print('no')")
    assert main(["show", str(tmp_path / "g.txt")]) == 2
    assert "g.txt" in capsys.readouterr().err


CELL = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|"


def test_show_for_nasbench201(tmp_path, capsys):
    (tmp_path / "cell.txt").write_text(CELL)
    assert main(["show", str(tmp_path / "cell.txt"), "--to=json", "--draw", str(tmp_path / "pictures")]) == 0
    text = capsys.readouterr().out
    assert json.loads(text) == {"ops": re.findall(r"\|(\w+)~", CELL)}
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["cell.png"]
    (tmp_path / "cell.json").write_text(text)
    assert main(["show", str(tmp_path / "cell.json")]) == 0
    assert capsys.readouterr().out == CELL + "\n"


def test_show_for_nasbench1shot1(tmp_path, capsys):
    text = "conv3x3-bn-relu(0)+maxpool3x3(0,1)+output(0,2)"
    (tmp_path / "cell.txt").write_text(text)
    assert main(["show", str(tmp_path / "cell.txt"), "--to=json", "--draw", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == [[0], [0, 1], [0, 2]]
    assert (tmp_path / "cell.png").stat().st_size > 1000


def test_search_in_nasbench201(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*tiny, "--space=nb201", f"--out={folder}"]) == 0
    genotype = load_genotype(folder / "genotype.json")
    assert (folder / "genotype.txt").read_text() == genotype.to_text() + "\n"
    assert genotype.to_text() in capsys.readouterr().out
    assert {"cell.png", "alphas.png"} <= {p.name for p in folder.iterdir()}


def test_search_in_spaces_of_several_tables(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*tiny, "--space=nb1shot1-s1", f"--out={folder}"]) == 0
    assert load_genotype(folder / "genotype.json").to_text() in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} >= {"cell.png", "metrics.csv", "checkpoint.pt"}
    assert main([*tiny, "--space=nb1shot1-s1", "--k=2", f"--out={tmp_path / 'partial'}"]) == 2
    assert "has no partial channels, set k to 1" in capsys.readouterr().err
    assert not (tmp_path / "partial").exists()


def test_too_little_memory_is_one_line(capsys):
    assert main(["score", "--space=nb201", "--channels=1000000", "--seeds=0..0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastnas: error: out of memory; a smaller batch_size or channels")
    assert error.count("\n") == 1


def test_search_measures_against_a_table(tiny, tmp_path, capsys):
    cells = [genotype.to_text() for genotype in get_space("nb201").all()]
    rows = [f"{cell},{i % 97}.5,{i % 13}.25" for i, cell in enumerate(cells)]
    (tmp_path / "cells.csv").write_text("\n".join(["arch,c10_test_e200,other", *rows]) + "\n")
    options = ["--space=nb201", "--method=drnas", f"--table={tmp_path / 'cells.csv'}", "--samples=5", "--hessian=2"]
    assert main([*tiny, *options, f"--out={tmp_path / 'run'}"]) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        first, last = csv.DictReader(file)
    expected = cells.index(last["genotype"]) % 97 + 0.5
    assert float(last["table/c10_test_e200"]) == expected
    assert f"c10_test_e200 {expected:.2f}" in capsys.readouterr().out
    assert "table/other" not in last  # one of the benchmark's columns is there
    assert float(last["sampled/c10_test_e200_std"]) > 0
    assert first["hessian/eigenvalue"] == ""
    assert float(last["hessian/norm"]) >= abs(float(last["hessian/eigenvalue"])) > 0
    assert main([*tiny, "--space=darts", *options[2:], f"--out={tmp_path / 'other'}"]) == 2
    assert "is no architecture of the space darts" in capsys.readouterr().err
    random = ["search", "--method=random", "--data=digits", options[0], options[2], f"--out={tmp_path / 'random'}"]
    assert main(random) == 0
    out = capsys.readouterr().out
    assert "c10_test_e200 " in out
    assert "metrics.csv" not in out
    assert main([*tiny, *options, "--columns=[none]", f"--out={tmp_path / 'wrong'}"]) == 2
    assert "no column 'none': those there are c10_test_e200, other" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert last["genotype"] in page.replace("&lt;", "<")
