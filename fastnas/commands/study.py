"""``fastnas study``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from fastnas._files import read_table
from fastnas.commands._common import (
    Again,
    Interrupted,
    Parser,
    UsageError,
    console,
    describe,
    interruptible,
    option_names,
    progress,
    show_value,
    stop_on_signal,
)
from fastnas.data import DATASETS
from fastnas.runs.machine import AMP
from fastnas.search import EpochRecord, Search
from fastnas.search.config import PRESET
from fastnas.spaces import SPACES
from fastnas.study import StudyOptions, study

HELP = "what a supernet can and cannot rank, against a table"


def _default(action: argparse.Action) -> str:
    known = action.dest in StudyOptions.__dataclass_fields__ and action.default not in (PRESET, "")
    return f" (default: {show_value(action.default)})" if known else ""


describe(
    "study",
    StudyOptions,
    {"space": sorted(SPACES), "data": list(DATASETS), "amp": list(AMP)},
    default=_default,
)


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    found = Parser(
        prog="fastnas study",
        usage="fastnas study --table FILE [options]\n       fastnas study compare RUN RUN ... [--out FOLDER]",
        description="Trains a supernet by single paths, evaluates architectures with its weights, and says how well "
        "their order agrees with that of a table of trained ones: at several times of the training, with several ways "
        "of batch norm, and in pruned search spaces. The folder gets CSV files and a page, report.html. A study that "
        "was stopped or killed goes on where the same command is given again. Options without a default have the "
        "published ones for the data and the space. compare puts several studies on one page, seeds together.",
    )
    found.add_argument("compare", nargs="*", metavar="compare RUN", help="The folders of studies to be compared.")
    found.add_argument(
        "--out", metavar="FOLDER", help="The folder. (default: runs/study-<space>-<data>-seed<seed>, or runs/study)"
    )
    found.add_class_arguments(StudyOptions)
    return found


def run(namespace: Namespace, again: Again) -> int:
    """Returns the exit status after the study, or the comparison."""
    if namespace.compare:
        word, *runs = namespace.compare
        if word != "compare" or not runs:
            raise UsageError(f"{word!r}: expected compare RUN RUN ... (see fastnas study --help)")
        return _compare([Path(path) for path in runs], Path(namespace.out or "runs/study"))
    options = StudyOptions(**{name: namespace[name] for name in option_names("study")})
    folder = Path(namespace.out or f"runs/study-{options.space}-{options.data}-seed{options.seed}")
    out = console()
    config = options.search()
    out.print(
        f"supernet of {options.space}, {options.layers} layers, {options.channels} channels, on {options.data}; "
        f"{options.device}; seed {options.seed}\n{options.epochs} epochs, batches of {options.batch_size}, "
        f"lr {options.lr:g} to {config.lr_min:g}; studied after {', '.join(map(str, options.epochs_studied))}; "
        f"folder {folder}"
    )

    @contextmanager
    def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with progress(out, what) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)

    def on_epoch(search: Search, record: EpochRecord) -> None:
        out.print(
            f"epoch {record.epoch:4}  loss {record.train_loss:.4f}  accuracy of paths {record.train_accuracy:.1%}, "
            f"validation {record.valid_accuracy:.1%}  {record.seconds:.1f} s"
        )

    @contextmanager
    def training(search: Search) -> Iterator[None]:
        with stop_on_signal(search.stop) as signals:
            yield
        if signals:
            raise Interrupted(signals[0])

    try:
        with interruptible():
            study(options, folder, progress=shown, on_epoch=on_epoch, training=training)
    except Interrupted as stop:
        out.print("stopped; the same command goes on from there")
        return 128 + stop.number
    _show(out, folder, options.column)
    return _page(out, folder)


def _show(out: Console, folder: Path, column: str) -> None:
    out.print(f"[dim]epoch  bn             subnets   Spearman  Kendall   top 1  top 10  random 10  {column}[/]")
    line = "{epoch:5.0f}  {bn:12}  {supernet_mean:8.1%}  {spearman:9.3f}  {kendall:7.3f}  {top1:6.2f}  {top10:6.2f}"
    for row in read_table(folder / "summary.csv"):
        numbers = {name: text if name == "bn" else float(text or "nan") for name, text in row.items()}
        out.print((line + "  {random10:9.2f}").format_map(numbers))


def _page(out: Console, folder: Path) -> int:
    from fastnas.report.study import write_study_page

    page = write_study_page(folder)
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".csv", ".json"))
    out.print(f"in {folder}: {', '.join(files)}; all on one page: {page}")
    return 0


def _compare(runs: list[Path], folder: Path) -> int:
    from fastnas.report.study import write_comparison

    console().print(f"{write_comparison(runs, folder)}, with its numbers in {folder / 'compare.csv'}")
    return 0
