"""``fastnas train``."""

from __future__ import annotations

import argparse
import datetime
import shlex
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastnas.commands._common import (
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
from fastnas.nn.stems import STEMS
from fastnas.runs import options as run_options
from fastnas.runs.machine import AMP
from fastnas.train import RECIPES, EpochRecord, TrainConfig, TrainFolder, Training
from fastnas.train.config import DATA, GROUPS, RECIPE, SCHEDULES

HELP = "train an architecture from scratch"
_SHOWN = ("cifar", "imagenet", "nb201", "digits")  # recipes whose values the help text shows


def _default(action: argparse.Action) -> str:
    if action.dest not in TrainConfig.__dataclass_fields__ or action.dest in ("genotype", "recipe"):
        return ""
    if action.dest == "workers":
        return " (default: as many as CPUs, 16 at most)"
    if action.default is not RECIPE or action.dest == "root":
        return "" if action.default is None else f" (default: {show_value(action.default)})"
    values = {name: show_value(RECIPES[name].values[action.dest]) for name in _SHOWN}
    common = values[_SHOWN[0]]
    others = "".join(f"; {name} {value}" for name, value in values.items() if value != common)
    return f" ({common}{others})"


describe(
    "train",
    TrainConfig,
    {
        "recipe": [*RECIPES, "FILE.yaml"],
        "data": list(DATA),
        "stem": list(STEMS),
        "schedule": list(SCHEDULES),
        "amp": list(AMP),
    },
    default=_default,
    expected=lambda name: run_options.describe_type(TrainConfig, name),
)


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    parser = Parser(
        prog="fastnas train",
        usage="fastnas train --genotype NAME|FILE|TEXT [options]",
        print_config=None,
        description="Trains the network of an architecture from scratch and tests it; the weights of the search are "
        "not used. The run folder gets the trained network (model.pt), the numbers of every epoch and checkpoints. "
        "Ctrl-C stops after the step under way; --resume then goes on as if nothing had happened. A recipe is a set of "
        "values for the options below (cifar's comes first, others follow where they differ); an option overrides it, "
        "in --config or on the command line.",
    )
    add_run_arguments(parser, "training", "runs/train-<genotype>-<data>-seed<seed>")
    for group in GROUPS:
        parser.add_class_arguments(group)
    if defaults:
        parser.set_defaults(defaults)
    return parser


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the training."""
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if not options.genotype and not (options.resume and options.out):
        raise UsageError("--genotype is missing: give a name, a file or an architecture written out")
    folder = TrainFolder(options.out or f"runs/train-{_name(options.genotype)}-{options.data}-seed{options.seed}")
    if options.resume:
        stored = folder.config()
        config = _config(again(stored.to_dict()))
        check_resumed(folder.path, stored.to_dict(), config.to_dict(), Training.FREE_ON_RESUME)
    else:
        config = _config(options)
        folder.check_free(overwrite=options.overwrite)
    training = Training(config)
    if options.resume:
        folder.resume(training)
    else:
        folder.start(config, overwrite=options.overwrite)
    with folder:
        return train(training, folder, f"fastnas train --resume --out {shlex.quote(str(folder.path))}")


def _name(genotype: str) -> str:
    """Returns what an architecture is called in the name of a folder."""
    if any(sign in genotype for sign in "|({"):
        return "written"
    file, _, name = genotype.rpartition(":")
    path = Path(genotype)
    if file:
        return name
    return path.parent.name if path.stem == "genotype" and path.parent.name else path.stem


def _config(options: Namespace) -> TrainConfig:
    return TrainConfig.from_dict({name: options[name] for name in option_names("train")})


def train(training: Training, folder: TrainFolder, again: str) -> int:
    """Returns the exit status after the training, or what is left of it, was run and shown.

    Args:
        training: What is run.
        folder: Where it leaves its files.
        again: The command that goes on after a stop.
    """
    config, source = training.config, training.source
    out = console()
    out.print(f"[bold]{RECIPES.find(config.recipe).summary}[/]: recipe {config.recipe}, data {config.data}")
    out.print(config.genotype, markup=False)
    out.print(
        f"{source.counts[0]:,} images train, {source.counts[1]:,} test; {_augmentation(config)}\n"
        f"network of {config.layers} layers, {config.channels} channels, {_size(training)}; {config.device}; "
        f"seed {config.seed}\nrun folder {folder.path}",
        markup=False,
    )
    if training.epoch or training.step:
        out.print(f"resumed after epoch {training.epoch}, step {training.step}")
    out.print(f"[dim]{_HEADINGS}[/]")
    for record in training.history:
        out.print(_row(record))

    with StepBar(out, training) as bar, stop_on_signal(training.stop) as signals:

        def on_epoch(training: Training, record: EpochRecord) -> None:
            folder.record(training, record)
            out.print(_row(record))

        finished = training.run(on_step=bar.update, on_epoch=on_epoch, on_checkpoint=folder.save)
        if not finished:
            folder.save(training)
        elif training.history:
            folder.finish(training)
    if source.unreadable:
        out.print(f"[yellow]{len(source.unreadable):,} images could not be read and were left out[/]")
    if not finished:
        out.print(f"stopped after epoch {training.epoch}, step {training.step}; to go on:\n  {again}", markup=False)
        return 128 + signals[0]
    out.print(f"in {folder.path}: model.pt, checkpoint.pt, best.pt, metrics.csv, config.yaml", markup=False)
    last, seconds = training.history[-1], sum(r.seconds for r in training.history)
    out.print(
        f"test error {1 - last.top1:.2%} (top-5 {1 - last.top5:.2%}), {_size(training)}, "
        f"{datetime.timedelta(seconds=round(seconds))}"
    )
    return 0


def _size(training: Training) -> str:
    return f"{training.size.parameters:,} parameters, {training.size.multiply_adds / 1e6:,.1f} M multiply-adds"


def _augmentation(config: TrainConfig) -> str:
    """Returns what is done to the images, in words."""
    steps = {
        "random crops": config.data == "imagefolder",
        f"pad {config.pad}": config.pad,
        "flip": config.flip,
        "jitter": any(config.jitter),
        f"cutout {config.cutout}": config.cutout,
    }
    return "augmentation: " + (", ".join(name for name, used in steps.items() if used) or "none")


_HEADINGS = "epoch      lr   train loss, acc    test loss   top-1   top-5  seconds"


def _row(r: EpochRecord) -> str:
    return (
        f"{r.epoch:5}  {r.lr:6.4f}  {r.train_loss:8.4f} {r.train_accuracy:6.1%}  {r.test_loss:11.4f}"
        f"  {r.top1:6.2%}  {r.top5:6.2%}  {r.seconds:7.1f}"
    )
