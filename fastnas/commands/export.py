"""``fastnas export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastnas.commands._common import Again, Parser

HELP = "a trained network as ONNX, or as a program of torch.export"


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    export = Parser(
        prog="fastnas export",
        usage="fastnas export MODEL --to onnx|pt2 [options]",
        description="Writes a trained network to a file that runs without fastnas, for any number of images at once. "
        "Its logits are compared with the model's before the file is written.",
    )
    export.add_argument("model", metavar="MODEL", help="The model.pt of a training, or its run folder.")
    export.add_argument(
        "--to",
        choices=["onnx", "pt2"],
        required=True,
        help="onnx: for onnxruntime and others; needs fastnas[onnx]. pt2: for torch.export.load.",
    )
    export.add_argument("--out", metavar="FILE", help="Where to; beside the model where it is not given.")
    return export


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the file was written."""
    from fastnas.inference import export_onnx, export_program, load_model, model_path

    path = model_path(options.model)
    model = load_model(path)
    out = path.with_suffix(f".{options.to}") if options.out is None else Path(options.out)
    error = (export_onnx if options.to == "onnx" else export_program)(model, out)
    channels, size = len(model.mean), model.image_size
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): images (N, {channels}, {size}, {size}), normalised; logits")
    print(f"agree with the model's to {error:.0e}")
    return 0
