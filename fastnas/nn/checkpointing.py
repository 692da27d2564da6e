"""Cells whose feature maps are computed again in the backward instead of being kept (arXiv:1604.06174)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def run_cell(cell: nn.Module, *args: object, again: bool) -> Tensor:
    """Returns ``cell(*args)``.

    Args:
        cell: called with the arguments.
        args: what the cell reads.
        again: keep only the arguments for the backward, which calls the cell once more. Random numbers are the same
            then, and running statistics move only the first time.
    """
    y: Tensor
    if again and torch.is_grad_enabled():
        y = checkpoint(cell, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Settled(cell)))
    else:
        y = cell(*args)
    return y


class _Settled:
    """Keeps a module's running statistics from moving in the block: norms in training get others to move.

    They cannot be told to keep none, since the first call and the next have to save as many tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        norms = [m for m in self._module.modules() if isinstance(m, _NormBase) and m.training]
        self._kept = [(n._buffers, dict(n._buffers)) for n in norms]
        for buffers, kept in self._kept:
            for name in ("running_mean", "running_var"):
                value = kept.get(name)
                if value is not None:  # in training, nobody reads them
                    buffers[name] = torch.empty_like(value)
            if "num_batches_tracked" in kept:
                buffers["num_batches_tracked"] = None

    def __exit__(self, *_: object) -> None:
        for buffers, kept in self._kept:
            buffers.update(kept)
