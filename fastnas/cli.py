"""The ``fastnas`` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import fastnas
from fastnas import _C
from fastnas._files import write_text
from fastnas._library import current_backend
from fastnas.data import DATASETS
from fastnas.genotype import load_genotype
from fastnas.nn.stems import STEMS
from fastnas.relaxations import RELAXATIONS
from fastnas.saliency import SALIENCIES, SCORES
from fastnas.saliency.batches import SOURCES, BatchSource
from fastnas.saliency.freedarts import PRUNING
from fastnas.saliency.rank import Networks, RankOptions, Scored, compare, rank, sample
from fastnas.saliency.seeds import Found, ScoreOptions, SeedRun, summary, write
from fastnas.saliency.statistics import Correlations, Estimate
from fastnas.search import METHODS, EpochRecord, Search, SearchConfig, get_method
from fastnas.search.config import (
    ALPHA_OPTIMIZERS,
    AMP,
    GROUPS,
    PERTURBATIONS,
    PRESET,
    SELECTIONS,
    describe_type,
)
from fastnas.search.loop import peak_memory
from fastnas.search.regularizers import REGULARIZERS
from fastnas.search.run import RunFolder
from fastnas.spaces import SPACES, get_space
from fastnas.tabular import Table, open_table

_MIB = 2**20


class UsageError(ValueError):
    """A command line that cannot be understood."""


class _HelpFormatter(DefaultHelpFormatter):
    """Shows, for an option that a preset decides, the preset's value instead of null."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, Console().width))  # type: ignore[no-untyped-call]

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        command = self._prog.split()[-1]
        choices = _CHOICES.get(command, {}).get(action.dest)
        if choices:
            text += f" One of: {', '.join(choices)}."
        if command == "search":
            return text + _default(action)
        known = action.dest in _ANNOTATIONS.get(command, {}) and action.default is not None
        return text + (f" (default: {_show(action.default)})" if known else "")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        annotation = _ANNOTATIONS.get(self._prog.split()[-1], {}).get(action.dest, "")
        return _METAVARS.get(annotation, super()._get_default_metavar_for_optional(action))


_OPTIONS = {"search": SearchConfig, "rank": RankOptions, "score": ScoreOptions}
_ANNOTATIONS = {
    command: {field.name: str(field.type) for field in dataclasses.fields(options)}
    for command, options in _OPTIONS.items()
}
_METAVARS = {"int": "N", "float": "X", "str": "NAME", "tuple[float, float]": "[X,X]"}
_METAVARS |= {"list[str]": "[NAME,...]", "list[list[int]]": "[[K,OPS,EPOCHS,WARMUP],...]"}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_CHOICES: dict[str, dict[str, Sequence[str]]] = {
    "search": {
        "space": sorted(SPACES),
        "method": sorted(METHODS),
        "relaxation": sorted(RELAXATIONS),
        "data": list(DATASETS),
        "amp": list(AMP),
        "perturbation": list(PERTURBATIONS),
        "alpha_optimizer": list(ALPHA_OPTIMIZERS),
        "regularizer": list(REGULARIZERS),
        "select": list(SELECTIONS),
    },
    "rank": {"space": sorted(SPACES), "score": sorted(SCORES), "data": list(SOURCES)},
    "score": {
        "space": sorted(SPACES),
        "saliency": sorted(SALIENCIES),
        "pruning": list(PRUNING),
        "stem": list(STEMS),
        "data": list(SOURCES),
    },
}


def _default(action: argparse.Action) -> str:
    annotations = _ANNOTATIONS["search"]
    if action.dest not in annotations:
        return ""
    if action.default is not PRESET or "None" in annotations[action.dest]:
        return "" if action.default is None else f" (default: {_show(action.default)})"
    presets = {data: get_method("darts").preset(data)[action.dest] for data in ("digits", "cifar10")}
    if presets["digits"] == presets["cifar10"]:
        return f" (preset: {_show(presets['digits'])})"
    return f" (preset: {_show(presets['digits'])} for digits, {_show(presets['cifar10'])} for cifar10)"


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


class _Parser(ArgumentParser):
    """Reports a bad command line as an exception, and in one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        found = re.search(r'key "(?:(\w+)\.)?(\w+)"', message)
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        if found and value:
            command, key = found[1] or self.prog.split()[-1], found[2]
            annotation = _ANNOTATIONS.get(command, {}).get(key)
            if command == "search" and annotation is not None:
                message = f"{key}={value[1]}: expected {describe_type(key)}"
            elif annotation in _WORDS:
                message = f"{key}={value[1]}: expected {_WORDS[annotation]}"
        # argparse calls a subcommand "fastnas COMMAND ... search".
        command = "" if self.prog == "fastnas" else f" {self.prog.split()[-1]}"
        raise UsageError(f"{' '.join(message.split())} (see fastnas{command} --help)") from ex


def _parser(search_defaults: dict[str, Any] | None = None) -> ArgumentParser:
    about = "Fast differentiable neural architecture search."
    more = (
        "Errors are one line; with --traceback, or FASTNAS_TRACEBACK=1 in the environment, Python's traceback is shown."
    )
    parser = _Parser(
        prog="fastnas",
        formatter_class=_HelpFormatter,
        description=f"{about} {more}",
        version=fastnas.__version__,
        usage="fastnas COMMAND ...",
    )
    commands = parser.add_subcommands(required=True, title="commands", metavar="COMMAND")

    search = _Parser(
        prog="fastnas search",
        usage="fastnas search [options]",
        print_config=None,
        description="Searches for an architecture, and leaves it in a run folder with its pictures, the numbers of "
        "every epoch and a checkpoint. Without options: the DARTS space, first order, on the digits that scikit-learn "
        "carries. Ctrl-C stops after the step under way; --resume then goes on as if nothing had happened. A preset "
        "below is what the method chooses for the data (those of darts are shown); an option overrides it, in --config "
        "or on the command line.",
    )
    run = search.add_argument_group("Run")
    run.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="A YAML file with any of these options, such as a run's config.yaml.",
    )
    run.add_argument(
        "--out", metavar="FOLDER", help="The run folder. (default: runs/<space>-<method>-<data>-seed<seed>)"
    )
    run.add_argument("--resume", action="store_true", help="Continue the search in the run folder, with its options.")
    run.add_argument("--overwrite", action="store_true", help="Replace the run in the run folder.")
    for group in GROUPS:
        search.add_class_arguments(group)
    if search_defaults:
        search.set_defaults(search_defaults)
    commands.add_subcommand("search", search, help="search for an architecture")

    ranking = _Parser(
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
    commands.add_subcommand("rank", ranking, help="score architectures without training, against a table")

    scoring = _Parser(
        prog="fastnas score",
        usage="fastnas score [options]",
        description="Searches without training: draws weights and alphas, scores every candidate and keeps the best "
        "(FreeDARTS), for one seed after another. The folder gets scores.csv, summary.json, scores.png and the "
        "genotype of every seed.",
    )
    scoring.add_argument("--out", metavar="FOLDER", help="The folder. (default: runs/score-<space>-<saliency>)")
    scoring.add_class_arguments(ScoreOptions)
    commands.add_subcommand("score", scoring, help="search without training, by a saliency")

    report = _Parser(
        prog="fastnas report",
        usage="fastnas report RUN",
        description="Writes one HTML page about a search into its run folder, report.html: curves, cells, what was "
        "measured and every option. It needs no network and no other file.",
    )
    report.add_argument("run", metavar="RUN", help="The run folder.")
    commands.add_subcommand("report", report, help="one page about a search")

    info = _Parser(prog="fastnas info", usage="fastnas info", description="Prints versions and how fastnas was built.")
    commands.add_subcommand("info", info, help="versions, compiler, instruction sets, backends")

    genotype = _Parser(
        prog="fastnas genotype",
        usage="fastnas genotype FILE [options]",
        description="Prints the architecture in a file, which is in JSON or in the notation of its space: DARTS' "
        "Genotype(...), NAS-Bench-201's |op~0|+|op~0|op~1|+..., or op(0)+op(0,1)+...+output(1,2) for NAS-Bench-1Shot1.",
    )
    genotype.add_argument("file", metavar="FILE", help="genotype.json, genotype.txt, or a line of a genotypes.py.")
    genotype.add_argument("--to", choices=["json", "text"], default="text", help="The notation to print.")
    genotype.add_argument("--draw", metavar="FOLDER", help="Also draw its cells into this folder.")
    commands.add_subcommand("genotype", genotype, help="convert or draw a searched architecture")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of ``fastnas`` with these arguments (the process' own, where None).

    0 is success, 2 an error, 130 a stop by Ctrl-C (128 + the signal's number in general).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments or os.environ.get("FASTNAS_TRACEBACK", "0") not in ("", "0")
    # --batch-size is as good as --batch_size.
    arguments = [
        re.sub(r"(?<=\w)-", "_", name) + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in (a.partition("=") for a in arguments)
        if name != "--traceback"
    ]
    try:
        options = _parser().parse_args(arguments)
        if options.subcommand == "search":
            return _search(options.search, arguments)
        if options.subcommand == "rank":
            return _rank(options.rank)
        if options.subcommand == "score":
            return _score(options.score)
        if options.subcommand == "genotype":
            return _genotype(options.genotype)
        if options.subcommand == "report":
            return _report(options.report)
        return _info()
    except KeyboardInterrupt:
        print("fastnas: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except RuntimeError as error:
        # on the CPU, torch has no exception of its own for it
        if traceback or not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        return _fail(f"out of memory; a smaller batch_size or channels, or a larger k, needs less ({_line(error)})")
    except (ValueError, OSError, ArithmeticError) as error:
        if traceback:
            raise
        return _fail(_line(error))


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    print(f"fastnas: error: {message}", file=sys.stderr)
    return 2


def _info() -> int:
    build = _C.build_info()
    rows = {
        "fastnas": fastnas.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": build["compiler"],
        "cuda": f"{build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "not built",
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "cpu instruction set": f"{build['cpu_isa']} (of {', '.join(build['cpu_isas'])}; FASTNAS_CPU chooses)",
        "threads": str(torch.get_num_threads()),
        "backends": f"native, reference; in use: {current_backend()} (FASTNAS_BACKEND chooses)",
        "library": _C.__file__,
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    return 0


def _genotype(options: Namespace) -> int:
    genotype = load_genotype(options.file)
    print(genotype.to_json().rstrip() if options.to == "json" else genotype.to_text())
    if options.draw is not None:
        from fastnas.report import draw_genotype

        folder = Path(options.draw)
        folder.mkdir(parents=True, exist_ok=True)
        draw_genotype(genotype, folder)
    return 0


def _report(options: Namespace) -> int:
    from fastnas.report import write_page

    print(write_page(Path(options.run)))
    return 0


def _search(options: Namespace, arguments: Sequence[str]) -> int:
    config = _config(options)
    folder = RunFolder(options.out or f"runs/{config.space}-{config.method}-{config.data}-seed{config.seed}")
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if options.resume:
        stored = folder.config()
        config = _config(_parser(stored.to_dict()).parse_args(list(arguments)).search)
        for name, value in stored.to_dict().items():
            if name not in Search.FREE_ON_RESUME and config.to_dict()[name] != value:
                raise UsageError(
                    f"--resume continues {folder.path} with {name}={value}; leave out --{name}, "
                    "or start another run with --out"
                )
    else:
        folder.check_free(overwrite=options.overwrite)
    search = Search(config)
    if options.resume:
        folder.resume(search)
    else:
        folder.start(config, overwrite=options.overwrite)
    with folder:
        return _run(search, folder)


def _config(options: Namespace) -> SearchConfig:
    return SearchConfig.from_dict({name: options[name] for name in _ANNOTATIONS["search"]})


def _run(search: Search, folder: RunFolder) -> int:
    config = search.config
    # Lines in a file or a pipe are left whole.
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    parameters = sum(p.numel() for p in search.supernet.parameters())
    console.print(
        f"[bold]{get_method(config.method).summary}[/]: {config.space} space, {config.data}\n"
        f"{len(search.parts[0]):,} images train the weights, {len(search.parts[1]):,} the alphas"
    )
    console.print(
        f"supernet of {config.layers} layers, {config.channels} channels, {parameters:,} parameters; {config.device}; "
        f"seed {config.seed}\nrun folder {folder.path}"
    )
    if search.epoch or search.step:
        console.print(f"resumed after epoch {search.epoch}, step {search.step}")
    console.print(f"[dim]{_HEADINGS}[/]")
    for record in search.history:
        console.print(_row(record))

    with _Bar(console, search) as bar, _stop_on_signal(search) as signals:

        def on_epoch(search: Search, record: EpochRecord) -> None:
            folder.record(search, record)
            console.print(_row(record))
            for line in _remarks(record):
                console.print(line, highlight=False)

        result = search.run(on_step=bar.update, on_epoch=on_epoch)
        if not result.finished:
            folder.save(search)
        pictures = folder.finish(search) if result.history or result.finished else ()
    if not result.finished:
        console.print(
            f"stopped after epoch {search.epoch}, step {search.step}; to go on:\n"
            f"  fastnas search --resume --out {shlex.quote(str(folder.path))}"
        )
        return 128 + signals[0]
    if result.history:
        console.print(f"validation accuracy of the supernet {result.history[-1].valid_accuracy:.1%}")
    console.print(result.genotype.to_text(), markup=False)
    if not result.history:
        for name, value in search.measures.find(result.genotype).items():
            console.print(f"{name} {value:.2f}")
    written = ("genotype.json", *(p.name for p in pictures), "alphas.png", "metrics.csv", "config.yaml")
    page = f"; all on one page: fastnas report {shlex.quote(str(folder.path))}" if result.history else ""
    console.print(f"in {folder.path}: {', '.join(n for n in written if (folder.path / n).exists())}{page}")
    return 0


_SKIPS = 0.5  # the share of skip connections above which they have taken over


def _remarks(record: EpochRecord) -> list[str]:
    """Returns what an epoch's measures say, in lines below its row."""
    lines = []
    found = {name: value for name, value in record.measures.items() if name.startswith("table/")}
    if found:
        lines.append("       " + "  ".join(f"{name[6:]} {value:.2f}" for name, value in found.items()))
    if record.measures.get("discrete/skips", 0.0) > _SKIPS:
        lines.append(
            f"[yellow]       skip connections take over: {record.measures['discrete/skips']:.0%} of the operations[/]"
        )
    return lines


_HEADINGS = "epoch      lr   train loss, acc   alpha loss   valid loss, acc   spread  seconds   MiB"


def _row(r: EpochRecord) -> str:
    return (
        f"{r.epoch:5}  {r.lr:6.4f}  {r.train_loss:8.4f} {r.train_accuracy:6.1%}  {r.alpha_loss:10.4f}"
        f"  {r.valid_loss:9.4f} {r.valid_accuracy:6.1%}  {r.alpha_spread:6.4f}  {r.seconds:7.1f}"
        f"  {r.peak_memory / _MIB:4.0f}"
    )


def _rank(namespace: Namespace) -> int:
    options = RankOptions(**{name: namespace[name] for name in _ANNOTATIONS["rank"]})
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
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    progress = _progress(console, options.score)
    task = progress.add_task("rank", total=len(genotypes))
    done = 0

    def on_score(row: Scored) -> None:
        nonlocal done
        done += 1
        progress.update(task, completed=done)

    console.print(
        f"{options.score} of {len(genotypes):,} architectures of {options.space}, {options.channels} channels, "
        f"{options.layers} layers, on {options.batch_size} images of {options.data}"
    )
    try:
        with progress, _interruptible():
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
    except _Interrupted as stop:
        console.print(f"stopped after {done:,} of {len(genotypes):,}; the same command goes on from there")
        return 128 + stop.number
    correlations, values = (None, None) if table is None else compare(rows, table, options.column, seed=options.seed)
    _show_best(console, rows, values, options)
    files = ["scores.csv"]
    if correlations is not None and values is not None:
        files += _write_comparison(folder, rows, correlations, values, options)
        for name, estimate in (("Spearman", correlations.spearman), ("Kendall", correlations.kendall)):
            console.print(f"{name:8} {_interval(estimate)}")
        if math.isnan(correlations.spearman.value):
            console.print("all scores, or all values, are equal: nothing is ranked")
    console.print(f"in {folder}: {', '.join(files)}; {sum(r.seconds for r in rows) / len(rows):.3f} s a network")
    return 0


def _score(namespace: Namespace) -> int:
    options = ScoreOptions(**{name: namespace[name] for name in _ANNOTATIONS["score"]})
    folder = Path(namespace.out or f"runs/score-{options.space}-{options.saliency.replace(',', '-')}")
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    run = SeedRun(options)
    console.print(f"{options.saliency} on the {options.space} space, {len(run.seeds)} seeds")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose a folder for --out")
    found: list[Found] = []
    stopped = 0
    try:
        with _progress(console, options.saliency) as progress, _interruptible():
            task = progress.add_task("score", total=len(run.seeds))
            for one in run:
                found.append(one)
                progress.update(task, completed=len(found))
    except _Interrupted as stop:
        stopped = 128 + stop.number
        console.print(f"stopped after {len(found):,} of {len(run.seeds):,} seeds")
        if not found:
            return stopped
    _show_found(console, found)
    names = [path.name for path in write(folder, run, found)]
    shown = [name for name in names if not name.startswith("genotype-")]
    console.print(f"in {folder}: {', '.join(shown)}, genotype-<seed>.json")
    return stopped


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


def _progress(console: Console, title: str) -> Progress:
    """Returns a progress bar, which is nothing at all where the output is no terminal."""
    return Progress(
        TextColumn(title),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        expand=True,
    )


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


class _Interrupted(BaseException):
    """A signal asked the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM in the block into an exception."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise _Interrupted(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Bar:
    """A progress bar under the table; nothing at all where the output is no terminal."""

    def __init__(self, console: Console, search: Search) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}"),
            TextColumn("{task.fields[memory]} MiB"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task(
            "search", total=search.config.epochs * search.steps_per_epoch, **self._fields(search)
        )
        self._progress.update(self._task, completed=search.epoch * search.steps_per_epoch + search.step)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, search: Search) -> None:
        done = search.epoch * search.steps_per_epoch + search.step
        self._progress.update(self._task, completed=done, **self._fields(search))

    @staticmethod
    def _fields(search: Search) -> dict[str, Any]:
        now = search.progress()
        started = search.step > 0
        return {
            "epoch": f"{min(search.epoch + 1, search.config.epochs)}/{search.config.epochs}",
            "loss": f"{now['train_loss']:.3f}" if started else "-",
            "accuracy": f"{now['train_accuracy']:.1%}" if started else "-",
            "memory": f"{peak_memory(search.device) / _MIB:.0f}",
        }


@contextmanager
def _stop_on_signal(search: Search) -> Iterator[list[int]]:
    """Turns the first Ctrl-C (or SIGTERM) in the block into a stop after the step under way; yields what was received.

    A second one has its usual effect.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        search.stop()
        for n, handler in previous.items():
            signal.signal(n, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
