from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Batch(NamedTuple):
    """Images and their labels."""

    images: Tensor  # (N, C, H, W), floating
    labels: Tensor  # (N,), int64


Saliency = Callable[[nn.Module, Mapping[str, Tensor], Batch], dict[str, Tensor]]
"""``(supernet, alphas, batch)`` -> a score of every candidate, (E, O) for each cell type; the largest are kept."""

Score = Callable[[nn.Module, Batch], Tensor]
"""``(network, batch)`` -> a 0-d tensor; higher is better."""

SALIENCIES: dict[str, Saliency] = {}
SCORES: dict[str, Score] = {}


def saliency(name: str) -> Callable[[Saliency], Saliency]:
    """Returns a decorator that registers a score of the candidates of a supernet under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """

    def register(function: Saliency) -> Saliency:
        if name in SALIENCIES:
            raise ValueError(f"saliency {name!r} is already registered: choose another name")
        SALIENCIES[name] = function
        return function

    return register


def score(name: str) -> Callable[[Score], Score]:
    """Returns a decorator that registers a score of whole networks under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """

    def register(function: Score) -> Score:
        if name in SCORES:
            raise ValueError(f"score {name!r} is already registered: choose another name")
        SCORES[name] = function
        return function

    return register


def get_saliency(name: str) -> Saliency:
    """Returns the saliency registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    try:
        return SALIENCIES[name]
    except KeyError:
        raise ValueError(f"saliency {name!r} is unknown: expected one of {', '.join(sorted(SALIENCIES))}") from None


def get_score(name: str) -> Score:
    """Returns the score registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    try:
        return SCORES[name]
    except KeyError:
        raise ValueError(f"score {name!r} is unknown: expected one of {', '.join(sorted(SCORES))}") from None
