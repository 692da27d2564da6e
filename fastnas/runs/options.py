"""Options of runs: frozen dataclasses whose values are checked by name, and that YAML can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, asdict, fields
from typing import Any, TypeVar

Range = tuple[Callable[[Any], bool], str]
"""Whether a value is accepted, and what is expected in words."""

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "str | None": ((str, type(None)), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "tuple[float, float]": ((tuple,), "two numbers"),
    "list[float]": ((list,), "a list of numbers"),
    "list[str]": ((list,), "a list of names"),
    "list[list[int]]": (
        (list,),
        "a list of stages [k, operations, epochs, warm-up], such as [[4,5,50,10],[2,3,50,10]]",
    ),
}


def describe_type(options: Any, name: str) -> str:
    """Returns what values the option ``name`` of a dataclass takes, in words: "a number"."""
    return next(_TYPES[str(field.type)][1] for field in fields(options) if field.name == name)


def check(options: Any, ranges: Mapping[str, Range]) -> None:
    """Checks every value of a frozen dataclass; lists and tuples become what the annotation says.

    Raises:
        ValueError: for a value out of its range; the message names the option and what it accepts.
        TypeError: for a value of the wrong type.
    """
    for field in fields(options):
        _check_type(options, field)
    for name, (accepts, meaning) in ranges.items():
        value = getattr(options, name)
        if not accepts(value):
            raise ValueError(f"{name}={value!r}: expected {meaning}")


def _check_type(options: Any, field: Field[Any]) -> None:
    annotation, value = str(field.type), getattr(options, field.name)
    # YAML has no tuples, and a preset none of the lists that YAML has.
    if isinstance(value, (list, tuple)):
        value = plain(value) if annotation.startswith("list") else tuple(value)
        object.__setattr__(options, field.name, value)
    check_type(field.name, value, annotation)


def check_type(name: str, value: Any, annotation: str) -> None:
    """Checks the value of an option.

    Raises:
        TypeError: where it is not what the annotation says.
    """
    types, meaning = _TYPES[annotation]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name}={value!r}: expected {meaning}")


def plain(values: Iterable[Any]) -> list[Any]:
    """Returns the values with lists in place of tuples, at any depth."""
    return [plain(v) if isinstance(v, (list, tuple)) else v for v in values]


def to_dict(options: Any) -> dict[str, Any]:
    """Returns a dataclass' options as plain values that YAML and JSON can hold; :func:`from_dict` reads them back."""
    return {k: plain(v) if isinstance(v, (list, tuple)) else v for k, v in asdict(options).items()}


_T = TypeVar("_T")


def from_dict(cls: type[_T], options: Mapping[str, Any], command: str) -> _T:
    """Returns an instance of the dataclass ``cls``, whose options ``fastnas <command> --help`` lists.

    Raises:
        ValueError: for an unknown option or a value that makes no sense.
        TypeError: for a value of the wrong type.
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := [str(name) for name in options if name not in known]:
        raise ValueError(f"unknown option {min(unknown)!r}; `fastnas {command} --help` lists the options")
    return cls(**options)


def two(accepts: Callable[[float], bool]) -> Callable[[Any], bool]:
    """Returns whether a value is a pair of numbers that ``accepts`` takes."""
    return lambda pair: len(pair) == 2 and all(type(v) in (int, float) and accepts(v) for v in pair)


def one_of(names: Collection[str]) -> Range:
    """Returns the range of these names."""
    return (lambda v: v in names, f"one of {', '.join(names)}")


POSITIVE_INT: Range = (lambda v: v >= 1, "a whole number of at least 1")
WHOLE: Range = (lambda v: v >= 0, "a whole number of at least 0")
POSITIVE: Range = (lambda v: 0 < v < math.inf, "a number above 0")
NOT_NEGATIVE: Range = (lambda v: 0 <= v < math.inf, "a number of at least 0")
BELOW_ONE: Range = (lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
SEED: Range = (lambda v: 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1")
STAGES_MEANING = _TYPES["list[list[int]]"][1]
