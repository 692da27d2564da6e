"""``fastnas search --repeat``: several searches, and the choice between what they find."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table

from fastnas._files import read_table, write_table
from fastnas.commands import train
from fastnas.genotype import load_genotype, parse_genotype
from fastnas.runs.folder import Folder
from fastnas.search import SearchConfig
from fastnas.search.config import GROUPS
from fastnas.search.run import RunFolder
from fastnas.spaces import get_space
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
            and the data, with a sixth of its epochs, as DARTS' 100 of 600, and no auxiliary head)
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

    @classmethod
    def read(cls, row: Mapping[str, str]) -> Found:
        """Returns what a row of ``searches.csv`` says.

        Raises:
            ValueError: where it is no such row.
        """
        try:
            supernet, accuracy = (float(row[name]) if row[name] else None for name in ("supernet", "accuracy"))
            searched, trained = (float(row[name]) for name in ("search_seconds", "train_seconds"))
            return cls(int(row["seed"]), supernet, accuracy, searched, trained, row["genotype"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"searches.csv is damaged ({error}): remove it, and the finished seeds are read again"
            ) from None


class RepeatFolder(Folder):
    """The folder of several searches: the options, what each seed came to, and the architecture that was picked.

    Each seed has a run folder of its own in it, ``seed-<seed>``, and in that its short training, ``short``.

    Args:
        path: The folder.
    """

    COMMAND = "search"
    KIND = "Several searches"
    FILES = ("config.yaml", "searches.csv", "genotype.json", "genotype.txt")
    GROUPS: ClassVar[tuple[type, ...]] = (RepeatOptions, *GROUPS)

    def start(self, options: RepeatOptions, config: SearchConfig, *, overwrite: bool = False) -> None:
        """Makes the folder and writes its ``config.yaml``.

        Raises:
            FileExistsError: as :meth:`check_free`.
            OSError: where the folder cannot be written.
        """
        self._start({**asdict(options), **config.to_dict()}, overwrite=overwrite)

    def found(self) -> list[Found]:
        """Returns what the seeds came to that are done."""
        path = self.path / "searches.csv"
        return [Found.read(row) for row in read_table(path)] if path.exists() else []

    def write(self, found: list[Found]) -> None:
        """Writes what the seeds came to."""
        write_table(self.path / "searches.csv", [f.name for f in fields(Found)], [asdict(one) for one in found])


def repeat(
    options: RepeatOptions,
    config: SearchConfig,
    folder: RepeatFolder,
    search: Callable[..., int],
    *,
    resume: bool,
    out: Console,
) -> int:
    """Returns the exit status after the searches and what follows them; seeds that are done are not run again.

    Args:
        options: How many, and what follows.
        config: Of the first; the others differ in the seed.
        folder: Where they are.
        search: Runs one search, or what is left of it, and returns its exit status:
            ``search(config, folder, resume=, overwrite=, again=)``, the last the command that goes on after a stop.
        resume: Whether searches and short trainings that were stopped go on.
        out: Where to print.
    """
    again = f"fastnas search --resume --out {shlex.quote(str(folder.path))}"
    if options.pick:  # an option that does not fit shows before the first search, not after it
        example = get_space(config.space).sample(torch.Generator().manual_seed(config.seed))
        try:
            Training(_short(options, config, example.to_text()))
        except ValueError as error:
            raise ValueError(f"the short training of --pick: {error}; --pick_recipe says how to train") from None
    done = {one.seed: one for one in folder.found()}
    found: list[Found] = []
    for n in itertools.count():
        spent = sum(one.search_seconds + one.train_seconds for one in found)
        if n >= options.repeat and spent >= 60 * options.minutes:
            break
        one = replace(config, seed=config.seed + n)
        if one.seed not in done:
            out.print(
                f"[bold]seed {one.seed}[/], number {n + 1}" + ("" if options.minutes else f" of {options.repeat}")
            )
            run, start = RunFolder(folder.path / f"seed-{one.seed}"), time.perf_counter()
            stopped = resume and (run.path / "checkpoint.pt").exists()
            status = search(one, run, resume=stopped, overwrite=True, again=again)
            seconds = time.perf_counter() - start
            if not status and options.pick:
                status = _train(options, one, run, again, resume=resume)
            if status:
                return status
            done[one.seed] = _found(one, run, options, seconds)
        found.append(done[one.seed])
        folder.write(found)
    out.print(_table(found))
    minutes = (sum(one.search_seconds for one in found) / 60, sum(one.train_seconds for one in found) / 60)
    out.print(f"{minutes[0]:.1f} min of searches, {minutes[1]:.1f} min of short trainings, {sum(minutes):.1f} in all")
    written = "searches.csv, seed-*"
    if options.pick:
        best = max(found, key=lambda one: one.accuracy or 0.0)
        for name in ("genotype.json", "genotype.txt"):
            parse_genotype(best.genotype).save(folder.path / name)
        out.print(f"picked seed {best.seed}; to train it:")
        command = ["fastnas", "train", "--genotype", str(folder.path), "--data", config.data]
        command += ["--root", config.root] if config.root else []
        out.print(f"  {shlex.join(command)}", markup=False)
        written = f"genotype.json, genotype.txt, {written}"
    out.print(f"in {folder.path}: {written}", markup=False)
    return 0


def _short(options: RepeatOptions, config: SearchConfig, genotype: str) -> TrainConfig:
    """Returns the options of the short training of what a search found."""
    own = options.pick_recipe is not None
    short = TrainConfig(
        genotype=genotype,
        recipe=options.pick_recipe or RECIPE,
        auxiliary=RECIPE if own else 0.0,
        data=config.data,
        root=config.root,
        validate=1 - config.train_portion,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        amp=config.amp,
    )
    return short if own else replace(short, epochs=max(1, short.epochs // _SHORT))


def _train(options: RepeatOptions, config: SearchConfig, run: RunFolder, again: str, *, resume: bool) -> int:
    """Returns the exit status after the short training, or what is left of it."""
    short = _short(options, config, load_genotype(run.path / "genotype.json").to_text())
    folder = TrainFolder(run.path / "short")
    training = Training(short)
    if resume and (folder.path / "checkpoint.pt").exists():
        folder.resume(training)
    else:
        folder.start(short, overwrite=True)
    with folder:
        return train.train(training, folder, again)


def _found(config: SearchConfig, run: RunFolder, options: RepeatOptions, seconds: float) -> Found:
    metrics = run.path / "metrics.csv"
    epochs = read_table(metrics) if metrics.exists() else []  # what trains nothing has none
    trained = read_table(run.path / "short" / "metrics.csv") if options.pick else []
    return Found(
        seed=config.seed,
        supernet=float(epochs[-1]["valid_accuracy"]) if epochs else None,
        accuracy=float(trained[-1]["top1"]) if trained else None,
        search_seconds=sum(float(row["seconds"]) for row in epochs) or seconds,
        train_seconds=sum(float(row["seconds"]) for row in trained),
        genotype=load_genotype(run.path / "genotype.json").to_text(),
    )


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
