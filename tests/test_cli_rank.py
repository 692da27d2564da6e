"""``fastnas rank``."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastnas
from fastnas.cli import main
from fastnas.saliency.batches import BatchSource
from fastnas.saliency.rank import Networks, rank, sample
from fastnas.spaces import get_space

TINY = ["rank", "--channels=4", "--layers=1", "--batch-size=8", "--image-size=8"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the whole space, which values a cell by its convolutions."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["cell", "accuracy", "other"])
        for n, genotype in enumerate(sample(get_space("nb201"), None)):
            rows.writerow([genotype.to_text(), 10 * sum("conv" in op for op in genotype.ops) + n / 1e5, 1])
    return path


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Starts the command in a process of its own, on one thread."""
    path = os.pathsep.join([str(Path(fastnas.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "fastnas", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def test_a_ranking(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--score=naswot", "--sample=12", "--seed=3", "--key=cell", "--column=accuracy"]
    folder = tmp_path / "run"
    assert main([*arguments, "--table", str(table), "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"scores.csv", "settings.json", "correlations.json", "scatter.png"}

    space = get_space("nb201")
    batch = BatchSource.open("noise", size=8, image_size=8).draw(3)
    expected = rank(space, "naswot", sample(space, 12, 3), batch, Networks(channels=4, layers=1, seed=3))
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["architecture"], float(r["score"])) for r in rows] == [(r.architecture, r.score) for r in expected]

    found = json.loads((folder / "correlations.json").read_text())
    assert (found["score"], found["column"], found["count"]) == ("naswot", "accuracy", 12)
    assert -1 <= found["kendall"]["low"] <= found["kendall"]["value"] <= found["kendall"]["high"] <= 1
    assert f"Spearman {found['spearman']['value']:.3f} (95 % of resamples" in out
    best = max(expected, key=lambda r: r.score)
    assert best.architecture in out.splitlines()[2]
    assert (folder / "scatter.png").read_bytes().startswith(b"\x89PNG")

    before = (folder / "scores.csv").read_bytes()
    assert main([*arguments, "--table", str(table), "--out", str(folder)]) == 0
    assert (folder / "scores.csv").read_bytes() == before
    capsys.readouterr()
    assert main([*arguments, "--batch-size=9", "--out", str(folder)]) == 2
    assert "has scores with images=[8, 3, 8, 8], not [9, 3, 8, 8]" in capsys.readouterr().err


def test_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--score=params", "--sample=3", "--data=digits", "--per-class=false"]) == 0
    folder = tmp_path / "runs" / "rank-nb201-params-digits-seed0"
    assert {p.name for p in folder.iterdir()} == {"scores.csv", "settings.json"}
    assert json.loads((folder / "settings.json").read_text())["images"] == [8, 1, 8, 8]
    assert "Spearman" not in capsys.readouterr().out


def test_scores_that_rank_nothing(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--score=params", "--sample=4", "--key=cell", "--column=other", "--table", str(table)]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "nothing is ranked" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "correlations.json").read_text())["spearman"]["value"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 1)])
def test_a_stopped_ranking_goes_on(number: signal.Signals, jobs: int, tmp_path: Path) -> None:
    arguments = [*TINY, "--score=grad_norm", "--channels=8", "--sample=150", f"--jobs={jobs}"]
    folder = tmp_path / "a run"
    with start([*arguments, "--out", str(folder)]) as process:
        while process.poll() is None and not lines(folder)[5:]:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert "of 150; the same command goes on from there" in out
    some = lines(folder)
    assert 5 < len(some) < 150
    with start([*arguments, "--out", str(folder)]) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    whole = lines(folder)
    assert len(whole) == 151
    assert whole[: len(some) - 1] == some[:-1]
    space = get_space("nb201")
    genotypes = sample(space, 150)
    batch = BatchSource.open("noise", size=8, image_size=8).draw(0)
    for n in (0, len(some) - 1, 149):  # not only those before the stop
        alone = rank(space, "grad_norm", [genotypes[n]], batch, Networks(channels=8, layers=1, seed=n))[0]
        row = next(csv.reader([whole[n + 1]]))
        assert (int(row[0]), row[1], float(row[2])) == (n, alone.architecture, alone.score)


def lines(folder: Path) -> list[str]:
    path = folder / "scores.csv"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score=magic"], "score='magic': expected one of"),
        (["--space=outer"], "space='outer': expected one of"),
        (["--data=mnist"], "data='mnist': expected one of noise, digits"),
        (["--sample=few"], "sample='few': expected a whole number of at least 1, or all"),
        (["--space=darts", "--sample=all"], "too large to be listed"),
        (["--jobs=0"], "jobs=0: expected a whole number of at least 1"),
        (["--jobs=many"], "jobs=many: expected a whole number"),
        (["--data=cifar10"], "root is missing"),
        (["--table=none.csv"], "none.csv: No such file or directory"),
        (["--per-class=true"], "batch_size=8 must be a multiple of the 10 classes"),
        (["--bogus=1"], "unrecognized arguments: --bogus=1 (see fastnas rank --help)"),
        (["--image-size=6", "--sample=1"], "multiples of 4"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastnas: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_table_of_other_architectures(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--sample=3", "--out", str(tmp_path / "run"), "--table", str(table), "--key=cell"]
    assert main([*arguments, "--column=error"]) == 2
    assert "no column 'error': those there are accuracy, other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing is scored before the table is found to fit"
    assert main([*arguments, "--column=accuracy", "--space=darts", "--layers=3"]) == 2
    assert "is not among its 15625 rows" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["rank", "--help"])
    assert exit_.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "naswot" in out
    assert "One of: noise, digits, cifar10, cifar100, npz. (default: noise)" in out
    assert "--jobs N Processes that score at the same time." in out
