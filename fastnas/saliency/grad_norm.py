"""Grad-norm: how strongly the loss pulls at the weights (Abdelfattah et al., arXiv:2101.08134, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.nn.hooked import LAYERS
from fastnas.nn.preserved import preserved
from fastnas.saliency._loss import cross_entropy
from fastnas.saliency._registry import Batch, score


@score("grad_norm")
def grad_norm(network: nn.Module, batch: Batch) -> Tensor:
    """Returns Σ_l ‖∂L/∂W_l‖₂ over the weights of convolutions and linear layers, float64.

    L is the mean cross-entropy, batch norms use the batch's statistics. The published code sums the layers' norms, too,
    rather than taking the norm of the whole gradient.

    Raises:
        ValueError: for an empty batch, one of a single class, labels out of range, a loss that is not finite, or a
            network without such layers.
    """
    layers = (m for m in network.modules() if isinstance(m, LAYERS))
    weights = [w for w in dict.fromkeys(m.weight for m in layers) if w.requires_grad]
    if not weights:
        raise ValueError("network has no convolution and no linear layer whose weight requires a gradient")
    with preserved(network, training=True), torch.enable_grad():
        gradients = torch.autograd.grad(cross_entropy(network, batch), weights, allow_unused=True)
    return torch.stack([g.double().norm() for g in gradients if g is not None]).sum()
