"""One candidate an edge, all equally likely: SPOS (arXiv:1904.00420) and random search with weight sharing."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.relaxations._registry import RELAXATIONS, Relaxation


def _constant(weights: Tensor, alphas: Tensor) -> Tensor:
    """Returns ``weights`` as a function of ``alphas`` whose gradient is 0, whatever the alphas are."""
    return torch.where(torch.zeros_like(weights, dtype=torch.bool), alphas, weights)


def _mean(alphas: Tensor) -> Tensor:
    return _constant(torch.full_like(alphas, 1 / alphas.shape[-1]), alphas)


def _sample(alphas: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    rows, candidates = alphas.shape
    choice = torch.randint(candidates, (rows, 1), generator=generator, device=alphas.device)
    return _constant(torch.zeros_like(alphas).scatter(-1, choice, 1.0), alphas)


uniform = RELAXATIONS.add("uniform", Relaxation("uniform", _mean, _sample, single_path=True))
"""One-hot rows, every candidate with probability 1 / O; the alphas stay out of it and get a gradient of 0.

The mean is 1 / O everywhere, so what is derived from it is a tie, which the order of the primitives breaks: it says
nothing of the architectures. Such a supernet is trained to rank them (arXiv:1902.07638): draw architectures
and compare what it makes of each one's path.
"""
