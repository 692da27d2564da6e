"""The ``fastnas`` command."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

import fastnas
from fastnas.commands import COMMANDS
from fastnas.commands._common import HelpFormatter, Parser, option_names


def _parser(command: str = "", defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """Returns the parser of the whole command line; ``defaults`` are those of the options of ``command``."""
    about = "Fast differentiable neural architecture search."
    more = (
        "Errors are one line; with --traceback, or FASTNAS_TRACEBACK=1 in the environment, Python's traceback is shown."
    )
    parser = Parser(
        prog="fastnas",
        formatter_class=HelpFormatter,
        description=f"{about} {more}",
        version=fastnas.__version__,
        usage="fastnas COMMAND ...",
    )
    commands = parser.add_subcommands(required=True, title="commands", metavar="COMMAND")

    for name, module in COMMANDS.items():
        commands.add_subcommand(name, module.parser(defaults if name == command else None), help=module.HELP)
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
    command = ""
    try:
        options = _parser().parse_args(arguments)
        command = options.subcommand

        def again(defaults: dict[str, Any]) -> Namespace:
            parsed: Namespace = _parser(command, defaults).parse_args(arguments)[command]
            return parsed

        status: int = COMMANDS[command].run(options[command], again)
        return status
    except KeyboardInterrupt:
        print("fastnas: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except RuntimeError as error:
        # on the CPU, torch has no exception of its own for it
        if traceback or not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        return _fail(f"out of memory{_advice(command)} ({_line(error)})")
    except (ValueError, OSError, ArithmeticError) as error:
        if traceback:
            raise
        return _fail(_line(error))


def _advice(command: str) -> str:
    """Returns which options of a command make it need less memory."""
    known = option_names(command)
    less, more = ([n for n in names if n in known] for names in (("batch_size", "channels"), ("k", "accumulate")))
    ways = [f"a {size} {' or '.join(names)}" for size, names in (("smaller", less), ("larger", more)) if names]
    return f"; {', or '.join(ways)}{',' * (len(ways) - 1)} needs less" if ways else ""


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    print(f"fastnas: error: {message}", file=sys.stderr)
    return 2
