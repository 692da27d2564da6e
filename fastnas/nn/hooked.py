"""Forward hooks for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""The layers whose weights published scores look at, and whose multiply-adds papers count."""


@contextmanager
def hooked(
    network: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...], hook: Callable[..., Any]
) -> Iterator[None]:
    """Runs the block with a forward hook on every module of some kinds; it is removed afterwards, also after an error.

    Raises:
        ValueError: where the network has no such module.
    """
    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, kinds)]
    try:
        if not handles:
            names = ", ".join(k.__name__.lstrip("_") for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise ValueError(f"network has no module of kind {names}, and no other is looked at")
        yield
    finally:
        for handle in handles:
            handle.remove()
