"""Softmax, the relaxation of DARTS (arXiv:1806.09055, Eq. 2), and PC-DARTS' edge normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.relaxations._registry import relaxation


@relaxation("softmax")
def softmax(alphas: Tensor) -> Tensor:
    """Returns exp(alpha_o) / Σ_o' exp(alpha_o') over the last dimension, in the shape of ``alphas`` (E, O)."""
    return torch.softmax(alphas, dim=-1)


def softmax_per_node(betas: Tensor, fan_in: Sequence[int] | None = None) -> Tensor:
    """Returns the softmax of edge logits over the edges that enter the same node (PC-DARTS, arXiv:1907.05737, Eq. 4).

    Args:
        betas: (E,) logits, ordered by (node, input).
        fan_in: edges of each node; 2, 3, ..., as in the space of DARTS, where None.

    Raises:
        ValueError: where the nodes have other than E edges.
    """
    if fan_in is None:
        fan_in = []
        while sum(fan_in) < betas.numel():
            fan_in.append(len(fan_in) + 2)
    if betas.dim() != 1 or not fan_in or sum(fan_in) != betas.numel():
        raise ValueError(
            f"betas has shape {tuple(betas.shape)}: expected one logit an edge, {' + '.join(map(str, fan_in)) or 2}"
        )
    return torch.cat([torch.softmax(node, dim=0) for node in torch.split(betas, list(fan_in))])
