"""Size as a score: parameters and multiply-adds, the baselines that a score has to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.nn.counting import count
from fastnas.saliency._registry import Batch, score
from fastnas.saliency._visit import check_images


@score("params")
def params(network: nn.Module, batch: Batch) -> Tensor:
    """Returns the number of the network's parameters, float64. The batch is not looked at."""
    return torch.tensor(float(sum(p.numel() for p in network.parameters())), dtype=torch.float64)


@score("flops")
def flops(network: nn.Module, batch: Batch) -> Tensor:
    """Returns the multiply-adds of convolutions and linear layers for one image of the batch's shape, float64.

    Raises:
        ValueError: for an empty batch.
    """
    check_images(batch)
    return torch.tensor(float(count(network, batch.images.shape[1:]).multiply_adds), dtype=torch.float64)
