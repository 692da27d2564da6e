"""Run folders: what a search leaves on disk."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import ClassVar

import torch

from fastnas._files import write_table
from fastnas.runs.folder import Folder
from fastnas.search import checkpoint
from fastnas.search.config import GROUPS, SearchConfig
from fastnas.search.loop import EpochRecord, Search, SearchResult


class RunFolder(Folder):
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

    COMMAND = "search"
    KIND = "A search"
    FILES = (
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
    GROUPS: ClassVar[tuple[type, ...]] = GROUPS

    def start(self, config: SearchConfig, *, overwrite: bool = False) -> None:
        """Makes the folder for a new search and writes its ``config.yaml``.

        With ``overwrite`` the files of an earlier run are removed; other files in the folder stay.

        Raises:
            FileExistsError: as :meth:`check_free`.
            OSError: where the folder cannot be written.
        """
        self._start(config.to_dict(), overwrite=overwrite)

    def config(self) -> SearchConfig:
        """Returns the options of the run in this folder.

        Raises:
            FileNotFoundError: where the folder holds no run.
            ValueError: where its ``config.yaml`` is damaged.
        """
        options = self.options()
        try:
            return SearchConfig.from_dict(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / 'config.yaml'} cannot be read: {error}") from error

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
        self._record_events(record)
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

    def _write_metrics(self, search: Search) -> None:
        """Writes one row an epoch; a measure that was not taken in an epoch is an empty field."""
        names = [field.name for field in fields(EpochRecord)]
        i = names.index("measures")
        measures = list(dict.fromkeys(name for r in search.history for name in r.measures))
        rows = []
        for record in search.history:
            values = asdict(record)
            rows.append({**values.pop("measures"), **values})
        write_table(self.path / "metrics.csv", [*names[:i], *measures, *names[i + 1 :]], rows)

    def _write_genotype(self, result: SearchResult) -> None:
        result.genotype.save(self.path / "genotype.json")
        result.genotype.save(self.path / "genotype.txt")

    def _record_events(self, record: EpochRecord) -> None:
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
        self._write_events(record.epoch, tags)
