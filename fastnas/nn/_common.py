"""What networks do alike: checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import SupportsIndex

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


def check_choice(name: str, choice: int, candidates: int) -> None:
    """Checks that a choice is the index of a candidate.

    Raises:
        TypeError: where it is no whole number; also where it is a tensor, which may lie on another device.
        ValueError: where there is no such candidate.
    """
    if type(choice) is not int and (isinstance(choice, Tensor) or not isinstance(choice, SupportsIndex)):
        raise TypeError(f"{name} is a {type(choice).__name__}: expected an int; a tensor's .tolist() gives some")
    if not 0 <= choice < candidates:
        raise ValueError(f"{name}={choice}: expected 0 to {candidates - 1}, one of the edge's {candidates} candidates")


def check_primitives(primitives: Sequence[str]) -> None:
    """Checks that primitives are a sequence of known names.

    Raises:
        ValueError: where they are not; the message lists the known ones.
    """
    unknown = [p for p in primitives if p not in OPS]
    if isinstance(primitives, str) or unknown:
        raise ValueError(f"primitives: {unknown or primitives!r} not known; choose from {', '.join(OPS)}")
