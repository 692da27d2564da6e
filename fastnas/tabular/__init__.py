"""Tables of trained architectures: read once, asked without training anything. Files are yours; none is shipped."""

from __future__ import annotations

import os

from fastnas.tabular import nasbench1shot1, nasbench_macro
from fastnas.tabular.table import Table

__all__ = ["Table", "open_table"]


def open_table(path: str | os.PathLike[str], space: str, key: str = "arch") -> Table:
    """Returns the table of a space's architectures in a CSV file, gzipped or not.

    Args:
        path: The file, see :meth:`Table.load`; for the spaces of NAS-Bench-1Shot1, see
            :func:`fastnas.tabular.nasbench1shot1.load`, for nb-macro :func:`fastnas.tabular.nasbench_macro.load`.
        space: The space's name.
        key: The column that holds the architectures' written form.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no such table; the message names the file.
    """
    if space.startswith("nb1shot1"):
        return nasbench1shot1.load(path)
    if space == "nb-macro":
        return nasbench_macro.load(path, key=key)
    return Table.load(path, key)
