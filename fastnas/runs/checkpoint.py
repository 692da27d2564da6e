"""Checkpoints: one file with everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastnas._files import load_tensors, write_atomic


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one kind of run.

    Attributes:
        kind: Of the run, as messages call it.
        version: Of what is in them.
    """

    kind: str
    version: int

    @property
    def format(self) -> str:
        """What a file says that it is."""
        return f"fastnas {self.kind} checkpoint"

    def save(self, path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        """Writes ``state`` (tensors and plain Python values) to ``path``, atomically.

        Raises:
            OSError: where the file cannot be written.
        """
        content = {"format": self.format, "version": self.version, "state": dict(state)}
        write_atomic(path, lambda file: torch.save(content, file))

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Returns the state that :meth:`save` wrote to ``path``, on the CPU. Nothing in the file is executed.

        Raises:
            CheckpointError: for a missing, damaged or foreign file, or one of a newer version.
            OSError: where the file cannot be read.
        """
        path = Path(path)
        try:
            content = load_tensors(path)
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint {path}; start the {self.kind} anew") from None
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged or is not a checkpoint of fastnas ({error}); "
                f"remove it and start the {self.kind} anew"
            ) from error
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise CheckpointError(f"{path} is not a checkpoint of a fastnas {self.kind}; name the run folder of one")
        if content.get("version") != self.version:
            raise CheckpointError(
                f"{path} has checkpoint version {content.get('version')}, this fastnas reads {self.version}; "
                "resume with the release that wrote it"
            )
        state: dict[str, Any] = content["state"]
        return state

    def check(self, mine: Mapping[str, Any], theirs: Mapping[str, Any], free: Collection[str]) -> None:
        """Checks that a checkpoint is of a run with the same options, but for those that are ``free``.

        Raises:
            CheckpointError: where it is not.
        """
        for name, value in mine.items():
            if name in free:
                continue
            if name not in theirs:
                raise CheckpointError(
                    f"the checkpoint is of a {self.kind} from before there was the option {name}; "
                    "resume with the release that wrote it"
                )
            if value != theirs[name]:
                raise CheckpointError(
                    f"the checkpoint is of a {self.kind} with {name}={theirs[name]!r}, this one has "
                    f"{name}={value!r}; resume with the options of the checkpoint"
                )

    def compare(self, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """Warns where a checkpoint is of another machine (:func:`fastnas.runs.machine.describe`)."""
        for name, now in mine.items():
            if (then := theirs.get(name)) != now:
                warnings.warn(
                    f"the checkpoint was written with {name} {then}, this is {now}: the {self.kind} goes on, "
                    "but not with the same bits",
                    stacklevel=3,
                )
