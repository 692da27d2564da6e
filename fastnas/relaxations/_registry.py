from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastnas._registry import Registry

Relaxation = Callable[[Tensor], Tensor]

RELAXATIONS: Registry[Relaxation] = Registry("relaxation")


def relaxation(name: str) -> Callable[[Relaxation], Relaxation]:
    """Returns a decorator that registers a function from alphas to weights under ``name``.

    Raises:
        ValueError: where ``name`` is taken by another function.
    """
    return RELAXATIONS.named(name)


def get_relaxation(name: str) -> Relaxation:
    """Returns the relaxation registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return RELAXATIONS.find(name)
