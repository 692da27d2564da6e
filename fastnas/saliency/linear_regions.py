"""The number of linear regions that images fall into (TE-NAS, Chen et al., arXiv:2102.11535, section 3.1.2)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastnas.saliency._registry import Batch, score
from fastnas.saliency._visit import active_units, check_images


@score("linear_regions")
def linear_regions(network: nn.Module, batch: Batch) -> Tensor:
    """Returns how many different activation patterns the network's ReLUs have on the batch's images, float64.

    Between the boundaries of such patterns a network of ReLUs is linear. The count is at most the number of
    images, and a network of usual width reaches that: take a narrow one (one channel, one cell a stage), small
    images and thousands of them, as TE-NAS does. Each call of an ``nn.ReLU`` that the logits depend on counts, and of
    an ``nn.ReLU6`` its lower bound; batch norms use the batch's statistics. Labels are not looked at.

    Raises:
        ValueError: for an empty batch, a network that calls no ``nn.ReLU``, or logits that are not finite.
    """
    check_images(batch)
    units = active_units(network, batch.images)
    if not units:
        return torch.ones((), dtype=torch.float64)  # the logits depend on no ReLU: one linear map
    rows = np.concatenate([np.packbits(active.cpu().numpy(), axis=1) for active in units], axis=1)
    distinct = len(np.unique(rows.view(np.dtype((np.void, rows.shape[1])))))
    return torch.tensor(float(distinct), dtype=torch.float64)
