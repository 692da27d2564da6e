"""Run folders: what a run leaves on disk."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import yaml

from fastnas import __version__
from fastnas._files import HALF_WRITTEN, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_EVENTS = "events.out.tfevents.*"


class Folder:
    """The folder of one run; use it as a context manager around the run.

    Args:
        path: The folder.
    """

    COMMAND: ClassVar[str]
    """The subcommand whose runs these are."""
    KIND: ClassVar[str]
    """What one is called, with its article."""
    FILES: ClassVar[tuple[str, ...]]
    """What a run writes beside TensorBoard's events; ``config.yaml`` tells a run's folder from others."""
    GROUPS: ClassVar[tuple[type, ...]]
    """The option groups, in the order in which they are written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> Any:
        for half in self.path.glob(HALF_WRITTEN):  # by a process that was killed
            half.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def check_free(self, *, overwrite: bool) -> None:
        """Checks that a new run may use the folder.

        Raises:
            FileExistsError: where it holds files, and they are not those of a run that may be overwritten.
            NotADirectoryError: where the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; choose a folder for the run")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.exists():
            raise FileExistsError(
                f"{self.path} is not empty and holds no run of fastnas {self.COMMAND}; choose another folder (--out)"
            )
        if not overwrite:
            raise FileExistsError(
                f"{self.path} holds a run already; continue it with --resume, replace it with --overwrite, "
                "or choose another folder (--out)"
            )

    def _start(self, options: Mapping[str, Any], *, overwrite: bool) -> None:
        """Makes the folder for a new run, without the files of an earlier one, and writes its ``config.yaml``."""
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        for old in [*(self.path / name for name in self.FILES), *self.path.glob(_EVENTS)]:
            old.unlink(missing_ok=True)
        write_text(self.path / "config.yaml", self.dump(options))

    def options(self) -> dict[str, Any]:
        """Returns the options of the run in this folder.

        Raises:
            FileNotFoundError: where the folder holds no run.
            ValueError: where its ``config.yaml`` is damaged.
        """
        if not self.exists():
            raise FileNotFoundError(f"{self.path} holds no run of fastnas {self.COMMAND} to resume")
        path = self.path / "config.yaml"
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"{path} cannot be read: it holds no options")
        return options

    def exists(self) -> bool:
        """Tells whether the folder holds a run of this kind."""
        try:
            with (self.path / "config.yaml").open(encoding="utf-8") as file:
                return file.readline().startswith(self._header())
        except (OSError, UnicodeDecodeError):
            return False

    @classmethod
    def _header(cls) -> str:
        return f"# {cls.KIND} of fastnas"

    @classmethod
    def dump(cls, options: Mapping[str, Any]) -> str:
        """Returns the text of a ``config.yaml``: every option in its group, headed by what the run is on."""
        lines = [
            f"{cls._header()} {__version__} with torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}. To repeat it:",
            f"#   fastnas {cls.COMMAND} --config config.yaml --out another_folder",
        ]
        for group in cls.GROUPS:
            lines += ["", f"# {(group.__doc__ or '').splitlines()[0].rstrip('.')}"]
            chosen: dict[str, Any] = {field.name: options[field.name] for field in fields(group)}
            lines.append(yaml.safe_dump(chosen, sort_keys=False, width=1000).rstrip())
        return "\n".join(lines) + "\n"

    def _write_events(self, epoch: int, values: Mapping[str, float]) -> None:
        """Gives TensorBoard an epoch's values, but for those that are NaN."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of this epoch or later are of a process that was killed before its checkpoint: hidden.
            self._writer = SummaryWriter(str(self.path), purge_step=epoch)
        for tag, value in values.items():
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()
