import dataclasses
import math

import pytest

from fastnas.genotype import OneShotGenotype
from fastnas.train import RECIPES, Recipe, TrainConfig, learning_rate, register_recipe

CELL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"

# As the papers have them: arXiv:1806.09055 (A.2, 3.3), 1907.05737 (4.2, 4.3), 2001.00326 (table 1).
PUBLISHED = {
    "cifar": {
        "channels": 36,
        "layers": 20,
        "stem": "cifar",
        "epochs": 600,
        "batch_size": 96,
        "lr": 0.025,
        "schedule": "cosine",
        "lr_warmup": 0,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 3e-4,
        "clip": 5,
        "label_smoothing": 0,
        "auxiliary": 0.4,
        "drop_path": 0.2,
        "pad": 4,
        "flip": True,
        "cutout": 16,
        "jitter": [],
    },
    "cifar-pc": {"drop_path": 0.3, "epochs": 600, "batch_size": 96, "auxiliary": 0.4, "cutout": 16},
    "imagenet": {
        "channels": 48,
        "layers": 14,
        "stem": "imagenet",
        "epochs": 250,
        "batch_size": 128,
        "lr": 0.1,
        "schedule": "exponential",
        "lr_decay": 0.97,
        "lr_warmup": 0,
        "momentum": 0.9,
        "weight_decay": 3e-5,
        "clip": 5,
        "label_smoothing": 0.1,
        "auxiliary": 0.4,
        "drop_path": 0,
        "pad": 0,
        "flip": True,
        "cutout": 0,
        "jitter": [0.4, 0.4, 0.4, 0.2],
        "image_size": 224,
    },
    "imagenet-pc": {"batch_size": 1024, "lr": 0.5, "schedule": "linear", "lr_warmup": 5, "epochs": 250},
    "nb201": {
        "channels": 16,
        "layers": 5,
        "epochs": 200,
        "batch_size": 256,
        "lr": 0.1,
        "schedule": "cosine",
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "clip": 0,
        "auxiliary": 0,
        "drop_path": 0,
        "pad": 4,
        "flip": True,
        "cutout": 0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    config = TrainConfig(genotype=CELL if name == "nb201" else "DARTS_V2", recipe=name, data="cifar10")
    assert {option: getattr(config, option) for option in PUBLISHED[name]} == PUBLISHED[name]


def test_learning_rates():
    cosine = TrainConfig(genotype="DARTS_V2", data="cifar10")
    assert learning_rate(cosine, 0) == 0.025
    assert learning_rate(cosine, 150) == pytest.approx(0.025 * (0.5 + math.sqrt(0.5) / 2))
    assert learning_rate(cosine, 599) == pytest.approx(0, abs=1e-6)

    decay = TrainConfig(genotype="DARTS_V2", data="imagefolder")
    assert [learning_rate(decay, e) for e in (0, 1, 2)] == pytest.approx([0.1, 0.097, 0.09409])

    large = dataclasses.replace(decay, recipe="imagenet-pc", schedule="linear", lr=0.5, lr_warmup=5)
    rates = [learning_rate(large, e) for e in range(250)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[4] == pytest.approx(0.5 * 241 / 245)
    assert rates[5:8] == pytest.approx([0.5 * 240 / 245, 0.5 * 239 / 245, 0.5 * 238 / 245])
    assert rates[244:] == pytest.approx([0.5 / 245 * share for share in (1 + 0, 1, 0.8, 0.6, 0.4, 0.2)])
    short = dataclasses.replace(large, epochs=4, lr_warmup=0)
    assert [learning_rate(short, e) for e in range(4)] == pytest.approx([0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    ("genotype", "data", "recipe"),
    [
        (CELL, "cifar10", "nb201"),
        (CELL, "digits", "digits"),
        ("DARTS_V2", "digits", "digits"),
        ("DARTS_V2", "npz", "cifar"),
        ("22212202", "digits", "digits"),
        ("DARTS_V2", "imagefolder", "imagenet"),
    ],
)
def test_default_recipe(genotype, data, recipe):
    assert TrainConfig(genotype=genotype, data=data).recipe == recipe


@pytest.mark.parametrize(
    ("genotype", "message"),
    [
        (OneShotGenotype(("conv1x1-bn-relu",), ((0,), (1,))).to_text(), "of nb101; .* channels=128 and layers=9"),
        ("22212202", "of nb-macro; .* nb201 with channels=32 and layers=8"),
        (">".join(["mbconv3_3x3"] * 21), "of proxyless; "),
        ("mbconv3_3x3>sep_conv_3x3", "genotype is of none of the spaces darts, nb201"),
    ],
)
def test_architectures_without_a_recipe(genotype, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(genotype=genotype, data="cifar10")
    TrainConfig(genotype=genotype, data="cifar10", recipe="nb201")


def test_recipes_do_not_mirror_images_that_they_do_not_know():
    assert [TrainConfig(genotype="DARTS_V2", data=data, recipe="cifar").flip for data in ("npz", "cifar10")] == [
        False,
        True,
    ]
    assert TrainConfig(genotype="DARTS_V2", data="npz", flip=True).flip


def test_recipe_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: imagenet\nlr: 2e-1\njitter: []\n")  # which YAML reads as text
    config = TrainConfig(genotype="DARTS_V2", recipe=str(path), epochs=7)
    assert (config.recipe, config.lr, config.jitter, config.epochs, config.layers) == ("imagenet", 0.2, [], 7, 14)
    assert TrainConfig.from_dict(config.to_dict()) == config  # the file is not needed again

    for text, message in (
        ("lr: 0.2\nlearning_rate: 1\n", r"mine\.yaml: 'learning_rate' is no option of a recipe"),
        ("data: cifar10\n", "'data' is no option of a recipe"),
        ("recipe: resnet\n", "recipe 'resnet' is unknown"),
        ("- lr\n", "holds no options"),
        ("lr: [\n", "is no YAML"),
        ("lr: fast\n", r"mine\.yaml: lr='fast': expected a number"),
        ("lr:\n", r"mine\.yaml: lr=None: expected a number"),
        ("epochs: ten\n", r"mine\.yaml: epochs='ten': expected a whole number"),
        ("flip: 1\n", r"mine\.yaml: flip=1: expected true or false"),
        ("jitter: 0.4\n", r"mine\.yaml: jitter=0\.4: expected a list of numbers"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            TrainConfig(genotype="DARTS_V2", recipe=str(path))


def test_recipe_of_ones_own(monkeypatch):
    monkeypatch.setitem(RECIPES, "cifar", RECIPES["cifar"])  # restores the registry
    before = dict(RECIPES)
    register_recipe(Recipe("short", "A tenth of it", {**RECIPES["cifar"].values, "epochs": 60}))
    assert TrainConfig(genotype="DARTS_V2", recipe="short").epochs == 60
    RECIPES.clear()
    RECIPES.update(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genotype": ""}, "genotype is missing"),
        ({"recipe": "resnet"}, "recipe 'resnet' is unknown: expected one of cifar"),
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"lr": "fast"}, "lr='fast': expected a number"),
        ({"schedule": "steps"}, "schedule='steps': expected one of cosine"),
        ({"jitter": [0.4, 0.4]}, r"jitter=\[0.4, 0.4\]: expected \[\] or four numbers"),
        ({"accumulate": 9, "batch_size": 16}, "batch norm wants 2 images a part"),
        ({"genotype": CELL, "auxiliary": 0.4}, "auxiliary=0.4 with an architecture outside the DARTS space"),
        ({"lr_warmup": 2, "epochs": 2}, "lr_warmup=2 with epochs=2"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov=True with momentum=0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**{"genotype": "DARTS_V2", **options})


def test_unknown_option():
    with pytest.raises(ValueError, match="unknown option 'learning_rate'; `fastnas train --help` lists"):
        TrainConfig.from_dict({"genotype": "DARTS_V2", "learning_rate": 1})
