"""Fisher: what removing channels would do to the loss (Theis et al., arXiv:1801.05787, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.nn.hooked import LAYERS, hooked
from fastnas.nn.preserved import preserved
from fastnas.saliency._loss import cross_entropy
from fastnas.saliency._registry import Batch, score


@score("fisher")
def fisher(network: nn.Module, batch: Batch) -> Tensor:
    """Returns Σ_k Δ_k over the output channels k of every convolution and linear layer, float64.

    Δ_k = 1/(2N) Σ_n g_nk² with g_nk = Σ_ij a_nkij ∂L/∂a_nkij, where a is the layer's output and L the sum of the
    images' cross-entropies. Whole networks are compared by it in BlockSwap (Turner et al., arXiv:1906.04113) and
    arXiv:2101.08134, whose code takes the mean cross-entropy: 1/N² of this. Batch norms use the batch's statistics.

    Raises:
        ValueError: for an empty batch, one of a single class, labels out of range, a loss that is not finite, or a
            network without such layers.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # what follows may be a ReLU in place

    with preserved(network, training=True), hooked(network, LAYERS, keep), torch.enable_grad():
        loss = cross_entropy(network, batch) * len(batch.images)
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    total = torch.zeros((), dtype=torch.float64, device=batch.images.device)
    for a, g in zip(outputs, gradients, strict=True):
        if g is not None:
            product = a.detach() * g
            per_channel = product.flatten(2).sum(2) if product.dim() > 2 else product  # (N, K)
            total += per_channel.double().square().sum() / (2 * len(batch.images))
    return total
