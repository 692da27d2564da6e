"""``fastnas search --repeat``: several searches, and the choice between what they find."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastnas._files import write_text
from fastnas.commands import train
from fastnas.genotype import load_genotype
from fastnas.runs.folder import read_metrics
from fastnas.search import SearchConfig
from fastnas.search.run import RunFolder
from fastnas.train import TrainConfig, TrainFolder, Training
from fastnas.train.config import RECIPE

_SHORT = 6  # a short training's epochs are a recipe's by this: DARTS' 100 of 600


@dataclass(frozen=True)
class RepeatOptions:
    """Several searches.

    Attributes:
        repeat: Search with this many seeds, seed, seed + 1, ..., each in a folder of its own in the run folder. With
            --pick, 1 or more; 0 is a single search.
        pick: Train each architecture from scratch for a short time on a part of the training images, train_portion,
            test it on the rest, and keep the best (DARTS, arXiv:1806.09055, section 3).
        pick_recipe: How it is trained: a recipe of fastnas train, or a YAML file. (default: that of the architecture
            and the data, with a sixth of its epochs, as DARTS' 100 of 600)
        minutes: Go on with further seeds until searches and trainings together have taken this long: with the method
            random, random search on the same budget.
    """

    repeat: int = 0
    pick: bool = False
    pick_recipe: str | None = None
    minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.repeat < 0:
            raise ValueError(f"repeat={self.repeat} must be a number of searches, or 0 for a single one")
        if self.pick_recipe is not None and not self.pick:
            raise ValueError(f"pick_recipe={self.pick_recipe} without --pick true: nothing would be trained by it")
        if self.minutes < 0:
            raise ValueError(f"minutes={self.minutes} must be 0 (only --repeat counts) or more")
        if not self.repeat and (self.pick or self.minutes):
            raise ValueError("pick and minutes are for several searches: say how many, as in --repeat 4")


@dataclass(frozen=True)
class Found:
    """What one seed came to.

    Attributes:
        seed: Its seed.
        supernet: The supernet's accuracy on the validation images, 0 to 1; None where none was trained.
        accuracy: The architecture's after a short training, on the training images that it left out; None without one.
        search_seconds: Wall-clock time of the search.
        train_seconds: Of the training.
        genotype: The architecture, in its space's notation.
    """

    seed: int
    supernet: float | None
    accuracy: float | None
    search_seconds: float
    train_seconds: float
    genotype: str


def repeat(
    options: RepeatOptions,
    config: SearchConfig,
    folder: Path,
    search: Callable[[SearchConfig, RunFolder], int],
    *,
    overwrite: bool,
    out: Console,
) -> int:
    """Returns the exit status after the searches and what follows them.

    Args:
        options: How many, and what follows.
        config: Of the first; the others differ in the seed.
        folder: Gets a folder for each seed, ``searches.csv`` and, where one was picked, its genotype.
        search: Runs one search, or what is left of it, and returns its exit status.
        overwrite: Whether what earlier searches left in the folder is replaced; else it is gone on with.
        out: Where to print.
    """
    found: list[Found] = []
    for n in itertools.count():
        spent = sum(one.search_seconds + one.train_seconds for one in found)
        if n >= options.repeat and spent >= 60 * options.minutes:
            break
        one = dataclasses.replace(config, seed=config.seed + n)
        out.print(
            f"[bold]seed {one.seed}[/], number {n + 1}" + (f" of {options.repeat}" if not options.minutes else "")
        )
        run = RunFolder(folder / f"seed-{one.seed}")
        status = search(one, run) or (_train(options, one, run, overwrite=overwrite) if options.pick else 0)
        if status:
            return status
        found.append(_found(one, run, options))
        _write(folder / "searches.csv", found)
    out.print(_table(found))
    seconds = sum(one.search_seconds for one in found), sum(one.train_seconds for one in found)
    out.print(f"{seconds[0] / 60:.1f} min of searches, {seconds[1] / 60:.1f} min of short trainings")
    if options.pick:
        best = max(found, key=lambda one: one.accuracy or 0.0)
        genotype = load_genotype(folder / f"seed-{best.seed}" / "genotype.json")
        genotype.save(folder / "genotype.json")
        genotype.save(folder / "genotype.txt")
        out.print(f"picked seed {best.seed}; in {folder}: genotype.json, genotype.txt, searches.csv. To train it:")
        out.print(f"  fastnas train --genotype {shlex.quote(str(folder))} --data {config.data}", markup=False)
    else:
        out.print(f"in {folder}: searches.csv, seed-*")
    return 0


def _train(options: RepeatOptions, config: SearchConfig, run: RunFolder, *, overwrite: bool) -> int:
    """Returns the exit status after the short training of what a search found."""
    genotype = load_genotype(run.path / "genotype.json")
    short = TrainConfig(
        genotype=genotype.to_text(),
        recipe=options.pick_recipe or RECIPE,
        data=config.data,
        root=config.root,
        validate=1 - config.train_portion,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        amp=config.amp,
    )
    if options.pick_recipe is None:
        short = dataclasses.replace(short, epochs=max(1, short.epochs // _SHORT))
    folder = TrainFolder(run.path / "short")
    training = Training(short)
    if not overwrite and (folder.path / "checkpoint.pt").exists():
        folder.resume(training)
    else:
        folder.start(short, overwrite=True)
    with folder:
        return train.train(training, folder)


def _found(config: SearchConfig, run: RunFolder, options: RepeatOptions) -> Found:
    epochs = read_metrics(run.path)
    trained = read_metrics(run.path / "short") if options.pick else []
    return Found(
        seed=config.seed,
        supernet=float(epochs[-1]["valid_accuracy"]) if epochs else None,
        accuracy=float(trained[-1]["top1"]) if trained else None,
        search_seconds=sum(float(row["seconds"]) for row in epochs),
        train_seconds=sum(float(row["seconds"]) for row in trained),
        genotype=load_genotype(run.path / "genotype.json").to_text(),
    )


def _write(path: Path, found: list[Found]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Found)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(one) for one in found)
    write_text(path, text.getvalue())


def _table(found: list[Found]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("seed", "supernet", "short training", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("architecture", overflow="fold")
    for one in found:
        supernet, accuracy = ("-" if v is None else f"{v:.2%}" for v in (one.supernet, one.accuracy))
        seconds = one.search_seconds + one.train_seconds
        table.add_row(str(one.seed), supernet, accuracy, f"{seconds:.0f}", one.genotype)
    return table
