"""One candidate an edge, drawn with Gumbel noise: the relaxation of GDAS (arXiv:1910.04465)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.relaxations._registry import RELAXATIONS, Relaxation
from fastnas.relaxations.gumbel_softmax import noisy_softmax
from fastnas.relaxations.softmax import softmax


def _sample(alphas: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    soft = noisy_softmax(alphas, generator, temperature)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    # soft - soft is exactly 0, so the values are those of hard and the gradient is that of soft
    return (hard + (soft - soft.detach())).to(alphas.dtype)


gdas = RELAXATIONS.add("gdas", Relaxation("gdas", softmax.mean, _sample, single_path=True))
"""One-hot rows, o with probability softmax(alphas)_o, and the gradient of the noisy softmax behind them."""
