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

    # a third one; the first two are not run again, and the folder knows the other options
    (out / "seed-3" / "genotype.json").unlink()
    assert main(["search", f"--out={out}", "--repeat=3", "--resume"]) == 0
    assert rows(out)[:2] == found
    assert len(rows(out)) == 3
    assert not (out / "seed-3" / "genotype.json").exists()


def test_random_search_on_a_budget(command, tmp_path):
    out = tmp_path / "run"
    assert main([*command, "--method=random", "--repeat=1", f"--out={out}", "--minutes=0.001"]) == 0
    (first,) = rows(out)  # it took longer than that
    assert first["supernet"] == ""
    minutes = 1.5 * seconds([first]) / 60
    assert main(["search", "--resume", f"--out={out}", f"--minutes={minutes}"]) == 0
    found = rows(out)
    assert found[0] == first
    assert seconds(found[:-1]) < 60 * minutes <= seconds(found)


def test_what_trains_nothing_takes_time_too(tmp_path):
    out = tmp_path / "run"
    assert main([*TINY, "--data=digits", "--method=random", "--repeat=1", "--minutes=0.002", f"--out={out}"]) == 0
    assert 0.12 <= seconds(rows(out)) < 30


def seconds(found):
    return sum(float(row["search_seconds"]) + float(row["train_seconds"]) for row in found)


def test_the_short_training_is_checked_before_the_search(command, tmp_path, capsys):
    options = [option for option in command if not option.startswith("--pick_recipe")]
    (tmp_path / "bad.yaml").write_text("recipe: digits\nauxiliary: 0.4")  # digits of 8x8 pixels are too small for it
    assert (
        main([*options, "--method=darts", "--repeat=2", f"--pick_recipe={tmp_path}/bad.yaml", f"--out={tmp_path}/run"])
        == 2
    )
    assert "auxiliary" in capsys.readouterr().err
    assert not (tmp_path / "run" / "seed-0").exists()


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
