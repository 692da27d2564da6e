from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Relaxation = Callable[[Tensor], Tensor]

RELAXATIONS: dict[str, Relaxation] = {}


def relaxation(name: str) -> Callable[[Relaxation], Relaxation]:
    """Returns a decorator that registers a function from alphas to weights under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """

    def register(function: Relaxation) -> Relaxation:
        if name in RELAXATIONS:
            raise ValueError(f"relaxation {name!r} is already registered: choose another name")
        RELAXATIONS[name] = function
        return function

    return register


def get_relaxation(name: str) -> Relaxation:
    """Returns the relaxation registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    try:
        return RELAXATIONS[name]
    except KeyError:
        raise ValueError(f"relaxation {name!r} is unknown: expected one of {', '.join(sorted(RELAXATIONS))}") from None
