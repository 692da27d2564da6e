"""What FreeDARTS' released notebooks compute, which is not what the paper (arXiv:2106.11542) says.

For comparison alone. docs/training_free.md says what is wrong with each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastnas import twice_differentiable
from fastnas.nn.preserved import preserved
from fastnas.saliency._loss import cross_entropy
from fastnas.saliency._registry import Batch, saliency


@saliency("released-synflow")
def released_synflow(supernet: nn.Module, alphas: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns |α ∂R/∂α| with R of one image of ones, every batch norm in training mode and the biases in R.

    Every tensor of the state dict is left in absolute value, as the notebooks leave it; α keeps its sign. Each path
    into the last features then has zero mean per channel, so that R is the sum of the biases and the gradients are
    rounding noise.
    """
    with torch.no_grad():
        for tensor in supernet.state_dict().values():
            tensor.abs_()
    weights = {t: a.detach().clone().requires_grad_() for t, a in alphas.items()}
    image = torch.ones_like(batch.images[:1])
    with preserved(supernet, training=True), torch.enable_grad():
        gradients = torch.autograd.grad(supernet(image, weights).sum(), list(weights.values()), materialize_grads=True)
    return {t: (g * w.detach()).abs() for (t, w), g in zip(weights.items(), gradients, strict=True)}


@saliency("released-grasp")
def released_grasp(supernet: nn.Module, alphas: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns α ⊙ ∂(g · ∂L/∂α)/∂α, its second factor taken after one step of Adam (lr 0.03), signed, largest kept.

    That is the notebook for NAS-Bench-201: g is the gradient at the given α; the step then moves each α by ±0.03, many
    times its standard deviation of 1e-3, before the product with the Hessian is taken there.
    """
    weights = {t: a.detach().clone().requires_grad_() for t, a in alphas.items()}
    variables = list(weights.values())
    with preserved(supernet, training=True), torch.enable_grad(), twice_differentiable():
        gradients = torch.autograd.grad(cross_entropy(supernet, batch, weights), variables)
        for v, g in zip(variables, gradients, strict=True):
            v.grad = g.clone()
        torch.optim.Adam(variables, lr=0.03).step()
        moved = torch.autograd.grad(cross_entropy(supernet, batch, weights), variables, create_graph=True)
        product = torch.stack([(g * m).sum() for g, m in zip(gradients, moved, strict=True)]).sum()
        hessian = torch.autograd.grad(product, variables, materialize_grads=True)
    return {t: alphas[t].detach() * h for t, h in zip(weights, hessian, strict=True)}
