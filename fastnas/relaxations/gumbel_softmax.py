"""Softmax of alphas with Gumbel noise, the concrete distribution of SNAS (arXiv:1812.09926)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.relaxations._registry import RELAXATIONS, Relaxation
from fastnas.relaxations.softmax import softmax


def noisy_softmax(alphas: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    """Returns softmax((alphas + G) / temperature), (E, O), with G drawn from Gumbel(0, 1); float32 or wider.

    Raises:
        ValueError: where ``temperature`` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number above 0, such as 1.0")
    wide = alphas.to(torch.promote_types(alphas.dtype, torch.float32))
    exponentials = torch.empty_like(wide).exponential_(generator=generator)
    gumbels = -exponentials.clamp_(min=torch.finfo(wide.dtype).tiny).log()
    return torch.softmax((wide + gumbels) / temperature, dim=-1)


def _sample(alphas: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    return noisy_softmax(alphas, generator, temperature).to(alphas.dtype)


gumbel_softmax = RELAXATIONS.add("gumbel_softmax", Relaxation("gumbel_softmax", softmax.mean, _sample))
"""Rows of softmax((alphas + G) / temperature): one-hot as the temperature falls, with probabilities softmax(alphas)."""
