"""Checkpoints: one file with everything that a search needs to go on as if it had never stopped."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastnas._files import write_atomic

FORMAT = "fastnas search checkpoint"
VERSION = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes ``state`` (tensors and plain Python values) to ``path``, atomically.

    Raises:
        OSError: where the file cannot be written.
    """
    content = {"format": FORMAT, "version": VERSION, "state": dict(state)}
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the state that :func:`save` wrote to ``path``, on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: for a missing, damaged or foreign file, or one of a newer version.
        OSError: where the file cannot be read.
    """
    path = Path(path)
    try:
        file = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; start the search anew") from None
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("no zip archive")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        raise CheckpointError(
            f"{path} is damaged or is not a checkpoint of fastnas ({_first_line(error)}); "
            "remove it and start the search anew"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a fastnas search; name the run folder of one")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')}, this fastnas reads {VERSION}; "
            "resume with the release that wrote it"
        )
    state: dict[str, Any] = content["state"]
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
