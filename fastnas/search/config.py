"""The options of a search. Their docstrings are the text of ``fastnas search --help``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastnas.relaxations import get_relaxation
from fastnas.runs import options
from fastnas.runs.machine import AMP
from fastnas.runs.options import BELOW_ONE, NOT_NEGATIVE, POSITIVE, POSITIVE_INT, SEED, WHOLE, one_of, two
from fastnas.search.methods import get_method
from fastnas.search.regularizers import REGULARIZERS, get_regularizer

PRESET: Any = None
"""The default of an option whose value comes from the method's preset for the data."""


@dataclass(frozen=True)
class SpaceOptions:
    """What is searched, and how.

    Attributes:
        space: The search space.
        method: The search method, a preset of the options below.
        relaxation: The function from alphas to the weights of the mixed operations.
        k: Partial channels: candidates see 1/k of the channels, the others bypass them. 1 is all channels. Of a search
            in stages, the first stage's.
        edge_normalization: A weight for each edge, a softmax over those that enter a node, is learned beside the
            alphas (PC-DARTS).
        stages: A progressive search (DrNAS): a list of stages [k, operations, epochs, warm-up]. Each one starts with
            the best operations of every edge, that many, and with wider ones where its k is smaller; its first epochs
            leave the alphas alone. [] is one stage of the options k, epochs and alpha_warmup.
        channels: Channels of the first cell; each reduction cell doubles them. Of a chain, channels of the stem, to
            which all others are in proportion.
        layers: Cells of the supernet; those at 1/3 and 2/3 of the depth are reduction cells, so there are 3 or more. In
            the space nb201: cells of each of the three stages, 1 or more. A chain has but its own number of layers.
    """

    space: str = "darts"
    method: str = "darts"
    relaxation: str = PRESET
    k: int = PRESET
    edge_normalization: bool = PRESET
    stages: list[list[int]] = PRESET
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
        epochs: Passes over the training images. Of a search in stages, the sum of theirs.
        lr: Learning rate of the first epoch.
        lr_min: What the learning rate falls towards.
        momentum: Momentum of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: Weight decay of SGD.
        clip: The largest norm of the weights' gradient; a longer one is scaled down. 0 is off.
        skip_dropout: Dropout on the skip connections of the first epoch; it falls by exp(-0.2) an epoch (P-DARTS).
            0 is off.
        perturbation: What disturbs the weights of the mixed operations while the network's are trained (SDARTS): none;
            random, uniform noise; or adversarial, what raises the loss most.
        perturbation_radius: The largest disturbance of a weight, in the first epoch and after the last.
        accumulate: Parts that a batch is cut into; the gradient is the mean over the parts, each with its own batch
            norm statistics, and a part's feature maps are all that is kept in memory. 1 is off.
        paths: Architectures, or draws of the relaxation, that a step of the weights averages the gradients of, each on
            the whole batch.
        fair: A step averages over as many paths as there are candidates, and every candidate of an edge is in one of
            them (FairNAS, which adds the gradients instead).
        checkpoint_cells: Keep only what cells read and run each one again for its gradient: less memory, more time.
    """

    epochs: int = PRESET
    lr: float = PRESET
    lr_min: float = PRESET
    momentum: float = PRESET
    nesterov: bool = PRESET
    weight_decay: float = PRESET
    clip: float = PRESET
    skip_dropout: float = PRESET
    perturbation: str = PRESET
    perturbation_radius: tuple[float, float] = PRESET
    accumulate: int = 1
    paths: int = 1
    fair: bool = False
    checkpoint_cells: bool = False


@dataclass(frozen=True)
class AlphaOptions:
    """Training of the architecture parameters, and what becomes of them.

    Attributes:
        order: Whose gradient the alphas follow: 1, the loss at the weights as they are; 2, the loss after a step of the
            weights (DARTS' second order, about 2.5 times as long); 0, none, the alphas stay as they are.
        alpha_first: Whether a step moves the alphas before the weights, as DARTS does, or after them, as NAS-Bench-201.
        alpha_optimizer: The optimizer of the alphas.
        alpha_lr: Learning rate of the alphas.
        alpha_betas: Adam's two decay rates.
        alpha_weight_decay: Weight decay of the alphas.
        alpha_warmup: Epochs in which only the weights are trained, before the alphas start to move. Of a search in
            stages, the first stage's.
        alpha_scale: Standard deviation of the alphas at the start.
        regularizer: What keeps DrNAS' distribution near the uniform one: none; l2, weight decay of the alphas on top of
            alpha_weight_decay, as published; l2_beta, the distance of the concentrations from 1; or kl, the divergence
            from the uniform Dirichlet distribution.
        regularizer_scale: Its factor.
        temperature: Of the relaxations gumbel_softmax and gdas, in the first and in the last epoch; linear between.
        select: How the architecture is found in the end: derive, from the alphas; evaluate, the best of random ones
            with the supernet's weights on the validation images; or random, the first of random ones.
        candidates: How many random architectures are evaluated.
    """

    order: int = PRESET
    alpha_first: bool = PRESET
    alpha_optimizer: str = PRESET
    alpha_lr: float = PRESET
    alpha_betas: tuple[float, float] = PRESET
    alpha_weight_decay: float = PRESET
    alpha_warmup: int = PRESET
    alpha_scale: float = PRESET
    regularizer: str = PRESET
    regularizer_scale: float = PRESET
    temperature: tuple[float, float] = PRESET
    select: str = PRESET
    candidates: int = PRESET


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured at the end of an epoch, beside loss and accuracy.

    Attributes:
        discrete: Measure the architecture so far with the supernet's weights: its accuracy is below the supernet's by
            the discretisation gap.
        table: A CSV file, gzipped or not, with what the space's architectures are worth, in which the architecture so
            far is looked up.
        columns: The table's columns of interest. [] is test accuracies of NAS-Bench-201 or -Macro, or every column.
        samples: Architectures that are drawn and looked up in the table, for their mean and their spread: derived from
            random weights, or an operation an edge by the weights of a relaxation that is not random. 0 is none.
        hessian: Every so many epochs, the Hessian of the loss on one batch of validation images with respect to the
            weights of the mixed operations, at the relaxation's mean: dominant eigenvalue, norm and trace. 0 is never.
    """

    discrete: bool = PRESET
    table: str | None = None
    columns: list[str] = PRESET
    samples: int = PRESET
    hessian: int = 0


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


GROUPS = (SpaceOptions, DataOptions, WeightOptions, AlphaOptions, MeasureOptions, MachineOptions)
"""The option groups in the order in which they are shown."""


@dataclass(frozen=True)
class Stage:
    """A stage of a progressive search (arXiv:2006.10355, section 3.3).

    Attributes:
        k: Partial channels: candidates see 1/k of the channels.
        ops: Operations that every edge keeps; 0 is all.
        epochs: Its length.
        warmup: Its first epochs in which only the weights are trained.
    """

    k: int
    ops: int
    epochs: int
    warmup: int


SELECTIONS = ("derive", "evaluate", "random")
"""What ``select`` may be."""

PERTURBATIONS = ("none", "random", "adversarial")
"""What ``perturbation`` may be."""

ALPHA_OPTIMIZERS = ("adam", "sgd")
"""What ``alpha_optimizer`` may be."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(MachineOptions, MeasureOptions, AlphaOptions, WeightOptions, DataOptions, SpaceOptions):
    """Every option of a search, each one resolved.

    An option that is left out (or None) takes its value from the method's preset for the data, so an instance has no
    open values: ``SearchConfig(data="digits").lr`` is a number. ``dataclasses.replace`` therefore keeps the values of
    the preset that the instance was made with.

    Raises:
        ValueError: for a value that makes no sense; the message names the option and what it accepts.
        TypeError: for a value of the wrong type.
    """

    def __post_init__(self) -> None:
        preset = get_method(self.method).preset(self.data, self.space)
        given = {name: getattr(self, name) for name in ("k", "epochs", "alpha_warmup")}
        for name, default in preset.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        options.check(self, _RANGES)
        if self.stages:
            first = self.schedule[0]
            implied = {
                "k": first.k,
                "epochs": sum(stage.epochs for stage in self.schedule),
                "alpha_warmup": first.warmup,
            }
            for name, value in implied.items():
                if given[name] not in (None, value):
                    raise ValueError(f"{name}={given[name]} with stages={self.stages}: set it there, not by {name}")
                object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Checks what only several options tell."""
        if self.cuda_graphs and not self.device.startswith("cuda"):
            raise ValueError(f"cuda_graphs=True with device={self.device}: only a GPU has them; set it to False")
        fixed = {"order": self.order == 1, "stages": len(self.stages) < 2, "perturbation": self.perturbation == "none"}
        fixed |= {"relaxation": not get_relaxation(self.relaxation).single_path, "skip_dropout": not self.skip_dropout}
        fixed |= {"temperature": self.temperature[0] == self.temperature[1]}
        fixed |= {
            "paths": self.paths == 1,
            "accumulate": self.accumulate == 1,
            "checkpoint_cells": not self.checkpoint_cells,
        }
        changing = [name for name, same in fixed.items() if not same]
        if self.cuda_graphs and changing:
            name = changing[0]
            raise ValueError(
                f"cuda_graphs=True with {name}={getattr(self, name)!r}: such steps are not all alike; set it to False"
            )
        for stage in self.schedule:
            if self.channels % stage.k:
                raise ValueError(
                    f"k={stage.k} does not divide channels={self.channels}; choose channels as a multiple of k"
                )
            if stage.warmup >= stage.epochs and self.order and self.epochs:
                name = "a stage's warm-up" if self.stages else "alpha_warmup"
                raise ValueError(
                    f"{name}={stage.warmup} with epochs={stage.epochs}: the alphas would never move; "
                    f"choose a shorter {name} or more epochs"
                )
        for earlier, later in itertools.pairwise(self.schedule):
            if later.k > earlier.k or (earlier.ops and not 0 < later.ops <= earlier.ops):
                raise ValueError(f"stages={self.stages}: neither k nor the operations can grow from stage to stage")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min={self.lr_min} is above lr={self.lr}; lower lr_min")
        if self.epochs == 0 and self.select != "random":
            raise ValueError(f"epochs=0 with select={self.select}: nothing would be learned; choose 1 or more")
        if self.order == 2 and self.accumulate > 1:
            raise ValueError("accumulate with order=2: the step of the weights needs the whole batch; set one to 1")
        if self.order == 2 and self.paths > 1:
            raise ValueError("paths with order=2: the step of the alphas looks at one draw; set one to 1")
        if self.fair and (self.paths > 1 or not get_relaxation(self.relaxation).single_path or self.stages):
            raise ValueError("fair=True has paths of its own: it wants relaxation=uniform, paths=1 and stages=[]")
        if self.accumulate > self.batch_size // 2:
            raise ValueError(
                f"accumulate={self.accumulate} with batch_size={self.batch_size}: batch norm wants 2 images a part"
            )
        get_regularizer(self.regularizer).check(self.relaxation)
        relaxation = get_relaxation(self.relaxation)
        if relaxation.single_path and self.perturbation != "none":
            raise ValueError(
                f"perturbation={self.perturbation} with relaxation={self.relaxation}, whose weights are 1 and 0: "
                "set it to none"
            )
        if self.select == "derive" and (self.relaxation == "uniform" or not self.order):
            given = "relaxation=uniform" if self.relaxation == "uniform" else "order=0"
            raise ValueError(f"{given} with select=derive: the alphas learn nothing; set select to evaluate or random")
        if self.select == "evaluate" and self.order:
            raise ValueError(
                f"order={self.order} with select=evaluate, which trains random architectures: set order to 0"
            )
        if self.select != "derive" and any(stage.ops for stage in self.schedule):
            raise ValueError(
                f"stages={self.stages} with select={self.select}: nothing says what to prune; set it to []"
            )
        if self.relaxation == "exponentiated" and self.alpha_optimizer != "sgd":
            raise ValueError(
                "relaxation=exponentiated wants alpha_optimizer=sgd, with alpha_weight_decay=0 and a larger alpha_lr: "
                "method gaea has them"
            )

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The stages of the search, one at least."""
        if self.stages:
            return tuple(Stage(*stage) for stage in self.stages)
        return (Stage(self.k, 0, self.epochs, self.alpha_warmup),)

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain values that YAML and JSON can hold; :meth:`from_dict` reads them back."""
        return options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchConfig:
        """Returns the configuration with these options.

        Raises:
            ValueError: for an unknown option or a value that makes no sense.
            TypeError: for a value of the wrong type.
        """
        return options.from_dict(cls, values, "search")


def describe_type(option: str) -> str:
    """Returns what values ``option`` takes, in words: "a number"."""
    return options.describe_type(SearchConfig, option)


def _stages(value: Any) -> bool:
    return all(
        isinstance(stage, list)
        and len(stage) == 4
        and all(type(n) is int for n in stage)
        and stage[0] >= 1
        and stage[1] >= 0
        and stage[2] >= 1
        and stage[3] >= 0
        for stage in value
    )


_RANGES: dict[str, options.Range] = {
    "k": POSITIVE_INT,
    "channels": POSITIVE_INT,
    "layers": POSITIVE_INT,
    "stages": (_stages, options.STAGES_MEANING),
    "train_portion": (lambda v: 0 < v < 1, "a part between 0 and 1, such as 0.5"),
    "batch_size": POSITIVE_INT,
    "pad": WHOLE,
    "cutout": WHOLE,
    "epochs": WHOLE,
    "lr": POSITIVE,
    "lr_min": NOT_NEGATIVE,
    "momentum": BELOW_ONE,
    "weight_decay": NOT_NEGATIVE,
    "clip": NOT_NEGATIVE,
    "skip_dropout": (lambda v: 0 <= v < 1, "a probability of at least 0 and below 1"),
    "perturbation": one_of(PERTURBATIONS),
    "perturbation_radius": (two(lambda v: 0 <= v <= 1), "two numbers from 0 to 1, such as [0.03, 0.3]"),
    "accumulate": POSITIVE_INT,
    "paths": POSITIVE_INT,
    "order": (lambda v: v in (0, 1, 2), "0, 1 or 2"),
    "alpha_optimizer": one_of(ALPHA_OPTIMIZERS),
    "alpha_lr": POSITIVE,
    "alpha_betas": (two(lambda v: 0 <= v < 1), "two numbers of at least 0 and below 1, such as [0.5, 0.999]"),
    "alpha_weight_decay": NOT_NEGATIVE,
    "alpha_warmup": WHOLE,
    "alpha_scale": NOT_NEGATIVE,
    "regularizer": one_of(REGULARIZERS),
    "regularizer_scale": NOT_NEGATIVE,
    "temperature": (two(lambda v: 0 < v < math.inf), "two numbers above 0, such as [10, 0.1]"),
    "select": one_of(SELECTIONS),
    "candidates": POSITIVE_INT,
    "samples": WHOLE,
    "hessian": WHOLE,
    "seed": SEED,
    "threads": WHOLE,
    "amp": one_of(AMP),
}
