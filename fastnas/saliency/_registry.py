from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fastnas._registry import Registry


class Batch(NamedTuple):
    """Images and their labels."""

    images: Tensor  # (N, C, H, W), floating
    labels: Tensor  # (N,), int64


Saliency = Callable[[nn.Module, Mapping[str, Tensor], Batch], dict[str, Tensor]]
"""``(supernet, alphas, batch)`` -> a score of every candidate, (E, O) for each cell type; the largest are kept."""

Score = Callable[[nn.Module, Batch], Tensor]
"""``(network, batch)`` -> a 0-d tensor; higher is better."""

SALIENCIES: Registry[Saliency] = Registry("saliency")
SCORES: Registry[Score] = Registry("score")


def saliency(name: str) -> Callable[[Saliency], Saliency]:
    """Returns a decorator that registers a score of the candidates of a supernet under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """
    return SALIENCIES.named(name)


def score(name: str) -> Callable[[Score], Score]:
    """Returns a decorator that registers a score of whole networks under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """
    return SCORES.named(name)


def get_saliency(name: str) -> Saliency:
    """Returns the saliency registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return SALIENCIES.find(name)


def get_score(name: str) -> Score:
    """Returns the score registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return SCORES.find(name)
