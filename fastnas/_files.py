"""Files that appear whole or not at all, and that nothing is executed of."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

HALF_WRITTEN = ".*.[0-9]*.tmp"
"""What :func:`write_atomic` leaves where its process is killed."""


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all: ``write`` fills a temporary file beside ``path``, which then takes its place.

    Raises:
        OSError: where the file cannot be written; what was at ``path`` is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8, as :func:`write_atomic` does."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_table(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a CSV file, as :func:`write_atomic` does; what a row does not have is an empty field."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, by column.

    Raises:
        OSError: where the file cannot be read.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, restval=""))


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Returns what ``torch.save`` wrote to a file, on the CPU. Nothing in the file is executed.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is damaged or holds more than tensors and plain values; the message is the reason alone.
    """
    import torch

    file = io.BytesIO(Path(path).read_bytes())
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("no zip archive")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        raise ValueError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without a full stop; of one without a message, its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
