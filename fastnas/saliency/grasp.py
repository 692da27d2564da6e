"""GraSP: the change of the gradient's norm if a connection were cut (arXiv:2002.07376, Eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastnas import twice_differentiable
from fastnas.nn.preserved import preserved
from fastnas.saliency._loss import cross_entropy
from fastnas.saliency._registry import Batch, saliency, score


def hessian_gradient_product(loss: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """Returns H g with g = ∂loss/∂variables and H = ∂²loss/∂variables²; the graph must be twice differentiable."""
    gradients = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
    product = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
    return list(torch.autograd.grad(product, variables, materialize_grads=True))


@saliency("grasp")
def grasp(supernet: nn.Module, alphas: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns (H ∂L/∂α) ⊙ α of every candidate, so that the smallest of GraSP's S = −(H ∂L/∂α) ⊙ α are kept.

    Cutting a candidate changes the squared norm of the gradient by twice S: GraSP removes what has the largest S, since
    the gradient then flows better (arXiv:2002.07376, section 4.1). :func:`grasp_largest` has the other sign. H is the
    exact Hessian over α; L is the cross-entropy of one mini-batch, batch norm takes its statistics. ``none`` has 0.

    Raises:
        ValueError: for an empty batch, one of a single class, labels out of range, or a loss that is not finite.
    """
    weights = {t: a.detach().clone().requires_grad_() for t, a in alphas.items()}
    with preserved(supernet, training=True), torch.enable_grad(), twice_differentiable():
        products = hessian_gradient_product(cross_entropy(supernet, batch, weights), list(weights.values()))
    return {t: w.detach() * h for (t, w), h in zip(weights.items(), products, strict=True)}


@saliency("grasp-largest")
def grasp_largest(supernet: nn.Module, alphas: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns −(H ∂L/∂α) ⊙ α of every candidate: Algorithm 1 of FreeDARTS (arXiv:2106.11542) to the letter.

    Raises:
        ValueError: as :func:`grasp`.
    """
    return {t: -s for t, s in grasp(supernet, alphas, batch).items()}


@score("grasp")
def network_grasp(network: nn.Module, batch: Batch) -> Tensor:
    """Returns −Σ_θ θ (H g) over the weights of convolutions and linear layers, 0-d (arXiv:2101.08134, Eq. 1).

    Raises:
        ValueError: as :func:`grasp`.
    """
    layers = (m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    parameters = [p for p in dict.fromkeys(m.weight for m in layers) if p.requires_grad]
    if not parameters:
        raise ValueError("network has no convolutions or linear layers whose weights require grad: GraSP scores those")
    with preserved(network, training=True), torch.enable_grad(), twice_differentiable():
        products = hessian_gradient_product(cross_entropy(network, batch), parameters)
    return -torch.stack([(p.detach() * h).sum() for p, h in zip(parameters, products, strict=True)]).sum()
