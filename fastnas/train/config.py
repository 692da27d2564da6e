"""The options of a training. Their docstrings are the text of ``fastnas train --help``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastnas.data import DATASETS, default_augment
from fastnas.genotype import AnyGenotype, ChainGenotype, Genotype, parse_genotype
from fastnas.genotypes import find_genotype
from fastnas.nn.stems import STEMS
from fastnas.runs import options
from fastnas.runs.machine import AMP
from fastnas.runs.options import BELOW_ONE, NOT_NEGATIVE, POSITIVE, POSITIVE_INT, SEED, WHOLE, one_of
from fastnas.train.recipes import RECIPES, Value, default_recipe, read_recipe

RECIPE: Any = None
"""The default of an option whose value comes from the recipe (of workers: from the machine)."""

DATA = (*DATASETS, "imagefolder")
"""What ``data`` may be."""

SCHEDULES = ("cosine", "exponential", "linear")
"""What ``schedule`` may be."""


@dataclass(frozen=True)
class NetworkOptions:
    """The network.

    Attributes:
        genotype: The architecture: a name that `fastnas show` lists, a file in any notation, or the notation itself.
        recipe: How it is trained, a preset of the options below: a name, or a YAML file of such options, which may name
            the recipe that it changes (recipe: cifar). Without it: digits for those, nb201 for cells of NAS-Bench-201,
            and for the DARTS space imagenet for folders of images, else cifar; other architectures want one.
        channels: Channels of the first cell. Each reduction cell doubles them.
        layers: Cells; those at 1/3 and 2/3 of the depth are reduction cells. Of NAS-Bench-201: cells of each of the
            three stages. Chains have their own.
        stem: What comes before the cells of DARTS' networks: cifar, a convolution at full size; or imagenet, three of
            stride 2.
    """

    genotype: str = ""
    recipe: str = RECIPE
    channels: int = RECIPE
    layers: int = RECIPE
    stem: str = RECIPE


@dataclass(frozen=True)
class DataOptions:
    """The images.

    Attributes:
        data: The data set. digits needs no files; npz and imagefolder are for images of your own.
        root: Where its files are: of CIFAR, the official archive, the folder it extracts to or one that holds either;
            of npz, the file with x_train, y_train, x_test, y_test; of imagefolder, the folder with train/CLASS/*.jpg
            and val/CLASS/*.jpg.
        holdout: Where a data set has no test images: the part of its images that is held out for the test, the same
            for every seed.
        validate: The part of the training images that is kept out of the training and takes the place of the test
            images, the same for every seed: to choose between architectures. 0 trains on all.
        batch_size: Images in a batch.
        pad: Augmentation: the images are padded by this many pixels and cropped back at random. 0 is off.
        flip: Augmentation: each image is mirrored with probability 1/2. Recipes leave digits and npz as they are: say
            true where a mirrored image is as good.
        cutout: Augmentation: the side of the square that is blanked out, in pixels. 0 is off.
        jitter: Augmentation: strengths of random brightness, contrast, saturation and hue. [] is off.
        image_size: Of imagefolder: the side that images are cropped and resized to, at random in training (8 % to
            100 % of the area), the centre in the test.
        workers: Of imagefolder: processes that read the images.
        skip_corrupt: Of imagefolder: go on without images that cannot be read, and count them, instead of stopping.
    """

    data: str = "digits"
    root: str | None = None
    holdout: float = 0.2
    validate: float = 0.0
    batch_size: int = RECIPE
    pad: int = RECIPE
    flip: bool = RECIPE
    cutout: int = RECIPE
    jitter: list[float] = RECIPE
    image_size: int = RECIPE
    workers: int = RECIPE
    skip_corrupt: bool = False


@dataclass(frozen=True)
class WeightOptions:
    """Training of the weights, by SGD.

    Attributes:
        epochs: Passes over the training images.
        lr: Learning rate that the schedule starts from.
        schedule: How it falls from epoch to epoch: cosine, to 0; exponential, by the factor lr_decay; or linear, to 0,
            more slowly in the last five epochs (PC-DARTS).
        lr_decay: The factor of the exponential schedule.
        lr_warmup: First epochs N, in which the schedule's learning rate is multiplied by 1/N, 2/N, ...
        momentum: Momentum of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: Weight decay of SGD.
        clip: The largest norm of the gradient; a longer one is scaled down. 0 is off.
        label_smoothing: The part of the target that is spread evenly over all classes.
        auxiliary: Factor of the loss of a second classifier at 2/3 of the depth, in training only; it wants images of
            32x32, with the stem imagenet of 224x224. 0 is none.
        drop_path: Probability with which an image loses an edge of a cell; it grows linearly from 0 in the first epoch
            to this after the last.
        accumulate: Parts that a batch is cut into; the gradient is the mean over the parts, each with its own batch
            norm statistics, and a part's feature maps are all that is kept in memory. 1 is off.
    """

    epochs: int = RECIPE
    lr: float = RECIPE
    schedule: str = RECIPE
    lr_decay: float = RECIPE
    lr_warmup: int = RECIPE
    momentum: float = RECIPE
    nesterov: bool = RECIPE
    weight_decay: float = RECIPE
    clip: float = RECIPE
    label_smoothing: float = RECIPE
    auxiliary: float = RECIPE
    drop_path: float = RECIPE
    accumulate: int = 1


@dataclass(frozen=True)
class MachineOptions:
    """Seed and machine.

    Attributes:
        seed: Fixes every random choice. On the CPU, with the same number of threads, the same seed gives the same
            weights bit for bit.
        device: Where to run: cpu, cuda, cuda:1 ..., or auto for the GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves them to torch.
        amp: bf16 runs the network under autocast in bfloat16; none in float32. Logits, loss, weights and the
            optimizer's state are float32 either way.
        checkpoint_every: Seconds between checkpoints inside an epoch; each epoch ends with one. 0 writes no others.
    """

    seed: int = 0
    device: str = "auto"
    threads: int = RECIPE
    amp: str = "none"
    checkpoint_every: float = 600.0


GROUPS = (NetworkOptions, DataOptions, WeightOptions, MachineOptions)
"""The option groups in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MachineOptions, WeightOptions, DataOptions, NetworkOptions):
    """Every option of a training, each one resolved.

    An option that is left out (or None) takes its value from the recipe, so an instance has no open values:
    ``genotype`` is the architecture's text, whatever it was named by, and ``recipe`` is a recipe's name.

    Raises:
        ValueError: for a value that makes no sense; the message names the option and what it accepts.
        TypeError: for a value of the wrong type.
        OSError: where a file that an option names cannot be read.
    """

    def __post_init__(self) -> None:
        if not self.genotype:
            raise ValueError("genotype is missing: give a name, a file, or an architecture written out")
        genotype = find_genotype(self.genotype)
        object.__setattr__(self, "genotype", genotype.to_text())
        given: str | None = self.recipe
        name = given
        own: dict[str, Value] = {}
        if given is not None and given not in RECIPES and given.endswith((".yaml", ".yml")):
            name, own = read_recipe(given)
        name = name or default_recipe(genotype, self.data)
        object.__setattr__(self, "recipe", name)
        values = dict(RECIPES.find(name).values)
        if isinstance(genotype, ChainGenotype):
            values["layers"] = len(genotype.ops)
        if self.data in DATASETS and not default_augment(self.data).flip:
            values["flip"] = False
        for option, default in {**values, **own}.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, default)
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        if self.workers is None:
            object.__setattr__(self, "workers", min(16, _cpus()))
        options.check(self, _RANGES)
        self._check_together(genotype)

    def _check_together(self, genotype: AnyGenotype) -> None:
        """Checks what only several options tell."""
        if not isinstance(genotype, Genotype):
            for name, instead in (("auxiliary", 0), ("drop_path", 0), ("stem", "cifar")):
                if getattr(self, name) != instead:
                    raise ValueError(
                        f"{name}={getattr(self, name)} with an architecture outside the DARTS space, whose network "
                        f"has no such choice: set it to {instead}, or take recipe nb201"
                    )
        if self.accumulate > self.batch_size // 2:
            raise ValueError(
                f"accumulate={self.accumulate} with batch_size={self.batch_size}: batch norm wants 2 images a part"
            )
        if self.lr_warmup >= self.epochs:
            raise ValueError(f"lr_warmup={self.lr_warmup} with epochs={self.epochs}: choose fewer or more epochs")
        if self.validate and self.data == "imagefolder":
            raise ValueError(f"validate={self.validate} with data=imagefolder: keep images of your own in val instead")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True with momentum=0: set it to False")

    def architecture(self) -> AnyGenotype:
        """Returns the genotype that is trained."""
        return parse_genotype(self.genotype)

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as plain values that YAML and JSON can hold; :meth:`from_dict` reads them back."""
        return options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Returns the configuration with these options.

        Raises:
            ValueError: for an unknown option or a value that makes no sense.
            TypeError: for a value of the wrong type.
        """
        return options.from_dict(cls, values, "train")


def _cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_PROBABILITY: options.Range = (lambda v: 0 <= v < 1, "a probability of at least 0 and below 1")

_RANGES: dict[str, options.Range] = {
    "channels": POSITIVE_INT,
    "layers": POSITIVE_INT,
    "stem": one_of(STEMS),
    "data": one_of(DATA),
    "holdout": (lambda v: 0 < v < 1, "a part between 0 and 1, such as 0.2"),
    "validate": (lambda v: 0 <= v < 1, "a part of at least 0 and below 1"),
    "batch_size": (lambda v: v >= 2, "a whole number of at least 2"),
    "pad": WHOLE,
    "cutout": WHOLE,
    "jitter": (
        lambda v: not v or (len(v) == 4 and all(type(s) in (int, float) and s >= 0 for s in v) and v[3] <= 0.5),
        "[] or four numbers of at least 0, the last at most 0.5, such as [0.4, 0.4, 0.4, 0.2]",
    ),
    "image_size": POSITIVE_INT,
    "workers": WHOLE,
    "epochs": POSITIVE_INT,
    "lr": POSITIVE,
    "schedule": one_of(SCHEDULES),
    "lr_decay": (lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "lr_warmup": WHOLE,
    "momentum": BELOW_ONE,
    "weight_decay": NOT_NEGATIVE,
    "clip": NOT_NEGATIVE,
    "label_smoothing": BELOW_ONE,
    "auxiliary": NOT_NEGATIVE,
    "drop_path": _PROBABILITY,
    "accumulate": POSITIVE_INT,
    "seed": SEED,
    "threads": WHOLE,
    "amp": one_of(AMP),
    "checkpoint_every": NOT_NEGATIVE,
}
