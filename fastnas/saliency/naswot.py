"""NASWOT: how well the ReLUs' on-off patterns tell images apart (Mellor et al., arXiv:2006.04647, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.saliency._registry import Batch, score
from fastnas.saliency._visit import active_units, check_images

_EXACT = 2**24  # counts up to this are exact in float32


@score("naswot")
def naswot(network: nn.Module, batch: Batch) -> Tensor:
    """Returns log|det K|, K_ij = N_A − d_H(c_i, c_j), float64.

    c_i is the binary code of image i: which of the N_A units behind the network's ReLUs are active; d_H is the Hamming
    distance. Each call of an ``nn.ReLU`` or ``nn.ReLU6`` that the logits depend on counts; batch norms use the batch's
    statistics. Labels are not looked at. Where two images have the same code, the determinant is 0 and the score −inf.

    Raises:
        ValueError: for fewer than two images, a network that calls no ``nn.ReLU``, or logits that are not finite.
    """
    n = check_images(batch, 2)
    kernel = torch.zeros(n, n, dtype=torch.float64, device=batch.images.device)
    for active in active_units(network, batch.images):
        for part in torch.split(active, _EXACT, dim=1):
            code = part.float()
            both = (code @ code.T).double()  # units that are active for both images
            own = both.diagonal()
            # Units that agree: active for both or for neither.
            kernel.add_(both, alpha=2).add_(part.shape[1]).sub_(own[:, None] + own)
    # LU would give rounding noise for a determinant of 0.
    same = (kernel == kernel[0, 0]).sum() > n
    sign, logdet = torch.linalg.slogdet(kernel)
    return torch.where(same | (sign <= 0), -torch.inf, logdet)
