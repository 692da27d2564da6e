"""What networks do alike: checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastnas.nn.operations import OPS

Between = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""A function of the states that the next cell reads, which returns what it reads instead."""


def check_sizes(**sizes: int) -> None:
    """Checks that sizes are at least 1.

    Raises:
        ValueError: naming the one that is not.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_primitives(primitives: Sequence[str]) -> None:
    """Checks that primitives are a sequence of known names.

    Raises:
        ValueError: where they are not; the message lists the known ones.
    """
    unknown = [p for p in primitives if p not in OPS]
    if isinstance(primitives, str) or unknown:
        raise ValueError(f"primitives: {unknown or primitives!r} not known; choose from {', '.join(OPS)}")
