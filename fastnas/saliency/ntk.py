"""The condition of the neural tangent kernel (TE-NAS, Chen et al., arXiv:2102.11535, section 3.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.nn.preserved import preserved
from fastnas.saliency._registry import Batch, score
from fastnas.saliency._visit import check_images, logits_of

_COLUMNS = 2**18  # parameters whose float64 copies exist at the same time


@score("ntk")
def ntk(network: nn.Module, batch: Batch) -> Tensor:
    """Returns −κ, κ = λ_max / λ_min of the tangent kernel, float64: higher is easier to train.

    −inf where the kernel is singular, that is, where λ_min is not above the rounding error of its entries. It takes one
    backward of the whole batch an image. Labels are not looked at.

    Raises:
        ValueError: for fewer than two images, a network without weights, or logits that are not finite.
    """
    kernel = tangent_kernel(network, batch)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    smallest, largest = eigenvalues[0], eigenvalues[-1]
    # An error of eps in the gradients moves singular values, the roots of these, by eps of the largest.
    noise = len(kernel) * (torch.finfo(torch.float64).eps + torch.finfo(batch.images.dtype).eps ** 2) * largest
    return torch.where(smallest > noise, -largest / smallest, -torch.inf)


def tangent_kernel(network: nn.Module, batch: Batch) -> Tensor:
    """Returns Θ_nm = ⟨∂f_n/∂W, ∂f_m/∂W⟩, (N, N) float64, f_n the sum of image n's logits.

    As in TE-NAS, the logits come from one forward of the whole batch through batch norms that use its statistics. So
    f_n depends on all images, and its gradient is not that of the image alone: one backward an image of the whole
    batch. W are the parameters named ``weight``: all but biases.

    Raises:
        ValueError: for fewer than two images, a network without weights, or logits that are not finite.
    """
    n = check_images(batch, 2)
    named = network.named_parameters()
    weights = [p for name, p in named if name.rpartition(".")[2] == "weight" and p.requires_grad]
    if not weights:
        raise ValueError("network has no parameter named weight that requires a gradient: they make the kernel")
    with preserved(network, training=True), torch.enable_grad():
        outputs = logits_of(network, batch.images).sum(1)
        rows = torch.zeros(n, sum(w.numel() for w in weights), dtype=outputs.dtype, device=outputs.device)
        for i in range(n):
            gradients = torch.autograd.grad(outputs[i], weights, retain_graph=i + 1 < n, allow_unused=True)
            for part, g in zip(torch.split(rows[i], [w.numel() for w in weights]), gradients, strict=True):
                if g is not None:
                    part.copy_(g.reshape(-1))
    kernel = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    for columns in torch.split(rows, _COLUMNS, dim=1):
        columns = columns.double()
        kernel.addmm_(columns, columns.T)
    return kernel
