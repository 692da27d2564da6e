"""Model files: a trained network with everything that its use needs, in one file that nothing is executed of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnas import __version__
from fastnas._files import load_tensors, write_atomic
from fastnas.genotype import AnyGenotype, parse_genotype
from fastnas.inference.networks import build_network

FORMAT = "fastnas model"
VERSION = 1

_AUXILIARY = "auxiliary_head."


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained network, and how it is used.

    Attributes:
        network: in evaluation mode; its ``forward`` takes normalised images and gives logits.
        genotype: its architecture.
        classes: the names of the classes, in the order of the logits.
        mean: per channel, of images scaled to [0, 1]; images are normalised with it.
        std: likewise.
        image_size: height and width of the images that it was trained with.
        crop: the square in the centre of an image that is resized to that, as a part of the shorter side.
        metrics: what the training measured, by name.
    """

    network: nn.Module
    genotype: AnyGenotype
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    crop: float
    metrics: dict[str, Any]

    def normalise(self, images: Tensor) -> Tensor:
        """Returns what the network reads, float32 (N, C, H, W), on its device.

        Args:
            images: uint8 (N, C, H, W), of any height and width that the network takes.

        Raises:
            ValueError: where they are of another type, or have other channels.
        """
        channels = len(self.mean)
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: expected torch.uint8 (N, {channels}, H, W)"
            )
        device = next(self.network.parameters()).device
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.to(device).float() / 255 - mean) / std

    def predict(self, images: Tensor) -> Tensor:
        """Returns the probabilities of the classes, (N, classes), on the network's device.

        Args:
            images: as those of :meth:`normalise`.

        Raises:
            ValueError: as :meth:`normalise`, or where the network cannot take images of this size.
        """
        with torch.inference_mode():
            return self.network(self.normalise(images)).softmax(1)  # type: ignore[no-any-return]


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    genotype: AnyGenotype,
    network: Mapping[str, Any],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    crop: float = 1.0,
    metrics: Mapping[str, Any],
) -> None:
    """Writes a trained network to a model file, whole or not at all. Weights are float32; no auxiliary head is kept.

    Args:
        path: of the file.
        model: what :func:`~fastnas.inference.build_network` made of the next two arguments, trained.
        genotype: its architecture.
        network: its other arguments.
        classes: names of the classes, in the order of the logits.
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        image_size: height and width of the images that it was trained with.
        crop: the square in the centre of an image that was tested on, as a part of the shorter side.
        metrics: what the training measured: names and plain values.

    Raises:
        OSError: where the file cannot be written.
        ValueError: where the arguments do not fit together; nothing is written then.
    """
    header = {
        "genotype": genotype.to_json(),
        "network": dict(network),
        "classes": [str(c) for c in classes],
        "mean": [float(v) for v in mean],
        "std": [float(v) for v in std],
        "image_size": image_size,
        "crop": crop,
        "metrics": dict(metrics),
    }
    try:
        header = json.loads(json.dumps(header))
    except TypeError as error:
        raise ValueError(f"metrics and network must hold plain numbers and text: {error}") from None
    state = {
        name: (t.float() if t.is_floating_point() else t).detach().to("cpu", copy=True).contiguous()
        for name, t in model.state_dict().items()
        if not name.startswith(_AUXILIARY)
    }
    _read(header, state)
    content = {"format": FORMAT, "version": VERSION, "fastnas": __version__, **header, "state": state}
    write_atomic(path, lambda file: torch.save(content, file))


def model_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path itself, or of a folder the ``model.pt`` in it."""
    path = Path(path)
    return path / "model.pt" if path.is_dir() else path


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TrainedModel:
    """Returns the model in a file that :func:`save_model` wrote. Nothing in the file is executed.

    Args:
        path: of the file, or of a folder with a ``model.pt``.
        device: where the network goes.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is damaged, foreign, newer than this fastnas, or does not fit together.
    """
    path = model_path(path)
    try:
        content = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or is no model of fastnas ({error}); {_REMEDY}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        what = f"a {found}" if isinstance(found, str) and found.startswith("fastnas ") else "no model of fastnas"
        raise ValueError(f"{path} is {what}, not a trained model; {_REMEDY}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has model version {content.get('version')}, written by fastnas {content.get('fastnas')}; "
            f"this is fastnas {__version__}, which reads version {VERSION}: update it"
        )
    try:
        model = _read(content, content["state"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no complete model: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dataclasses.replace(model, network=model.network.to(device))


_REMEDY = "give the model.pt that `fastnas train` wrote"


def _read(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> TrainedModel:
    """Returns the model that a file's content describes, with the tensors of ``state`` themselves.

    Raises:
        ValueError: where parts of it do not fit together.
    """
    network, classes, mean, std = header["network"], header["classes"], header["mean"], header["std"]
    genotype = parse_genotype(header["genotype"])
    with torch.device("meta"):  # weights are the state's: none are drawn, and wrong sizes cost nothing
        module = build_network(genotype, network)
    if len(classes) != network["num_classes"]:
        raise ValueError(f"classes has {len(classes)} names, the network {network['num_classes']} logits")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != network["in_channels"]:
            raise ValueError(f"{name} has {len(values)} values, the images {network['in_channels']} channels")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")
    if type(header["image_size"]) is not int or header["image_size"] < 1:
        raise ValueError(f"image_size must be a positive whole number, got {header['image_size']!r}")
    crop = header.get("crop", 1.0)  # the first files lack it
    if type(crop) not in (int, float) or not 0 < crop <= 1:
        raise ValueError(f"crop must be above 0 and at most 1, got {crop!r}")
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ValueError(
            "the weights are not those of the genotype and network: " + detail[:200] + ("..." if detail[200:] else "")
        ) from error
    if any(t.dtype not in (torch.float32, torch.int64) for t in state.values()):
        raise ValueError("the weights must be float32")
    return TrainedModel(
        network=module.eval(),
        genotype=genotype,
        classes=tuple(classes),
        mean=tuple(mean),
        std=tuple(std),
        image_size=header["image_size"],
        crop=crop,
        metrics=dict(header["metrics"]),
    )
