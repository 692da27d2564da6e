"""Jacobian correlation, NASWOT's first version (Mellor et al., arXiv:2006.04647v1, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.nn.preserved import preserved
from fastnas.saliency._registry import Batch, score
from fastnas.saliency._visit import check_images, logits_of

_K = 1e-5  # the paper's k


@score("jacob_cov")
def jacob_cov(network: nn.Module, batch: Batch) -> Tensor:
    """Returns −Σ_i (log(λ_i + k) + 1/(λ_i + k)), k = 1e-5, float64.

    λ_i are the eigenvalues of the correlation matrix of the rows J_n = ∂(Σ logits)/∂x_n, one an image: the logits of
    the whole batch are summed, through batch norms that use its statistics. Labels are not looked at. Where a row is
    constant, as where no path leads from the input to the output, it has no correlation and the score is −inf.

    Raises:
        ValueError: for fewer than two images, or logits that are not finite.
    """
    n = check_images(batch, 2)
    with preserved(network, training=True), torch.enable_grad():
        images = batch.images.detach().clone().requires_grad_()
        total = logits_of(network, images).sum()
        jacobian = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
    if jacobian is None:
        return images.new_full((), -torch.inf, dtype=torch.float64)
    rows = jacobian.reshape(n, -1).double()
    rows = rows - rows.mean(1, keepdim=True)
    lengths = rows.norm(dim=1)
    if (lengths == 0).any():
        return rows.new_full((), -torch.inf)
    rows = rows / lengths[:, None]
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0) + _K
    loss: Tensor = (eigenvalues.log() + 1 / eigenvalues).sum()
    return -loss
