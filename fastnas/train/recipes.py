"""Recipes: how published architectures were trained, as named sets of options over one loop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import yaml

from fastnas._registry import Registry
from fastnas.genotype import AnyGenotype
from fastnas.inference.networks import NETWORKS, space_of
from fastnas.runs import options

Value = bool | int | float | str | list[float]


@dataclass(frozen=True)
class Recipe:
    """A training from scratch: a value for every option that may be left out.

    Attributes:
        name: What ``--recipe`` calls it.
        summary: One line for help texts, with the paper.
        values: Its options.
    """

    name: str
    summary: str
    values: Mapping[str, Value] = field(default_factory=dict)


RECIPES: Registry[Recipe] = Registry("recipe")


def register_recipe(recipe: Recipe) -> Recipe:
    """Returns ``recipe`` after making it known to ``--recipe`` and :class:`~fastnas.train.TrainConfig`.

    Raises:
        ValueError: where another recipe has the name.
    """
    return RECIPES.add(recipe.name, recipe)


def default_recipe(genotype: AnyGenotype, data: str) -> str:
    """Returns the name of the recipe for an architecture and a data set, where none is given.

    Raises:
        ValueError: where none is known for such an architecture.
    """
    if data == "digits":
        return "digits"
    space = space_of(genotype)
    if space == "darts":
        return "imagenet" if data == "imagefolder" else "cifar"
    if space != "nb201":
        sizes = NETWORKS[space].published
        raise ValueError(
            f"recipe is missing: none is known for architectures of {space}; give one, such as nb201 with "
            f"channels={sizes['channels']} and layers={sizes['layers']}, the published size"
        )
    return space


def read_recipe(path: str | os.PathLike[str]) -> tuple[str | None, dict[str, Value]]:
    """Returns the options in a YAML file, after the name of the recipe that they change, if the file gives one.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it holds anything but options of a recipe and values for them; the message names the first.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} holds no options; write lines such as lr: 0.1")
    base = values.pop("recipe", None)
    if base is not None:
        RECIPES.find(str(base))
    known = _CIFAR.keys()
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(f"{path}: {min(unknown)!r} is no option of a recipe; those are {', '.join(known)}")
    for name, value in values.items():
        kind = type(_CIFAR[name])
        if kind is float and isinstance(value, str):  # YAML reads 1e-1 as text
            with suppress(ValueError):
                values[name] = float(value)
        try:
            options.check_type(name, values[name], "list[float]" if kind is list else kind.__name__)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None
    return base, values


def _values(*parts: Mapping[str, Value], **values: Value) -> Mapping[str, Value]:
    merged: dict[str, Value] = {}
    for part in (*parts, values):
        merged.update(part)
    return MappingProxyType(merged)


# DARTS on CIFAR (arXiv:1806.09055, section 3.2 and appendix A.2), cutout of arXiv:1708.04552.
_CIFAR = _values(
    channels=36,
    layers=20,
    stem="cifar",
    epochs=600,
    batch_size=96,
    lr=0.025,
    schedule="cosine",
    lr_decay=0.97,
    lr_warmup=0,
    momentum=0.9,
    nesterov=False,
    weight_decay=3e-4,
    clip=5.0,
    label_smoothing=0.0,
    auxiliary=0.4,
    drop_path=0.2,
    pad=4,
    flip=True,
    cutout=16,
    jitter=[],
    image_size=224,
    threads=0,
)

# DARTS on ImageNet, the mobile setting (section 3.3): fewer than 600 million multiply-adds at 224x224.
_IMAGENET = _values(
    _CIFAR,
    channels=48,
    layers=14,
    stem="imagenet",
    epochs=250,
    batch_size=128,
    lr=0.1,
    schedule="exponential",
    weight_decay=3e-5,
    label_smoothing=0.1,
    drop_path=0.0,
    pad=0,
    cutout=0,
    jitter=[0.4, 0.4, 0.4, 0.2],
)

register_recipe(Recipe("cifar", "DARTS on CIFAR (arXiv:1806.09055)", _CIFAR))
register_recipe(Recipe("cifar-pc", "PC-DARTS on CIFAR (arXiv:1907.05737)", _values(_CIFAR, drop_path=0.3)))
register_recipe(Recipe("imagenet", "DARTS on ImageNet, mobile setting (arXiv:1806.09055)", _IMAGENET))
register_recipe(
    Recipe(
        "imagenet-pc",
        "PC-DARTS on ImageNet, large batches (arXiv:1907.05737)",
        _values(_IMAGENET, batch_size=1024, lr=0.5, schedule="linear", lr_warmup=5),
    )
)
register_recipe(
    Recipe(
        "nb201",
        "NAS-Bench-201 on CIFAR (arXiv:2001.00326)",
        _values(
            _CIFAR,
            channels=16,
            layers=5,
            epochs=200,
            batch_size=256,
            lr=0.1,
            nesterov=True,
            weight_decay=5e-4,
            clip=0.0,
            auxiliary=0.0,
            drop_path=0.0,
            cutout=0,
        ),
    )
)
# Not published anywhere: for some 1,400 images of 8x8 pixels and a minute or two on two CPU cores. A mirrored 2 is no
# 2, and maps of 2x2 pixels are too small for an auxiliary head.
register_recipe(
    Recipe(
        "digits",
        "For the digits that scikit-learn carries",
        _values(
            _CIFAR,
            channels=16,
            layers=5,
            epochs=30,
            batch_size=64,
            lr=0.1,
            nesterov=True,
            weight_decay=5e-4,
            auxiliary=0.0,
            drop_path=0.0,
            pad=1,
            flip=False,
            cutout=0,
            threads=1,
        ),
    )
)
