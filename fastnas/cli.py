"""The ``fastnas`` command."""

from __future__ import annotations

import argparse
import dataclasses
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
from fastnas._library import current_backend
from fastnas.data import DATASETS
from fastnas.genotype import load_genotype
from fastnas.relaxations import RELAXATIONS
from fastnas.search import METHODS, EpochRecord, Search, SearchConfig, get_method
from fastnas.search.config import AMP, GROUPS, PRESET, describe_type
from fastnas.search.loop import peak_memory
from fastnas.search.run import RunFolder
from fastnas.spaces import SPACES

_MIB = 2**20


class UsageError(ValueError):
    """A command line that cannot be understood."""


class _HelpFormatter(DefaultHelpFormatter):
    """Shows, for an option that a preset decides, the preset's value instead of null."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, Console().width))  # type: ignore[no-untyped-call]

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest in _CHOICES:
            text += f" One of: {', '.join(_CHOICES[action.dest])}."
        return text + _default(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(_ANNOTATIONS.get(action.dest, ""), super()._get_default_metavar_for_optional(action))


_ANNOTATIONS = {field.name: str(field.type) for field in dataclasses.fields(SearchConfig)}
_METAVARS = {"int": "N", "float": "X", "str": "NAME", "tuple[float, float]": "[X,X]"}
_CHOICES = {
    "space": sorted(SPACES),
    "method": sorted(METHODS),
    "relaxation": sorted(RELAXATIONS),
    "data": list(DATASETS),
    "amp": list(AMP),
}


def _default(action: argparse.Action) -> str:
    if action.dest not in _ANNOTATIONS:
        return ""
    if action.default is not PRESET or "None" in _ANNOTATIONS[action.dest]:
        return "" if action.default is None else f" (default: {action.default})"
    presets = {data: get_method("darts").preset(data)[action.dest] for data in ("digits", "cifar10")}
    if presets["digits"] == presets["cifar10"]:
        return f" (preset: {_show(presets['digits'])})"
    return f" (preset: {_show(presets['digits'])} for digits, {_show(presets['cifar10'])} for cifar10)"


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


class _Parser(ArgumentParser):
    """Reports a bad command line as an exception, and in one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        key = re.search(r'key "(?:search\.)?(\w+)"', message)
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        if key and value and key[1] in _ANNOTATIONS:
            message = f"{key[1]}={value[1]}: expected {describe_type(key[1])}"
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
        if options.subcommand == "genotype":
            return _genotype(options.genotype)
        return _info()
    except KeyboardInterrupt:
        print("fastnas: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError as error:
        if traceback:
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
    return SearchConfig.from_dict({name: options[name] for name in _ANNOTATIONS})


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

        result = search.run(on_step=bar.update, on_epoch=on_epoch)
        if not result.finished:
            folder.save(search)
        pictures = folder.finish(search) if result.history else ()
    if not result.finished:
        console.print(
            f"stopped after epoch {search.epoch}, step {search.step}; to go on:\n"
            f"  fastnas search --resume --out {shlex.quote(str(folder.path))}"
        )
        return 128 + signals[0]
    console.print(
        f"validation accuracy of the supernet {result.history[-1].valid_accuracy:.1%}\n"
        f"{result.genotype.to_text()}\n"
        f"in {folder.path}: genotype.json, {', '.join(p.name for p in pictures)}, alphas.png, metrics.csv, "
        f"config.yaml; curves: tensorboard --logdir {shlex.quote(str(folder.path))}"
    )
    return 0


_HEADINGS = "epoch      lr   train loss, acc   alpha loss   valid loss, acc   spread  seconds   MiB"


def _row(r: EpochRecord) -> str:
    return (
        f"{r.epoch:5}  {r.lr:6.4f}  {r.train_loss:8.4f} {r.train_accuracy:6.1%}  {r.alpha_loss:10.4f}"
        f"  {r.valid_loss:9.4f} {r.valid_accuracy:6.1%}  {r.alpha_spread:6.4f}  {r.seconds:7.1f}"
        f"  {r.peak_memory / _MIB:4.0f}"
    )


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
