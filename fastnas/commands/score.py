"""``fastnas score``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from fastnas.commands._common import (
    Again,
    Interrupted,
    Parser,
    console,
    describe,
    interruptible,
    option_names,
    progress,
)
from fastnas.nn.stems import STEMS
from fastnas.saliency import SALIENCIES
from fastnas.saliency.batches import SOURCES
from fastnas.saliency.freedarts import PRUNING
from fastnas.saliency.seeds import Found, ScoreOptions, SeedRun, summary, write
from fastnas.spaces import SPACES

HELP = "search without training, by a saliency"

describe(
    "score",
    ScoreOptions,
    {
        "space": sorted(SPACES),
        "saliency": sorted(SALIENCIES),
        "pruning": list(PRUNING),
        "stem": list(STEMS),
        "data": list(SOURCES),
    },
)


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    scoring = Parser(
        prog="fastnas score",
        usage="fastnas score [options]",
        description="Searches without training: draws weights and alphas, scores every candidate and keeps the best "
        "(FreeDARTS), for one seed after another. The folder gets scores.csv, summary.json, scores.png and the "
        "genotype of every seed.",
    )
    scoring.add_argument("--out", metavar="FOLDER", help="The folder. (default: runs/score-<space>-<saliency>)")
    scoring.add_class_arguments(ScoreOptions)
    return scoring


def run(namespace: Namespace, again: Again) -> int:
    """Returns the exit status after the seeds."""
    options = ScoreOptions(**{name: namespace[name] for name in option_names("score")})
    folder = Path(namespace.out or f"runs/score-{options.space}-{options.saliency.replace(',', '-')}")
    out = console()
    run = SeedRun(options)
    out.print(f"{options.saliency} on the {options.space} space, {len(run.seeds)} seeds")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose a folder for --out")
    found: list[Found] = []
    stopped = 0
    try:
        with progress(out, options.saliency) as bar, interruptible():
            task = bar.add_task("score", total=len(run.seeds))
            for one in run:
                found.append(one)
                bar.update(task, completed=len(found))
    except Interrupted as stop:
        stopped = 128 + stop.number
        out.print(f"stopped after {len(found):,} of {len(run.seeds):,} seeds")
        if not found:
            return stopped
    _show_found(out, found)
    names = [path.name for path in write(folder, run, found)]
    shown = [name for name in names if not name.startswith("genotype-")]
    out.print(f"in {folder}: {', '.join(shown)}, genotype-<seed>.json")
    return stopped


_BEST = 5  # genotypes that are shown


def _show_found(console: Console, found: list[Found]) -> None:
    result = summary(found)
    numbers = result["numbers"]
    if numbers:
        console.print(f"[dim]{'':18}{'mean':>9}  {'std':>7}  {'best':>8}  {'worst':>8}[/]")
    for name, value in numbers.items():
        std = "-" if value["std"] is None else f"{value['std']:.2f}"
        console.print(
            f"{name:18}{value['mean']:9.2f}  {std:>7}  {value['best']:8.2f}  {value['worst']:8.2f}"
            + (f"  of {value['count']} in the table" if value["count"] < len(found) else "")
        )
    console.print(f"[dim]{'times':>5}  of {len(result['genotypes']):,} different architectures, the most frequent[/]")
    for genotype, count in list(result["genotypes"].items())[:_BEST]:
        console.print(f"{count:5}  {genotype}", markup=False)
    seconds = result["seconds"]
    console.print(f"{seconds['median']:.3f} s a search (the first: {seconds['first']:.3f} s)")
