"""What the commands share: parsers, their help texts and messages, progress bars, signals."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastnas.runs.machine import peak_memory

MIB = 2**20

Again = Callable[[dict[str, Any]], Namespace]
"""Parses the command line once more, over other defaults."""


class UsageError(ValueError):
    """A command line that cannot be understood."""


@dataclasses.dataclass(frozen=True)
class _Described:
    types: Mapping[str, str]
    choices: Mapping[str, Sequence[str]]
    default: Callable[[argparse.Action], str]
    expected: Callable[[str], str | None]


_WORDS = {"int": "a whole number", "int | None": "a whole number", "float": "a number", "bool": "true or false"}
_METAVARS = {"int": "N", "int | None": "N", "float": "X", "str": "NAME", "tuple[float, float]": "[X,X]"}
_METAVARS |= {"list[float]": "[X,...]", "list[str]": "[NAME,...]", "list[list[int]]": "[[K,OPS,EPOCHS,WARMUP],...]"}
_DESCRIBED: dict[str, _Described] = {}


def describe(
    command: str,
    options: type,
    choices: Mapping[str, Sequence[str]],
    *,
    default: Callable[[argparse.Action], str] | None = None,
    expected: Callable[[str], str | None] | None = None,
) -> None:
    """Tells help texts and messages what the options of ``command`` are.

    Args:
        command: its name.
        options: the dataclass of its options.
        choices: what an option may be, by its name.
        default: what a help text says of an option's default; its value, where None.
        expected: what a message says that an option must be; by its type, where None.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(options)}

    def plain(action: argparse.Action) -> str:
        known = action.dest in types and action.default is not None
        return f" (default: {show_value(action.default)})" if known else ""

    _DESCRIBED[command] = _Described(
        types, choices, default or plain, expected or (lambda name: _WORDS.get(types[name]))
    )


def option_names(command: str) -> list[str]:
    """Returns the names of the command's options, those of its dataclass; none where it has no such class."""
    return list(_DESCRIBED[command].types) if command in _DESCRIBED else []


class HelpFormatter(DefaultHelpFormatter):
    """Shows what an option may be, and its default in words."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, Console().width))  # type: ignore[no-untyped-call]
        self._described = _DESCRIBED.get(prog.split()[-1])

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if self._described is None:
            return text
        choices = self._described.choices.get(action.dest)
        if choices:
            text += f" One of: {', '.join(choices)}."
        return text + self._described.default(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        annotation = self._described.types.get(action.dest, "") if self._described else ""
        return _METAVARS.get(annotation, super()._get_default_metavar_for_optional(action))


def show_value(value: object) -> str:
    """Returns the text of a default as the command line would have it."""
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


class Parser(ArgumentParser):
    """Reports a bad command line as an exception, and in one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        found = re.search(r'key "(?:(\w+)\.)?(\w+)"', message)
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        if found and value:
            described, key = _DESCRIBED.get(found[1] or self.prog.split()[-1]), found[2]
            expected = described.expected(key) if described and key in described.types else None
            if expected:
                message = f"{key}={value[1]}: expected {expected}"
        # argparse calls a subcommand "fastnas COMMAND ... search".
        command = "" if self.prog == "fastnas" else f" {self.prog.split()[-1]}"
        raise UsageError(f"{' '.join(message.split())} (see fastnas{command} --help)") from ex


def console() -> Console:
    """Returns the console of the standard output; lines in a file or a pipe are left whole."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def progress(console: Console, title: str) -> Progress:
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


class Run(Protocol):
    """What a :class:`StepBar` asks of a search or a training."""

    config: Any
    device: torch.device
    epoch: int
    step: int
    steps_per_epoch: int

    def progress(self) -> dict[str, float]:
        """Returns the means over the epoch under way, with train_loss and train_accuracy."""


class StepBar:
    """A progress bar of a run under its table; nothing at all where the output is no terminal."""

    def __init__(self, console: Console, run: Run) -> None:
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
            "run", total=run.config.epochs * run.steps_per_epoch, **self._fields(run)
        )
        self._progress.update(self._task, completed=run.epoch * run.steps_per_epoch + run.step)

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, run: Run) -> None:
        """Shows where the run is."""
        done = run.epoch * run.steps_per_epoch + run.step
        self._progress.update(self._task, completed=done, **self._fields(run))

    @staticmethod
    def _fields(run: Run) -> dict[str, Any]:
        now = run.progress()
        started = run.step > 0
        return {
            "epoch": f"{min(run.epoch + 1, run.config.epochs)}/{run.config.epochs}",
            "loss": f"{now['train_loss']:.3f}" if started else "-",
            "accuracy": f"{now['train_accuracy']:.1%}" if started else "-",
            "memory": f"{peak_memory(run.device) / MIB:.0f}",
        }


def add_run_arguments(parser: Parser, what: str, out: str) -> None:
    """Adds --config, --out, --resume and --overwrite.

    Args:
        parser: of the command.
        what: what a run is called.
        out: the default of --out, in words.
    """
    run = parser.add_argument_group("Run")
    run.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="A YAML file with any of these options, such as a run's config.yaml.",
    )
    run.add_argument("--out", metavar="FOLDER", help=f"The run folder. (default: {out})")
    run.add_argument("--resume", action="store_true", help=f"Continue the {what} in the run folder, with its options.")
    run.add_argument("--overwrite", action="store_true", help="Replace the run in the run folder.")


def check_resumed(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any], free: Collection[str]) -> None:
    """Checks that a run is resumed with the options that it was started with, but for those that are ``free``.

    Raises:
        UsageError: where it is not.
    """
    for name, value in stored.items():
        if name not in free and given[name] != value:
            raise UsageError(
                f"--resume continues {folder} with {name}={value}; leave out --{name}, or start another run with --out"
            )


class Interrupted(BaseException):
    """A signal asked the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM in the block into an exception."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signal(stop: Callable[[], object]) -> Iterator[list[int]]:
    """Turns the first Ctrl-C (or SIGTERM) in the block into a call of ``stop``; yields what was received.

    A second one has its usual effect.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop()
        for n, handler in previous.items():
            signal.signal(n, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
