from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved(network: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Runs the block with the network in the given mode, and puts back buffers, gradients and modes afterwards.

    Args:
        network: Its parameters are not looked after: don't change them in the block.
        training: The mode of all modules in the block; None leaves them as they are.
    """
    modes = [(m, m.training) for m in network.modules()]
    buffers = [(b, b.detach().clone()) for b in network.buffers()]
    gradients: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in network.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        if training is not None:
            network.train(training)
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for b, value in buffers:
                b.copy_(value)
        for m, mode in modes:
            m.training = mode
