"""``fastnas predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.table import Column, Table
from torch import Tensor

from fastnas._device import as_device
from fastnas.commands._common import Again, Parser, UsageError, console

HELP = "what a trained network sees in images"
BATCH = 64


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    predict = Parser(
        prog="fastnas predict",
        usage="fastnas predict --checkpoint MODEL IMAGE [IMAGE ...] [options]",
        description="Prints the most probable classes of images. Of each the model sees what its training's test "
        "did: the square in the centre, resized. An image that cannot be read does not stop the others; the "
        "exit status is then 2.",
    )
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="Files of images, or folders of such files.")
    predict.add_argument(
        "--checkpoint", metavar="MODEL", required=True, help="The model.pt of a training, or its run folder."
    )
    predict.add_argument("--top", type=int, default=5, metavar="N", help="How many classes. (default: 5)")
    predict.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 ..., or auto for the GPU where there is one. (default: auto)",
    )
    predict.add_argument("--json", action="store_true", help="Print JSON, all on one line.")
    return predict


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the classes were printed: 2 where an image could not be read."""
    from fastnas.inference import image_files, load_model, read_image

    if options.top < 1:
        raise UsageError(f"top={options.top}: expected a whole number above 0 (see fastnas predict --help)")
    model = load_model(options.checkpoint, as_device(options.device))
    files = image_files(options.images)
    results: list[tuple[Path, list[tuple[str, float]]]] = []
    failed = False
    for start in range(0, len(files), BATCH):
        batch: list[tuple[Path, Tensor]] = []
        for path in files[start : start + BATCH]:
            try:
                batch.append((path, read_image(path, len(model.mean), model.image_size, model.crop)))
            except (ValueError, OSError) as error:  # noqa: PERF203
                failed = True
                message = error if isinstance(error, ValueError) else f"{path}: {error.strerror}"
                print(f"fastnas: error: {message}", file=sys.stderr)
        if batch:
            values, indices = model.predict(torch.stack([x for _, x in batch])).sort(1, descending=True)
            best = zip(values[:, : options.top].tolist(), indices[:, : options.top].tolist(), strict=True)
            for (path, _), (probabilities, classes) in zip(batch, best, strict=True):
                named = [(model.classes[i], p) for i, p in zip(classes, probabilities, strict=True)]
                results.append((path, named))
    if options.json:
        rows = [
            {"image": str(path), "classes": [{"name": name, "probability": p} for name, p in named]}
            for path, named in results
        ]
        print(json.dumps(rows))
    elif len(results) == 1:
        width = max(len(name) for name, _ in results[0][1])
        for name, p in results[0][1]:
            print(f"{name:{width}}  {p:7.2%}")
    elif results:
        table = Table(Column("image", overflow="fold"), box=None, pad_edge=False)
        for n in range(len(results[0][1])):
            table.add_column(f"{n + 1}.")
        for path, named in results:
            table.add_row(str(path), *(f"{name} {p:.1%}" for name, p in named))
        out = console()
        # lines in a file or a pipe are left whole
        out.print(table, markup=False, width=None if out.is_terminal else 10_000)
    return 2 if failed else 0
