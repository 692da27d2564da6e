"""The options of a search. Their docstrings are the text of ``fastnas search --help``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch

from fastnas.search.methods import get_method

PRESET: Any = None
"""The default of an option whose value comes from the method's preset for the data."""


@dataclass(frozen=True)
class SpaceOptions:
    """What is searched, and how.

    Attributes:
        space: The search space.
        method: The search method, a preset of the options below.
        relaxation: The function from alphas to the weights of the mixed operations.
        k: Partial channels: candidates see 1/k of the channels, the others bypass them. 1 is all channels.
        channels: Channels of the first cell. Each reduction cell doubles them.
        layers: Cells of the supernet, 3 or more; those at 1/3 and 2/3 of the depth are reduction cells. In the space
            nb201: cells of each of the three stages.
    """

    space: str = "darts"
    method: str = "darts"
    relaxation: str = PRESET
    k: int = PRESET
    channels: int = PRESET
    layers: int = PRESET


@dataclass(frozen=True)
class DataOptions:
    """The images.

    Attributes:
        data: The data set. digits needs no files, npz is for images of your own.
        root: Where its files are: the official archive, the folder it extracts to or one that holds either; for npz,
            the file.
        train_portion: The part of the images that trains the weights; the rest trains the alphas and gives the
            validation accuracy.
        batch_size: Images in a batch, for the weights and for the alphas alike.
        pad: Augmentation: the images are padded by this many pixels and cropped back at random. 0 is off.
        flip: Augmentation: each image is mirrored with probability 1/2.
        cutout: Augmentation: the side of the square that is blanked out, in pixels. 0 is off.
    """

    data: str = "digits"
    root: str | None = None
    train_portion: float = PRESET
    batch_size: int = PRESET
    pad: int = PRESET
    flip: bool = PRESET
    cutout: int = PRESET


@dataclass(frozen=True)
class WeightOptions:
    """Training of the weights, by SGD whose learning rate falls along a cosine.

    Attributes:
        epochs: Passes over the training images.
        lr: Learning rate of the first epoch.
        lr_min: What the learning rate falls towards.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        clip: The largest norm of the weights' gradient; a longer one is scaled down. 0 is off.
    """

    epochs: int = PRESET
    lr: float = PRESET
    lr_min: float = PRESET
    momentum: float = PRESET
    weight_decay: float = PRESET
    clip: float = PRESET


@dataclass(frozen=True)
class AlphaOptions:
    """Training of the architecture parameters, by Adam.

    Attributes:
        alpha_lr: Learning rate of the alphas.
        alpha_betas: Adam's two decay rates.
        alpha_weight_decay: Weight decay of the alphas.
        alpha_warmup: Epochs in which only the weights are trained, before the alphas start to move.
        alpha_scale: Standard deviation of the alphas at the start.
    """

    alpha_lr: float = PRESET
    alpha_betas: tuple[float, float] = PRESET
    alpha_weight_decay: float = PRESET
    alpha_warmup: int = PRESET
    alpha_scale: float = PRESET


@dataclass(frozen=True)
class MachineOptions:
    """Seed and machine.

    Attributes:
        seed: Fixes every random choice. On the CPU, with the same number of threads, the same seed gives the same
            alphas bit for bit.
        device: Where to run: cpu, cuda, cuda:1 ..., or auto for the GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves them to torch.
        amp: bf16 runs the supernet under autocast in bfloat16; none in float32. Logits, loss, weights, alphas and the
            optimizers' state are float32 either way.
        cuda_graphs: On a GPU, launch each of a step's two halves as one CUDA graph. This has not run on a GPU yet: it
            is tested on the CPU, with a stand-in for the recording.
    """

    seed: int = 0
    device: str = "auto"
    threads: int = PRESET
    amp: str = "none"
    cuda_graphs: bool = False


AMP: dict[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16}
"""What ``amp`` may be, and the dtype of autocast; None is no autocast."""

GROUPS = (SpaceOptions, DataOptions, WeightOptions, AlphaOptions, MachineOptions)
"""The option groups in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(MachineOptions, AlphaOptions, WeightOptions, DataOptions, SpaceOptions):
    """Every option of a search, each one resolved.

    An option that is left out (or None) takes its value from the method's preset for the data, so an instance has no
    open values: ``SearchConfig(data="digits").lr`` is a number. ``dataclasses.replace`` therefore keeps the values of
    the preset that the instance was made with.

    Raises:
        ValueError: for a value that makes no sense; the message names the option and what it accepts.
        TypeError: for a value of the wrong type.
    """

    def __post_init__(self) -> None:
        preset = get_method(self.method).preset(self.data)
        for name, value in preset.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        # YAML has no tuples.
        if isinstance(self.alpha_betas, list):
            object.__setattr__(self, "alpha_betas", tuple(self.alpha_betas))
        for field in fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        for name, (accepts, meaning) in _RANGES.items():
            value = getattr(self, name)
            if not accepts(value):
                raise ValueError(f"{name}={value!r}: expected {meaning}")
        if self.cuda_graphs and not self.device.startswith("cuda"):
            raise ValueError(f"cuda_graphs=True with device={self.device}: only a GPU has them; set it to False")
        if self.channels % self.k:
            raise ValueError(f"k={self.k} does not divide channels={self.channels}; choose channels as a multiple of k")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min={self.lr_min} is above lr={self.lr}; lower lr_min")
        if self.alpha_warmup >= self.epochs:
            raise ValueError(
                f"alpha_warmup={self.alpha_warmup} with epochs={self.epochs}: the alphas would never move; "
                "choose a shorter alpha_warmup or more epochs"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain values that YAML and JSON can hold; :meth:`from_dict` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SearchConfig:
        """Returns the configuration with these options.

        Raises:
            ValueError: for an unknown option or a value that makes no sense.
            TypeError: for a value of the wrong type.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown option {unknown[0]!r}; `fastnas search --help` lists the options")
        return cls(**options)


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "str | None": ((str, type(None)), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "tuple[float, float]": ((tuple,), "two numbers"),
}


def describe_type(option: str) -> str:
    """Returns what values ``option`` takes, in words: "a number"."""
    return next(_TYPES[str(field.type)][1] for field in fields(SearchConfig) if field.name == option)


def _check_type(name: str, annotation: str, value: object) -> None:
    types, meaning = _TYPES[annotation]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name}={value!r}: expected {meaning}")


def _betas(value: object) -> bool:
    pair = cast("tuple[object, ...]", value)
    return len(pair) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in pair)


_POSITIVE_INT = (lambda v: v >= 1, "a whole number of at least 1")
_WHOLE = (lambda v: v >= 0, "a whole number of at least 0")
_POSITIVE = (lambda v: 0 < v < math.inf, "a number above 0")
_NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "a number of at least 0")

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "k": _POSITIVE_INT,
    "channels": _POSITIVE_INT,
    "layers": (lambda v: v >= 3, "at least 3: fewer layers leave no room for both cell types"),
    "train_portion": (lambda v: 0 < v < 1, "a part between 0 and 1, such as 0.5"),
    "batch_size": _POSITIVE_INT,
    "pad": _WHOLE,
    "cutout": _WHOLE,
    "epochs": _POSITIVE_INT,
    "lr": _POSITIVE,
    "lr_min": _NOT_NEGATIVE,
    "momentum": (lambda v: 0 <= v < 1, "a number of at least 0 and below 1"),
    "weight_decay": _NOT_NEGATIVE,
    "clip": _NOT_NEGATIVE,
    "alpha_lr": _POSITIVE,
    "alpha_betas": (_betas, "two numbers of at least 0 and below 1, such as [0.5, 0.999]"),
    "alpha_weight_decay": _NOT_NEGATIVE,
    "alpha_warmup": _WHOLE,
    "alpha_scale": _NOT_NEGATIVE,
    "seed": (lambda v: 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1"),
    "threads": _WHOLE,
    "amp": (lambda v: v in AMP, f"one of {', '.join(AMP)}"),
}
