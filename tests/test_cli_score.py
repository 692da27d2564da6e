"""``fastnas score``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fastnas.cli import main
from fastnas.genotype import load_genotype
from fastnas.saliency import Batch, FreeDarts
from fastnas.saliency.rank import sample
from fastnas.saliency.seeds import parse_seeds
from fastnas.spaces import get_space

TINY = ["score", "--channels=4", "--layers=1", "--image-size=8", "--batch-size=8"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the whole space, which values a cell by its convolutions."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arch", "accuracy"])
        for genotype in sample(get_space("nb201"), None):
            rows.writerow([genotype.to_text(), 10 * sum("conv" in op for op in genotype.ops)])
    return path


def test_searches(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*TINY, "--seeds=0..3,7", "--table", str(table), "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {
        *("scores.csv", "summary.json", "scores.png"),
        *(f"genotype-{seed}.json" for seed in (0, 1, 2, 3, 7)),
    }
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["seed"]) for r in rows] == [0, 1, 2, 3, 7]
    searcher = FreeDarts(get_space("nb201"), channels=4, layers=1)
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    for row in rows:
        genotype = searcher.search(int(row["seed"]), batch).genotype
        assert row["genotype"] == genotype.to_text()
        assert load_genotype(folder / f"genotype-{row['seed']}.json") == genotype
        assert float(row["accuracy"]) == 10 * sum("conv" in op for op in genotype.ops)
    values = [float(r["accuracy"]) for r in rows]
    found = json.loads((folder / "summary.json").read_text())
    assert found["numbers"]["accuracy"]["mean"] == pytest.approx(sum(values) / 5)
    assert found["numbers"]["accuracy"]["best"] == max(values)
    assert sum(found["genotypes"].values()) == found["searches"] == 5
    assert f"{sum(values) / 5:.2f}" in out
    assert "s a search" in out


@pytest.mark.parametrize(
    ("space", "options"),
    [
        ("darts", ["--layers=3", "--saliency=snip,synflow", "--data=digits"]),
        ("nb1shot1-s2", ["--layers=3"]),
        ("darts", ["--layers=3", "--stem=imagenet", "--image-size=32"]),
        ("nb201", ["--saliency=grasp", "--pruning=candidates"]),
    ],
)
def test_every_space(space: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"--space={space}", "--seeds=1", *options, "--out", str(tmp_path / "run")]) == 0
    load_genotype(tmp_path / "run" / "genotype-1.json")
    assert "std" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("3", [3]), ("0..4", [0, 1, 2, 3, 4]), ("0..2, 9", [0, 1, 2, 9]), ("5..5", [5])]
)
def test_seeds(text: str, expected: list[int]) -> None:
    assert parse_seeds(text) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds=0..x"], "seeds='0..x': expected numbers or ranges such as 0..99"),
        (["--seeds=4..2"], "seeds='4..2'"),
        (["--seeds=1,0..3"], "a seed occurs twice"),
        (["--device=cuda:99"], "torch sees"),
        (["--stem=imagenet"], "the space 'nb201' has but one"),
        (["--space=nb301"], "space='nb301': expected one of darts, darts-7"),
        (["--saliency=magic"], "saliency 'magic' is unknown"),
        (["--scale=-1"], "scale=-1.0 must be positive"),
        (["--scale=large"], "scale=large: expected a number"),
        (["--draws=-2"], "draws=-2: expected a whole number of at least 0"),
        (["--data=cifar10"], "root is missing"),
        (["--table=none.csv"], "none.csv: No such file or directory"),
        (["--saliency=snip", "--batch-size=1", "--image-size=7"], "multiples of 4"),
    ],
)
def test_bad_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *options]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_table_without_the_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arch,accuracy\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,10\n")
    assert main([*TINY, "--seeds=0", "--table", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "is not among its 1 rows" in capsys.readouterr().err
