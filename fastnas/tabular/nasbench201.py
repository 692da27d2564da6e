"""Tables of NAS-Bench-201 (arXiv:2001.00326) and NATS-Bench (arXiv:2009.00437): accuracies of all 15,625 cells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from fastnas.genotype import NASBench201Genotype
from fastnas.tabular.table import Table

COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "cifar10-valid": "c10_valid_e200",
        "cifar10-test": "c10_test_e200",
        "cifar100-valid": "c100_valid_e200",
        "cifar100-test": "c100_test_e200",
        "imagenet16-valid": "in16_valid_e200",
        "imagenet16-test": "in16_test_e200",
    }
)
"""The accuracies, and the file's columns that hold them unless :func:`load` is told others: percent after 200 epochs,
mean over the seeds. On CIFAR-10, valid is of networks trained on half of the training images, test on all."""


def load(path: str | os.PathLike[str], columns: Mapping[str, str] = COLUMNS, key: str = "arch") -> Table:
    """Returns the accuracies of the cells in a CSV file, in percent, under the names in :data:`COLUMNS`.

    Args:
        path: the file, see :meth:`Table.load`.
        columns: name of a column of the result -> its name in the file.
        key: the column of the file that holds the cells in the benchmark's notation.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no table of such cells, or lacks a column; the message names the file.
    """
    table = Table.load(path, key)
    for row in table.rows:
        try:
            genotype = NASBench201Genotype.from_text(row)
        except ValueError as error:
            raise ValueError(f"{path}: column {key!r}: {error}") from None
        if genotype.to_text() != row:
            raise ValueError(f"{path}: column {key!r} has {row}: expected {genotype.to_text()}")
    return table.select(columns)
