"""Tables of cells of NAS-Bench-101 (arXiv:1902.09635) as NAS-Bench-1Shot1 (arXiv:2001.10422) uses them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from fastnas.genotype import OneShotGenotype
from fastnas.tabular.table import Table, numbers, read_csv

COLUMNS: Mapping[str, str] = MappingProxyType({"valid": "mean_val_err", "test": "mean_test_err"})
"""The errors, and the file's columns that hold them unless :func:`load` is told others: a fraction of the images,
CIFAR-10, after 108 epochs, mean over the seeds."""


def load(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] = COLUMNS,
    labels: str = "nodes",
    adjacency: str = "adjacency7x7",
) -> Table:
    """Returns the numbers of the cells in a CSV file; ``find`` takes any genotype that is the same graph.

    A cell that occurs in several rows, numbered in different ways, keeps the first.

    Args:
        path: the file, see :meth:`Table.load`.
        columns: name of a column of the result -> its name in the file.
        labels: the column with the nodes' operations, separated by ``|``, from ``input`` to ``output``.
        adjacency: the column with the adjacency matrix, its rows of 0 and 1 one after another.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no table of such cells, or lacks a column; the message names the file.
    """
    names, texts = read_csv(path)
    for name in (labels, adjacency, *columns.values()):
        if name not in names:
            raise ValueError(f"{path}: no column {name!r}: those there are {', '.join(names)}")
    rows: dict[str, int] = {}
    for n, (operations, bits) in enumerate(zip(texts[labels], texts[adjacency], strict=True)):
        nodes = operations.split("|")
        size = len(nodes)
        if len(bits) != size * size or set(bits) - {"0", "1"}:
            raise ValueError(f"{path}: row {n + 2}: {adjacency!r} must be {size * size} times 0 or 1, got {bits!r}")
        matrix = [[int(bit) for bit in bits[j * size : (j + 1) * size]] for j in range(size)]
        try:
            rows.setdefault(OneShotGenotype.from_table(nodes, matrix).canonical().to_text(), n)
        except ValueError as error:
            raise ValueError(f"{path}: row {n + 2}: {error}") from None
    kept = list(rows.values())
    found = {}
    for new, old in columns.items():
        values = numbers(texts[old])
        if values is None:
            raise ValueError(f"{path}: column {old!r} holds no numbers")
        found[new] = values[kept]
    return Table(list(rows), found, str(path))
