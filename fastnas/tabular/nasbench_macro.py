"""Tables of NAS-Bench-Macro (arXiv:2103.11922): all 6,561 chains, trained three times each on CIFAR-10."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from fastnas.tabular.table import Table

COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "cifar10-test": "mean_acc",
        "cifar10-test-std": "std",
        "cifar10-test-run1": "test_acc_run1",
        "cifar10-test-run2": "test_acc_run2",
        "cifar10-test-run3": "test_acc_run3",
        "params": "params",
        "flops": "flops",
    }
)
"""Test accuracies in percent, their mean over three runs and its standard deviation (with n in the denominator),
parameters and multiply-adds; and the file's columns that hold them unless :func:`load` is told others. A file needs not
have all of them."""


def load(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None, key: str = "arch") -> Table:
    """Returns the numbers of the chains in a CSV file, under the names in :data:`COLUMNS`.

    Args:
        path: the file, see :meth:`Table.load`.
        columns: name of a column of the result -> its name in the file; where None, those of :data:`COLUMNS` that the
            file has.
        key: the column of the file that holds the chains, a digit a layer.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no table of such chains, or lacks a column; the message names the file.
    """
    table = Table.load(path, key)
    for row in table.rows:
        if len(row) != len(table.rows[0]) or set(row) - set("012"):
            raise ValueError(f"{path}: column {key!r} has {row}: expected {len(table.rows[0])} digits from 0 to 2")
    if columns is None:
        columns = {new: old for new, old in COLUMNS.items() if old in table.columns} or COLUMNS
    return table.select(columns)
