from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.saliency._registry import Batch


def cross_entropy(network: nn.Module, batch: Batch, *weights: Any) -> Tensor:
    """Returns the mean cross-entropy of ``network(images, *weights)``.

    Raises:
        ValueError: where the batch cannot give a loss that tells candidates apart, or the loss is not finite.
    """
    check_batch(batch)
    logits = network(batch.images, *weights)
    if not isinstance(logits, Tensor):
        raise ValueError(f"network must return logits (N, classes), got {type(logits).__name__}: wrap it in a module")
    if int(batch.labels.max()) >= logits.shape[1] or int(batch.labels.min()) < 0:
        raise ValueError(
            f"batch.labels are from {int(batch.labels.min())} to {int(batch.labels.max())}, but the network has "
            f"{logits.shape[1]} logits: build it with num_classes={int(batch.labels.max()) + 1} or more"
        )
    loss = F.cross_entropy(logits, batch.labels)
    if not torch.isfinite(loss):
        raise ValueError(f"batch: the loss is {loss.item()}: check images for NaN and their scale")
    return loss


def check_batch(batch: Batch) -> None:
    """Raises ValueError where a loss of the batch says nothing: it is empty, or of one class."""
    images, labels = batch
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"batch.images has shape {tuple(images.shape)}: expected (N, C, H, W) with N at least 1")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"batch.labels has shape {tuple(labels.shape)}, {labels.dtype}: expected ({len(images)},), int64"
        )
    if len(images) > 1 and bool((labels == labels[0]).all()):
        raise ValueError(f"batch: all {len(images)} labels are {int(labels[0])}: draw a batch with several classes")
