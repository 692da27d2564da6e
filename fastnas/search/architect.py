"""The architecture step: where the gradient of the alphas comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and their labels (N,)."""


@dataclass(frozen=True)
class Bilevel:
    """The two levels of a search (arXiv:1806.09055, Eq. 3-4), as an architecture step sees them.

    Attributes:
        supernet: The network whose parameters are the lower level.
        optimizer: Trains those parameters; its state is what an unrolled step needs.
        alphas: The upper level: name -> (edges, primitives), leaves that require gradients.
        loss: Returns the mean loss and the logits of a batch at the current alphas and parameters.
    """

    supernet: nn.Module
    optimizer: torch.optim.Optimizer
    alphas: Mapping[str, Tensor]
    loss: Callable[[Batch], tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> list[Tensor]:
        """The lower level's tensors, as the optimizer has them: walking the modules takes longer than the update."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


Architect = Callable[[Bilevel, Batch, Batch], tuple[Tensor, Tensor]]
"""``architect(bilevel, train, valid)`` sets the alphas' ``grad`` and returns the loss and logits on ``valid``."""


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Runs the block with none of ``parameters`` requiring gradients, and restores each one's flag after it."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def first_order(bilevel: Bilevel, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
    """Returns the loss and logits on ``valid``, whose gradient the alphas get (arXiv:1806.09055, Eq. 7 with xi = 0).

    The parameters are taken as they are, so ``train`` has no part in it, and their gradients are neither computed nor
    stored.
    """
    with frozen(bilevel.parameters):
        loss, logits = bilevel.loss(valid)
        alphas = list(bilevel.alphas.values())
        for alpha, grad in zip(alphas, torch.autograd.grad(loss, alphas), strict=True):
            alpha.grad = grad
    return loss.detach(), logits.detach()
