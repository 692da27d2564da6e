"""SNIP: the change of the loss if a connection were cut (arXiv:1810.02340, Eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastnas.nn.preserved import preserved
from fastnas.saliency._loss import cross_entropy
from fastnas.saliency._registry import Batch, saliency, score


@saliency("snip")
def snip(supernet: nn.Module, alphas: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns |∂L/∂α ⊙ α| of every candidate (FreeDARTS, arXiv:2106.11542).

    α multiplies the candidates' outputs as it is, without softmax. L is the cross-entropy of one mini-batch, batch norm
    takes its statistics; gradients are summed over all cells that share an α before the absolute value.

    Raises:
        ValueError: for an empty batch, one of a single class, labels out of range, or a loss that is not finite.
    """
    weights = {t: a.detach().clone().requires_grad_() for t, a in alphas.items()}
    with preserved(supernet, training=True), torch.enable_grad():
        gradients = torch.autograd.grad(
            cross_entropy(supernet, batch, weights), list(weights.values()), materialize_grads=True
        )
    return {t: (g * w.detach()).abs() for (t, w), g in zip(weights.items(), gradients, strict=True)}


@score("snip")
def network_snip(network: nn.Module, batch: Batch) -> Tensor:
    """Returns Σ_θ |θ ∂L/∂θ| over all parameters, 0-d (SNIP as a score of networks: arXiv:2101.08134, Eq. 1).

    All parameters are those of convolutions, linear layers and batch norms; the published code leaves the last out.

    Raises:
        ValueError: as :func:`snip`.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    with preserved(network, training=True), torch.enable_grad():
        gradients = torch.autograd.grad(cross_entropy(network, batch), parameters, allow_unused=True)
    products = [(p.detach() * g).abs().sum() for p, g in zip(parameters, gradients, strict=True) if g is not None]
    return torch.stack(products).sum()
