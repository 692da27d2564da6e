from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastnas._registry import Registry


class Sampler(Protocol):
    """A draw of weights."""

    def __call__(self, alphas: Tensor, generator: torch.Generator | None, temperature: float, /) -> Tensor:
        """Returns weights (E, O), differentiable with respect to alphas (E, O)."""


@dataclass(frozen=True)
class Relaxation:
    """From ``alphas`` (E, O) to the ``weights`` (E, O) that multiply the candidates' outputs.

    Attributes:
        name: What ``--relaxation`` calls it.
        mean: The weights without chance: what architectures are derived from, and what an evaluation uses.
        sampler: Draws weights; None where there is nothing random and every forward uses the mean.
        single_path: Whether a sample has exactly one entry a row that is not 0, so that only that candidate runs.
    """

    name: str
    mean: Callable[[Tensor], Tensor]
    sampler: Sampler | None = None
    single_path: bool = False

    def __call__(self, alphas: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Returns the weights of one forward, (E, O), for alphas of any rows: all rows are drawn in one call.

        Args:
            alphas: (E, O).
            generator: Where chance comes from, on the alphas' device; torch's own where None.
            temperature: Of relaxations that have one; the others ignore it.
        """
        return self.mean(alphas) if self.sampler is None else self.sampler(alphas, generator, temperature)


RELAXATIONS: Registry[Relaxation] = Registry("relaxation")


def relaxation(name: str) -> Callable[[Callable[[Tensor], Tensor]], Relaxation]:
    """Returns a decorator that registers a function from alphas to weights under ``name``.

    A relaxation that draws its weights is registered as ``RELAXATIONS.add(name, Relaxation(name, mean, sampler))``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """
    return lambda mean: RELAXATIONS.add(name, Relaxation(name, mean))


def get_relaxation(name: str) -> Relaxation:
    """Returns the relaxation registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return RELAXATIONS.find(name)
