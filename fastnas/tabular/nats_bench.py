"""The table of a search from NATS-Bench's own files (arXiv:2009.00437), through its own library.

``pip install fastnas[nats]``, then ``python -m fastnas.tabular.nats_bench NATS-tss-v1_0-3ffb9-simple cells.csv.gz``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastnas._files import write_atomic
from fastnas.tabular.nasbench201 import COLUMNS

# The library's name of a data set, and what it calls the accuracy, for each column.
_ASKED = {
    "cifar10-valid": ("cifar10-valid", "valid-accuracy"),
    "cifar10-test": ("cifar10", "test-accuracy"),
    "cifar100-valid": ("cifar100", "valid-accuracy"),
    "cifar100-test": ("cifar100", "test-accuracy"),
    "imagenet16-valid": ("ImageNet16-120", "valid-accuracy"),
    "imagenet16-test": ("ImageNet16-120", "test-accuracy"),
}


class _Api(Protocol):
    def __len__(self) -> int: ...

    def arch(self, index: int) -> str: ...

    def get_more_info(self, index: int, dataset: str, *, hp: str, is_random: bool) -> dict[str, Any]: ...


def convert(api: _Api, path: str | os.PathLike[str]) -> None:
    """Writes the accuracies of all cells after 200 epochs, mean over the seeds, in the columns that tables have here.

    Args:
        api: what ``nats_bench.create(FILE, "tss", fast_mode=True)`` returns.
        path: a CSV file; gzipped where the name ends in ``.gz``.

    Raises:
        OSError: where the file cannot be written.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["index", "arch", *COLUMNS.values()])
    for index in range(len(api)):
        numbers = []
        for name in COLUMNS:
            data, key = _ASKED[name]
            numbers.append(round(api.get_more_info(index, data, hp="200", is_random=False)[key], 4))
        rows.writerow([index, api.arch(index), *numbers])
    content = text.getvalue().encode()
    if Path(path).suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # the same bytes every time
    write_atomic(path, lambda file: file.write(content))


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts NATS-Bench's topology files, named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastnas.tabular.nats_bench", description=__doc__)
    parser.add_argument(
        "source", help="what nats_bench.create is given: the extracted folder, or the .pickle.pbz2 file"
    )
    parser.add_argument("table", type=Path, help="the CSV file to write; gzipped where its name ends in .gz")
    options = parser.parse_args(arguments)
    try:
        from nats_bench import create
    except ImportError:
        parser.error("NATS-Bench's library is not installed: pip install fastnas[nats]")
    api = create(options.source, "tss", fast_mode=Path(options.source).is_dir(), verbose=False)
    convert(api, options.table)


if __name__ == "__main__":
    main()
