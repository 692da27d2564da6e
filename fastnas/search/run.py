"""Run folders: what a search leaves on disk."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import yaml

from fastnas._files import write_text
from fastnas.search import checkpoint
from fastnas.search.config import GROUPS, SearchConfig
from fastnas.search.loop import EpochRecord, Search, SearchResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_HEADER = "# A search of fastnas"
_FILES = (
    "config.yaml",
    "metrics.csv",
    "checkpoint.pt",
    "genotype.json",
    "genotype.txt",
    "cell.png",
    "cell_normal.png",
    "cell_reduce.png",
    "alphas.png",
    "report.html",
)
_EVENTS = "events.out.tfevents.*"


class RunFolder:
    """The folder of one search; use it as a context manager around the search.

    | file | what |
    | --- | --- |
    | `config.yaml` | every option, resolved: `fastnas search --config config.yaml` repeats the search |
    | `metrics.csv` | one row an epoch, the fields of :class:`~fastnas.search.EpochRecord`, a column a measure |
    | `events.out.tfevents.*` | the same for TensorBoard |
    | `checkpoint.pt` | the state to resume from |
    | `genotype.json`, `genotype.txt` | the architecture so far; the text is in the space's published notation |
    | `cell_normal.png`, `cell_reduce.png` or `cell.png`; `alphas.png` | its cells, and how the weights moved |

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def check_free(self, *, overwrite: bool) -> None:
        """Checks that :meth:`start` may use the folder.

        Raises:
            FileExistsError: where it holds files, and they are not those of a run that may be overwritten.
            NotADirectoryError: where the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; choose a folder for the run")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self._is_run():
            raise FileExistsError(
                f"{self.path} is not empty and holds no run of fastnas; choose another folder (--out)"
            )
        if not overwrite:
            raise FileExistsError(
                f"{self.path} holds a run already; continue it with --resume, replace it with --overwrite, "
                "or choose another folder (--out)"
            )

    def start(self, config: SearchConfig, *, overwrite: bool = False) -> None:
        """Makes the folder for a new search and writes its ``config.yaml``.

        With ``overwrite`` the files of an earlier run are removed; other files in the folder stay.

        Raises:
            FileExistsError: as :meth:`check_free`.
            OSError: where the folder cannot be written.
        """
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        for old in [*(self.path / name for name in _FILES), *self.path.glob(_EVENTS)]:
            old.unlink(missing_ok=True)
        self._write_text("config.yaml", dump_config(config))

    def config(self) -> SearchConfig:
        """Returns the options of the run in this folder.

        Raises:
            FileNotFoundError: where the folder holds no run.
            ValueError: where its ``config.yaml`` is damaged.
        """
        if not self._is_run():
            raise FileNotFoundError(f"{self.path} holds no run of fastnas to resume")
        path = self.path / "config.yaml"
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(options, Mapping):
                raise ValueError("it holds no options")
            return SearchConfig.from_dict(options)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def resume(self, search: Search) -> None:
        """Puts ``search`` where the run in this folder stopped.

        Raises:
            CheckpointError: where there is no checkpoint that fits.
        """
        search.load_state_dict(checkpoint.load(self.path / "checkpoint.pt"))
        self._write_metrics(search)  # rows of epochs after the checkpoint will come again

    def save(self, search: Search) -> None:
        """Writes the checkpoint; atomically, as every file here."""
        checkpoint.save(self.path / "checkpoint.pt", search.state_dict())

    def record(self, search: Search, record: EpochRecord) -> None:
        """Writes what an epoch came to: metrics, events, genotype and checkpoint."""
        self._write_metrics(search)
        self._write_events(record)
        self._write_genotype(search.result())
        self.save(search)

    def finish(self, search: Search) -> tuple[Path, ...]:
        """Writes the genotype and the pictures; returns the paths of those of the cells."""
        from fastnas.report import draw_genotype, plot_alphas
        from fastnas.report.cell import INPUTS

        result = search.result()
        self._write_genotype(result)
        pictures = draw_genotype(result.genotype, self.path)
        edges, primitives = search.space.edges, search.space.primitives
        history = {
            name: torch.stack([w[name] for w in result.weights])  # (T, E, O)
            for name, table in result.weights[0].items()
            if table.shape == (len(edges), len(primitives))
        }
        if history:
            inputs = INPUTS[-min(i for i, _ in edges) :]  # the states before the first that an edge leads to
            plot_alphas(history, primitives, edges, self.path / "alphas.png", inputs=inputs)
        return pictures

    def _is_run(self) -> bool:
        try:
            with (self.path / "config.yaml").open(encoding="utf-8") as file:
                return file.readline().startswith(_HEADER)
        except (OSError, UnicodeDecodeError):
            return False

    def _write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def _write_metrics(self, search: Search) -> None:
        """Writes one row an epoch; a measure that was not taken in an epoch is an empty field."""
        names = [field.name for field in fields(EpochRecord)]
        i = names.index("measures")
        measures = list(dict.fromkeys(name for r in search.history for name in r.measures))
        table = io.StringIO()
        rows = csv.DictWriter(table, [*names[:i], *measures, *names[i + 1 :]], lineterminator="\n", restval="")
        rows.writeheader()
        for record in search.history:
            values = asdict(record)
            rows.writerow({**values.pop("measures"), **values})
        self._write_text("metrics.csv", table.getvalue())

    def _write_genotype(self, result: SearchResult) -> None:
        result.genotype.save(self.path / "genotype.json")
        result.genotype.save(self.path / "genotype.txt")

    def _write_events(self, record: EpochRecord) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of this epoch or later are of a process that was killed before its checkpoint: hidden.
            self._writer = SummaryWriter(str(self.path), purge_step=record.epoch)
        tags = {
            "loss/train": record.train_loss,
            "loss/alpha": record.alpha_loss,
            "loss/valid": record.valid_loss,
            "accuracy/train": record.train_accuracy,
            "accuracy/valid": record.valid_accuracy,
            "alphas/spread": record.alpha_spread,
            "alphas/entropy": record.entropy,
            "run/lr": record.lr,
            "run/seconds": record.seconds,
            "run/peak_memory_mib": record.peak_memory / 2**20,
            "run/k": record.k,
            **record.measures,
        }
        for tag, value in tags.items():
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, record.epoch)
        self._writer.flush()


def dump_config(config: SearchConfig) -> str:
    """Returns the text of a ``config.yaml``: every option in its group, headed by what the search ran on."""
    from fastnas import __version__

    options = config.to_dict()
    lines = [
        f"{_HEADER} {__version__} with torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}. To repeat it:",
        "#   fastnas search --config config.yaml --out another_folder",
    ]
    for group in GROUPS:
        lines += ["", f"# {(group.__doc__ or '').splitlines()[0].rstrip('.')}"]
        chosen: dict[str, Any] = {field.name: options[field.name] for field in fields(group)}
        lines.append(yaml.safe_dump(chosen, sort_keys=False).rstrip())
    return "\n".join(lines) + "\n"
