"""Weights drawn from a Dirichlet distribution: the relaxation of DrNAS (arXiv:2006.10355, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastnas.relaxations._registry import RELAXATIONS, Relaxation

# elu + 1 comes arbitrarily near to 0, where there is no distribution; samples are corners long before. At the other end
# they are the mean long before torch's derivatives of beta distributions overflow.
_LEAST, _LARGEST = 1e-6, 1e8


def concentration(alphas: Tensor) -> Tensor:
    """Returns elu(alphas) + 1, the concentrations of the edges' distributions, (E, O), in float64.

    They lie between 1e-6 (alphas of -13.8) and 1e8; beyond, the gradient of alphas is 0.
    """
    return (F.elu(alphas.double()) + 1).clamp(_LEAST, _LARGEST)


class _Draw(torch.autograd.Function):
    """A sample of each row, with its pathwise derivative (arXiv:1806.01851); chance needs no derivative."""

    @staticmethod
    def forward(ctx: Any, concentrations: Tensor, generator: torch.Generator | None) -> Tensor:
        # A gamma variable of shape c is one of shape c + 1 times U^(1/c). Its logarithm never underflows, so that even
        # rows whose gammas would all be 0 have their right distribution.
        gammas = torch._standard_gamma(concentrations + 1, generator=generator)
        exponentials = torch.empty_like(concentrations).exponential_(generator=generator)
        sample = torch.softmax(gammas.log() - exponentials / concentrations, dim=-1)
        ctx.save_for_backward(sample, concentrations)
        return sample

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sample, concentrations = ctx.saved_tensors
        total = concentrations.sum(-1, keepdim=True).expand_as(concentrations)
        # d x_j / d c_i = r_i (δ_ij − x_j), where r_i (1 − x_i) is the derivative of x_i at a fixed value of its CDF.
        rates = torch._dirichlet_grad(sample, concentrations, total)
        return rates * (gradient - (sample * gradient).sum(-1, keepdim=True)), None


def _mean(alphas: Tensor) -> Tensor:
    concentrations = concentration(alphas)
    return (concentrations / concentrations.sum(-1, keepdim=True)).to(alphas.dtype)


def _sample(alphas: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    sample: Tensor = _Draw.apply(concentration(alphas), generator)  # type: ignore[no-untyped-call]
    return sample.to(alphas.dtype)


dirichlet = RELAXATIONS.add("dirichlet", Relaxation("dirichlet", _mean, _sample))
"""Rows drawn from Dirichlet(elu(alphas) + 1), differentiable once; the mean is concentration / Σ concentration."""
