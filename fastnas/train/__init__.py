"""Architectures trained from scratch, with the published recipes."""

from fastnas.train.config import TrainConfig
from fastnas.train.loop import EpochRecord, Training, learning_rate
from fastnas.train.recipes import RECIPES, Recipe, register_recipe
from fastnas.train.run import TrainFolder

__all__ = [
    "RECIPES",
    "EpochRecord",
    "Recipe",
    "TrainConfig",
    "TrainFolder",
    "Training",
    "learning_rate",
    "register_recipe",
]
