"""Softmax, the relaxation of DARTS (arXiv:1806.09055, Eq. 2), and PC-DARTS' edge normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.relaxations._registry import relaxation


@relaxation("softmax")
def softmax(alphas: Tensor) -> Tensor:
    """Returns exp(alpha_o) / Σ_o' exp(alpha_o') over the last dimension, in the shape of ``alphas`` (E, O)."""
    return torch.softmax(alphas, dim=-1)


def softmax_per_node(betas: Tensor) -> Tensor:
    """Returns the softmax of edge logits over the edges that enter the same node (PC-DARTS, arXiv:1907.05737, Eq. 4).

    Args:
        betas: (E,) logits, ordered by (node, input): 2 edges for the first node, 3 for the second, ...

    Raises:
        ValueError: where E is not 2, 5, 9, 14, ...
    """
    fan_in: list[int] = []
    while sum(fan_in) < betas.numel():
        fan_in.append(len(fan_in) + 2)
    if betas.dim() != 1 or not fan_in or sum(fan_in) != betas.numel():
        raise ValueError(
            f"betas has shape {tuple(betas.shape)}: expected one logit an edge, 2 + 3 + ... for the cell's nodes"
        )
    return torch.cat([torch.softmax(node, dim=0) for node in torch.split(betas, fan_in)])
