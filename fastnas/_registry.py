"""Things of one kind, each under a name of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_U = TypeVar("_U")


class Registry(dict[str, T]):
    """Names and what they stand for.

    Args:
        kind: what messages call an entry.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def add(self, name: str, value: _U) -> _U:
        """Returns ``value`` after adding it under ``name``.

        Raises:
            ValueError: where the name is taken.
        """
        if name in self:
            raise ValueError(f"{self._kind} {name!r} is already registered: choose another name")
        self[name] = value  # type: ignore[assignment]
        return value

    def named(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that adds what it is given under ``name``.

        Raises:
            ValueError: where the name is taken.
        """
        return lambda value: self.add(name, value)

    def find(self, name: str) -> T:
        """Returns what was added under ``name``.

        Raises:
            ValueError: for an unknown name; the message lists the known ones.
        """
        try:
            return self[name]
        except KeyError:
            raise ValueError(f"{self._kind} {name!r} is unknown: expected one of {', '.join(sorted(self))}") from None
