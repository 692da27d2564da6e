"""``fastnas search``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from jsonargparse import Namespace

from fastnas.commands._common import (
    MIB,
    Again,
    Parser,
    StepBar,
    UsageError,
    add_run_arguments,
    check_resumed,
    console,
    describe,
    option_names,
    show_value,
    stop_on_signal,
)
from fastnas.commands._repeat import RepeatFolder, RepeatOptions, repeat
from fastnas.data import DATASETS
from fastnas.relaxations import RELAXATIONS
from fastnas.runs.machine import AMP
from fastnas.search import METHODS, EpochRecord, Search, SearchConfig, get_method
from fastnas.search.config import (
    ALPHA_OPTIMIZERS,
    GROUPS,
    PERTURBATIONS,
    PRESET,
    SELECTIONS,
    describe_type,
)
from fastnas.search.regularizers import REGULARIZERS
from fastnas.search.run import RunFolder
from fastnas.spaces import SPACES

HELP = "search for an architecture"
_TYPES = SearchConfig.__dataclass_fields__


def _default(action: argparse.Action) -> str:
    if action.dest not in _TYPES:
        return ""
    if action.default is not PRESET or "None" in str(_TYPES[action.dest].type):
        return "" if action.default is None else f" (default: {show_value(action.default)})"
    presets = {data: get_method("darts").preset(data)[action.dest] for data in ("digits", "cifar10")}
    if presets["digits"] == presets["cifar10"]:
        return f" (preset: {show_value(presets['digits'])})"
    return f" (preset: {show_value(presets['digits'])} for digits, {show_value(presets['cifar10'])} for cifar10)"


describe(
    "search",
    SearchConfig,
    {
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
    default=_default,
    expected=describe_type,
)


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    search = Parser(
        prog="fastnas search",
        usage="fastnas search [options]",
        print_config=None,
        description="Searches for an architecture, and leaves it in a run folder with its pictures, the numbers of "
        "every epoch and a checkpoint. Without options: the DARTS space, first order, on the digits that scikit-learn "
        "carries. Ctrl-C stops after the step under way; --resume then goes on as if nothing had happened. A preset "
        "below is what the method chooses for the data (those of darts are shown); an option overrides it, in --config "
        "or on the command line.",
    )
    add_run_arguments(search, "search", "runs/<space>-<method>-<data>-seed<seed>")
    search.add_class_arguments(RepeatOptions)
    for group in GROUPS:
        search.add_class_arguments(group)
    if defaults:
        search.set_defaults(defaults)
    return search


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the search, or the searches."""
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if options.resume and options.out and RepeatFolder(options.out).exists():
        return _resume_several(RepeatFolder(options.out), again)
    repeated = _repeated(options)
    if repeated.repeat:
        return _start_several(repeated, options, again)
    config = _config(options)
    folder = RunFolder(options.out or f"runs/{config.space}-{config.method}-{config.data}-seed{config.seed}")
    if options.resume:
        config = _resumed(folder, again)
    else:
        folder.check_free(overwrite=options.overwrite)
    return _run_one(config, folder, resume=options.resume, overwrite=options.overwrite)


def _repeated(options: Namespace) -> RepeatOptions:
    return RepeatOptions(**{field.name: options[field.name] for field in dataclasses.fields(RepeatOptions)})


def _start_several(repeated: RepeatOptions, options: Namespace, again: Again) -> int:
    config = _config(options)
    folder = RepeatFolder(options.out or f"runs/{config.space}-{config.method}-{config.data}-seeds")
    if options.resume:
        return _resume_several(folder, again)
    folder.start(repeated, config, overwrite=options.overwrite)
    return repeat(repeated, config, folder, _run_one, resume=False, out=console())


def _resume_several(folder: RepeatFolder, again: Again) -> int:
    stored = folder.options()
    options = again(stored)
    repeated, config = _repeated(options), _config(options)
    given = {**dataclasses.asdict(repeated), **config.to_dict()}
    check_resumed(folder.path, stored, given, Search.FREE_ON_RESUME | {"repeat", "minutes"})
    return repeat(repeated, config, folder, _run_one, resume=True, out=console())


def _resumed(folder: RunFolder, again: Again) -> SearchConfig:
    """Returns the options to go on with, which are those that the run in the folder was started with."""
    stored = folder.config().to_dict()
    config = _config(again(stored))
    check_resumed(folder.path, stored, config.to_dict(), Search.FREE_ON_RESUME)
    return config


def _run_one(config: SearchConfig, folder: RunFolder, *, resume: bool, overwrite: bool, again: str = "") -> int:
    search = Search(config)
    if resume:
        folder.resume(search)
    else:
        folder.start(config, overwrite=overwrite)
    with folder:
        return _run(search, folder, again or f"fastnas search --resume --out {shlex.quote(str(folder.path))}")


def _config(options: Namespace) -> SearchConfig:
    return SearchConfig.from_dict({name: options[name] for name in option_names("search")})


def _run(search: Search, folder: RunFolder, again: str) -> int:
    config = search.config
    out = console()
    parameters = sum(p.numel() for p in search.supernet.parameters())
    out.print(
        f"[bold]{get_method(config.method).summary}[/]: {config.space} space, {config.data}\n"
        f"{len(search.parts[0]):,} images train the weights, {len(search.parts[1]):,} the alphas"
    )
    out.print(
        f"supernet of {config.layers} layers, {config.channels} channels, {parameters:,} parameters; {config.device}; "
        f"seed {config.seed}\nrun folder {folder.path}",
        markup=False,
    )
    if search.epoch or search.step:
        out.print(f"resumed after epoch {search.epoch}, step {search.step}")
    out.print(f"[dim]{_HEADINGS}[/]")
    for record in search.history:
        out.print(_row(record))

    with StepBar(out, search) as bar, stop_on_signal(search.stop) as signals:

        def on_epoch(search: Search, record: EpochRecord) -> None:
            folder.record(search, record)
            out.print(_row(record))
            for line in _remarks(record):
                out.print(line, highlight=False)

        result = search.run(on_step=bar.update, on_epoch=on_epoch)
        if not result.finished:
            folder.save(search)
        pictures = folder.finish(search) if result.history or result.finished else ()
    if not result.finished:
        out.print(f"stopped after epoch {search.epoch}, step {search.step}; to go on:\n  {again}", markup=False)
        return 128 + signals[0]
    if result.history:
        out.print(f"validation accuracy of the supernet {result.history[-1].valid_accuracy:.1%}")
    out.print(result.genotype.to_text(), markup=False)
    if not result.history:
        for name, value in search.measures.find(result.genotype).items():
            out.print(f"{name} {value:.2f}")
    written = ("genotype.json", *(p.name for p in pictures), "alphas.png", "metrics.csv", "config.yaml")
    page = f"; all on one page: fastnas report {shlex.quote(str(folder.path))}" if result.history else ""
    out.print(f"in {folder.path}: {', '.join(n for n in written if (folder.path / n).exists())}{page}", markup=False)
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
        f"  {r.peak_memory / MIB:4.0f}"
    )
