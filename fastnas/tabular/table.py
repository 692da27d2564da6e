"""A table of architectures and numbers, read from a CSV file."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastnas.genotype import AnyGenotype, OneShotGenotype


class Table:
    """One row an architecture: its written form and numbers.

    Args:
        rows: the written form of each row's architecture.
        columns: name -> one number a row; NaN where there is none.
        name: what messages call the table.

    Raises:
        ValueError: where a column has another length, or an architecture occurs twice.
    """

    def __init__(self, rows: Sequence[str], columns: Mapping[str, npt.ArrayLike], name: str = "table") -> None:
        self._name = name
        self._rows = tuple(rows)
        self._index = {row: n for n, row in enumerate(self._rows)}
        self._columns = {key: np.asarray(values, np.float64) for key, values in columns.items()}
        for key, values in self._columns.items():
            if values.shape != (len(self._rows),):
                raise ValueError(f"{name}: column {key!r} has shape {values.shape}, expected ({len(self._rows)},)")
            values.flags.writeable = False
        if len(self._index) < len(self._rows):
            twice = next(row for n, row in enumerate(self._rows) if self._index[row] != n)
            raise ValueError(f"{name}: the architecture {twice} has two rows: remove one")

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: str = "arch") -> Table:
        """Returns the table in a CSV file with a line of names; nothing in it is executed.

        Columns of numbers are kept, an empty field is NaN; columns that hold any other text are left out.

        Args:
            path: the file; one that ends in ``.gz`` is decompressed.
            key: the column that holds the architectures' written form.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it is no such table; the message names the file.
        """
        names, columns = read_csv(path)
        if key not in names:
            raise ValueError(f"{path}: no column {key!r}: those there are {', '.join(names)}")
        found = {name: values for name in names if name != key and (values := numbers(columns[name])) is not None}
        return cls(columns[key], found, str(path))

    def __len__(self) -> int:
        """Returns the number of architectures."""
        return len(self._rows)

    def __contains__(self, architecture: object) -> bool:
        """Tells whether the table has an architecture, a genotype or its written form."""
        return _text(architecture) in self._index

    @property
    def rows(self) -> tuple[str, ...]:
        """The architectures' written forms, in the order of the columns' numbers."""
        return self._rows

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of numbers."""
        return tuple(self._columns)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Returns a column, one number an architecture, read-only.

        Raises:
            ValueError: where there is none of that name; the message lists those there.
        """
        if name not in self._columns:
            raise ValueError(f"{self._name}: no column {name!r}: those there are {', '.join(self._columns)}")
        return self._columns[name]

    def find(self, architecture: AnyGenotype | str) -> dict[str, float]:
        """Returns an architecture's row, by the names of the columns.

        Args:
            architecture: a genotype, or its written form as the table has it. A :class:`OneShotGenotype` is found by
                its :meth:`~OneShotGenotype.canonical` form, that is, up to isomorphism.

        Raises:
            ValueError: where the table does not have it.
        """
        row = self._index.get(_text(architecture))
        if row is None:
            raise ValueError(f"{self._name}: the architecture {_text(architecture)} is not among its {len(self)} rows")
        return {name: float(values[row]) for name, values in self._columns.items()}

    def select(self, names: Mapping[str, str]) -> Table:
        """Returns the table with some columns only, under other names.

        Args:
            names: new name -> name of a column here.

        Raises:
            ValueError: where there is no such column.
        """
        return Table(self._rows, {new: self.column(old) for new, old in names.items()}, self._name)


def read_csv(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the names in the first line of a CSV file, gzipped or not, and the columns' texts.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no CSV file with as many fields in every line; the message names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from None
    if len(lines) < 2:
        raise ValueError(f"{path}: expected a line of names and at least one row, got {len(lines)} lines")
    names = lines[0]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(names):
            raise ValueError(f"{path}: row {number} has {len(line)} fields, the names are {len(names)}")
    return names, dict(zip(names, (list(column) for column in zip(*lines[1:], strict=True)), strict=True))


def numbers(texts: list[str]) -> npt.NDArray[np.float64] | None:
    """Returns the numbers in a column, NaN for an empty field; None where it holds anything else."""
    try:
        return np.array([float(text) if text.strip() else np.nan for text in texts])
    except ValueError:
        return None


def _text(architecture: object) -> str:
    if isinstance(architecture, OneShotGenotype):
        architecture = architecture.canonical()
    return architecture if isinstance(architecture, str) else architecture.to_text()  # type: ignore[attr-defined]
