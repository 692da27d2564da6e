"""Trained networks in files that run without fastnas: ONNX, and torch.export's programs."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnas import __version__, use_backend
from fastnas._files import write_atomic
from fastnas.inference.model_file import TrainedModel, load_model

TOLERANCE = 1e-4
"""How far a logit of an exported network may be from the model's, relative to the largest where that is above 1."""

_Run = Callable[[Tensor], Tensor]


def export_onnx(model: TrainedModel | str | os.PathLike[str], path: str | os.PathLike[str]) -> float:
    """Writes a model as ONNX, whole or not at all; returns the largest error of its logits in onnxruntime.

    Its input ``images`` is float32 (N, C, size, size) for any N, normalised; its output ``logits`` (N, classes). The
    metadata has the texts ``genotype``, ``classes``, ``mean``, ``std``, ``image_size``, ``crop``, ``metrics``,
    ``fastnas``, in JSON all but the first and the last.

    Args:
        model: a model, or the file of one.
        path: of the file to write.

    Raises:
        OSError: where a file cannot be read or written.
        ValueError: where the packages are missing, or the logits differ by more than :data:`TOLERANCE`; nothing is
            written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ValueError(f"ONNX needs packages that are not installed ({error}): pip install 'fastnas[onnx]'") from None
    model = _loaded(model)
    network, images = _prepared(model)
    with _exporting():
        program = _program(network, images)
        onnx: Any = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    onnx.model.metadata_props.update(_metadata(model))
    content: bytes = onnx.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    worst = _checked(network, run, images)
    write_atomic(path, lambda file: file.write(content))
    return worst


def export_program(model: TrainedModel | str | os.PathLike[str], path: str | os.PathLike[str]) -> float:
    """Writes a model as a program of torch.export, whole or not at all; returns the largest error of its logits.

    ``torch.export.load(path).module()(images)`` runs it, with torch alone; ``images`` as in :func:`export_onnx`, whose
    metadata are the extra file ``fastnas.json``.

    Args:
        model: a model, or the file of one.
        path: of the file to write, which torch wants to end in ``.pt2``.

    Raises:
        OSError: where a file cannot be read or written.
        ValueError: where the logits differ by more than :data:`TOLERANCE`; nothing is written then.
    """
    model = _loaded(model)
    network, images = _prepared(model)
    file = io.BytesIO()
    with _exporting():
        torch.export.save(_program(network, images), file, extra_files={"fastnas.json": json.dumps(_metadata(model))})
        content = file.getvalue()
        worst = _checked(network, torch.export.load(io.BytesIO(content)).module(), images)
    write_atomic(path, lambda file: file.write(content))
    return worst


def _loaded(model: TrainedModel | str | os.PathLike[str]) -> TrainedModel:
    return model if isinstance(model, TrainedModel) else load_model(Path(model))


def _prepared(model: TrainedModel) -> tuple[nn.Module, Tensor]:
    """Returns a copy of the network on the CPU, and random images."""
    generator = torch.Generator().manual_seed(0)
    size = (2, len(model.mean), model.image_size, model.image_size)
    return copy.deepcopy(model.network).cpu().eval(), torch.randn(size, generator=generator)


@contextmanager
def _exporting() -> Iterator[None]:
    """Runs the networks' modules in plain PyTorch, and keeps what torch's exporters say to their developers quiet."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with use_backend("reference"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _program(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _metadata(model: TrainedModel) -> dict[str, str]:
    values = {name: getattr(model, name) for name in ("classes", "mean", "std", "image_size", "crop", "metrics")}
    texts = {name: json.dumps(value) for name, value in values.items()}
    return {"genotype": model.genotype.to_text(), **texts, "fastnas": __version__}


def _checked(network: nn.Module, run: _Run, images: Tensor) -> float:
    """Returns the largest difference of logits, of one image and of several.

    Raises:
        ValueError: where it is more than the tolerance.
    """
    worst = 0.0
    for x in (images[:1], torch.cat([images, images.flip(0) * 0.5, images[:1] + 0.5])):
        with torch.no_grad():
            expected, got = network(x), run(x)
        difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ValueError(f"the exported network's logits differ from the model's by {difference:.1e}: not written")
        worst = max(worst, difference)
    return worst
