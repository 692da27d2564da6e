"""``fastnas rank``."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from fastnas._files import write_text
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
from fastnas.saliency import SCORES
from fastnas.saliency.batches import SOURCES, BatchSource
from fastnas.saliency.rank import Networks, RankOptions, Scored, compare, rank, sample
from fastnas.saliency.statistics import Correlations, Estimate
from fastnas.spaces import SPACES, get_space
from fastnas.tabular import Table, open_table

HELP = "score architectures without training, against a table"

describe("rank", RankOptions, {"space": sorted(SPACES), "score": sorted(SCORES), "data": list(SOURCES)})


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    ranking = Parser(
        prog="fastnas rank",
        usage="fastnas rank [options]",
        description="Scores architectures of a space without training them, and says how well the score's order agrees "
        "with that of a table of trained ones. The folder gets scores.csv and, with --table, correlations.json and "
        "scatter.png. A run that was stopped or killed goes on where the same command is given again.",
    )
    ranking.add_argument(
        "--out", metavar="FOLDER", help="The folder. (default: runs/rank-<space>-<score>-<data>-seed<seed>)"
    )
    ranking.add_class_arguments(RankOptions)
    return ranking


def run(namespace: Namespace, again: Again) -> int:
    """Returns the exit status after the ranking."""
    options = RankOptions(**{name: namespace[name] for name in option_names("rank")})
    folder = Path(namespace.out or f"runs/rank-{options.space}-{options.score}-{options.data}-seed{options.seed}")
    table = None if options.table is None else _table(options)
    source = BatchSource.open(
        options.data,
        options.root,
        options.batch_size,
        per_class=options.per_class,
        image_size=options.image_size,
    )
    space = get_space(options.space)
    genotypes = sample(space, None if options.sample == "all" else int(options.sample), options.seed)
    if table is not None:
        missing = [g for g in genotypes if g not in table]
        if missing and not options.space.startswith("nb1shot1"):  # published tables of its cells lack some
            raise ValueError(f"{options.table}: {missing[0].to_text()} is not among its {len(table)} rows")
    networks = Networks(options.channels, options.layers, source.classes, options.seed, options.device)
    out = console()
    bar = progress(out, options.score)
    task = bar.add_task("rank", total=len(genotypes))
    done = 0

    def on_score(row: Scored) -> None:
        nonlocal done
        done += 1
        bar.update(task, completed=done)

    out.print(
        f"{options.score} of {len(genotypes):,} architectures of {options.space}, {options.channels} channels, "
        f"{options.layers} layers, on {options.batch_size} images of {options.data}"
    )
    try:
        with bar, interruptible():
            rows = rank(
                space,
                options.score,
                genotypes,
                source.draw(options.seed),
                networks,
                folder=folder,
                jobs=options.jobs,
                threads=options.threads,
                on_score=on_score,
            )
    except Interrupted as stop:
        out.print(f"stopped after {done:,} of {len(genotypes):,}; the same command goes on from there")
        return 128 + stop.number
    correlations, values = (None, None) if table is None else compare(rows, table, options.column, seed=options.seed)
    _show_best(out, rows, values, options)
    files = ["scores.csv"]
    if correlations is not None and values is not None:
        files += _write_comparison(folder, rows, correlations, values, options)
        for name, estimate in (("Spearman", correlations.spearman), ("Kendall", correlations.kendall)):
            out.print(f"{name:8} {_interval(estimate)}")
        if math.isnan(correlations.spearman.value):
            out.print("all scores, or all values, are equal: nothing is ranked")
    out.print(f"in {folder}: {', '.join(files)}; {sum(r.seconds for r in rows) / len(rows):.3f} s a network")
    return 0


def _table(options: RankOptions) -> Table:
    assert options.table is not None
    table = open_table(options.table, options.space, options.key)
    table.column(options.column)
    return table


_BEST = 5  # architectures that are shown


def _show_best(console: Console, rows: list[Scored], values: list[float] | None, options: RankOptions) -> None:
    best = sorted((r for r in rows if not math.isnan(r.score)), key=lambda r: -r.score)[:_BEST]
    console.print(f"[dim]{'score':>12}{'' if values is None else f'  {options.column:>14}'}  the best by score[/]")
    for row in best:
        value = "" if values is None else f"  {values[row.index]:14.2f}"
        console.print(f"{row.score:12.6g}{value}  {row.architecture}", markup=False)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} (95 % of resamples: {estimate.low:.3f} to {estimate.high:.3f})"


def _write_comparison(
    folder: Path, rows: list[Scored], correlations: Correlations, values: list[float], options: RankOptions
) -> list[str]:
    """Writes the comparison with the table, and returns the files' names."""
    from fastnas.report import plot_scatter

    def plain(value: object) -> object:  # JSON has no NaN
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    content = {
        "space": options.space,
        "score": options.score,
        "column": options.column,
        "architectures": len(rows),
        **dataclasses.asdict(correlations),
    }
    write_text(folder / "correlations.json", json.dumps(plain(content), indent=2, allow_nan=False) + "\n")
    plot_scatter(
        [row.score for row in rows],
        values,
        folder / "scatter.png",
        xlabel=options.score,
        ylabel=options.column,
        title=f"{options.score}: Spearman {correlations.spearman.value:.3f}, Kendall {correlations.kendall.value:.3f}",
        subtitle=f"{correlations.count:,} architectures of {options.space}; {options.batch_size} images of "
        f"{options.data}, seed {options.seed}",
    )
    return ["correlations.json", "scatter.png"]
