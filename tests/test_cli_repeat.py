import csv

import numpy as np
import pytest
import yaml

from fastnas.cli import main
from fastnas.data import load
from fastnas.genotype import load_genotype

TINY = ["search", "--space=nb201", "--channels=4", "--layers=1", "--batch-size=16", "--device=cpu", "--samples=0"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Search and short training on 64 digits."""
    folder = tmp_path_factory.mktemp("data")
    digits = load("digits")
    x, y = digits.images[:64, 0].numpy(), digits.labels[:64].numpy()
    np.savez(folder / "digits.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    recipe = {"recipe": "digits", "channels": 4, "layers": 1, "epochs": 2, "batch_size": 16}
    (folder / "short.yaml").write_text(yaml.safe_dump(recipe))
    return [*TINY, "--data=npz", f"--root={folder}/digits.npz", "--pick=true", f"--pick_recipe={folder}/short.yaml"]


def rows(folder):
    with (folder / "searches.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_best_after_a_short_training_is_picked(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command, "--method=darts", "--epochs=1", "--repeat=2", "--seed=3", f"--out={out}"]) == 0
    found = rows(out)
    assert [row["seed"] for row in found] == ["3", "4"]
    best = max(found, key=lambda row: float(row["accuracy"]))
    assert load_genotype(out / "genotype.json").to_text() == best["genotype"]
    assert f"picked seed {best['seed']}" in capsys.readouterr().out
    for row in found:
        options = yaml.safe_load((out / f"seed-{row['seed']}" / "short" / "config.yaml").read_text())
        assert (options["genotype"], options["validate"], options["epochs"]) == (row["genotype"], 0.5, 2)

    # a third one; the first two are not run again, or their seconds would differ
    assert main([*command, "--method=darts", "--epochs=1", "--repeat=3", "--seed=3", f"--out={out}", "--resume"]) == 0
    assert rows(out)[:2] == found
    assert len(rows(out)) == 3


def test_random_search_on_a_budget(command, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = [*command, "--method=random", "--repeat=1", f"--out={out}"]
    assert main([*options, "--minutes=0.001"]) == 0
    (first,) = rows(out)  # it took longer than that
    assert (first["supernet"], first["search_seconds"]) == ("", "0")
    minutes = 1.5 * float(first["train_seconds"]) / 60
    assert main([*options, "--resume", f"--minutes={minutes}"]) == 0
    found = rows(out)
    spent = [float(row["train_seconds"]) for row in found]
    assert found[0] == first
    assert sum(spent[:-1]) < 60 * minutes <= sum(spent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pick=true"], "say how many, as in --repeat 4"),
        (["--repeat=2", "--pick_recipe=cifar"], "pick_recipe=cifar without --pick true"),
        (["--repeat=-1"], "repeat=-1 must be a number of searches"),
    ],
)
def test_errors(options, message, capsys):
    assert main([*TINY, "--data=digits", *options]) == 2
    assert message in capsys.readouterr().err


def test_searches_with_other_options_are_not_gone_on_with(command, tmp_path, capsys):
    options = [*command, "--method=random", f"--out={tmp_path}/run"]
    assert main([*options, "--repeat=1"]) == 0
    assert main([*options, "--repeat=1"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*options, "--repeat=1", "--resume", "--alpha_scale=0.5"]) == 2
    assert "alpha_scale" in capsys.readouterr().err
