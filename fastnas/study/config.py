"""The options of a study. Their docstrings are the text of ``fastnas study --help``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from fastnas.data import DATASETS
from fastnas.saliency import SCORES
from fastnas.search.config import PRESET, SearchConfig
from fastnas.spaces import SPACES
from fastnas.study.evaluation import BN_MODES, Finetuning

PRUNINGS = ("optimistic", "random", "supernet")
"""What the worst architectures can be removed by, beside the scores of networks: the ground truth, nothing, or the
supernet of the whole space."""

# What AceNAS (arXiv:2108.03001) trained its supernets with.
_PUBLISHED = {"batch_size": 192, "epochs": 600, "lr": 0.05, "lr_min": 0.0, "weight_decay": 1e-4, "nesterov": False}
_SPACES = {"darts": {"batch_size": 128}, "darts-7": {"batch_size": 128}}


@dataclass(frozen=True)
class StudyOptions:
    """What supernet is trained, and what its ranking is compared with.

    Attributes:
        space: The search space.
        data: The data set.
        root: Where its files are: see fastnas search --help.
        table: A CSV file, gzipped or not, with what architectures are worth, one a row: the ground truth.
        key: The table's column of architectures.
        column: The table's column that is the ground truth; of nb-macro's, cifar10-test.
        errors: The column has errors, as parts of 1: the ground truth is then 100 (1 - error).
        sample: How many architectures of the table are studied, drawn at random; or all.
        sample_seed: Fixes which, and which of equal ones pruned spaces keep. Studies with other seeds have the same.
        checkpoints: Epochs after which the supernet is studied, such as 1,5,10; 0 is before the first. Empty: the last.
        bn: Whose batch norm statistics subnets are evaluated with, one or several of batch, recalibrated and inherited,
            separated by commas.
        images: Validation images that each subnet is evaluated on; fewer where there are not as many.
        image_batch: Images in a batch of those: what bn=batch takes statistics of.
        calibration: Training batches that bn=recalibrated shows each subnet.
        finetune: Training batches that each subnet is trained on by itself before it is evaluated; 0 is none. Several,
            such as 0,20, are compared.
        finetune_lr: Learning rate of that training.
        prune: What search spaces are pruned by, one or several, separated by commas: optimistic, the ground truth;
            random, by chance; supernet, what that of the whole space says in the first mode; or a score of fastnas
            rank. Empty: none.
        keep: The parts of the studied architectures that pruned spaces keep, such as 0.5,0.25,0.1.
        channels: Channels of the first cell.
        layers: Cells of the supernet, as the space counts them.
        epochs: Passes over the training images.
        batch_size: Images in a batch.
        train_portion: The part of the images that trains; the rest evaluates.
        lr: Learning rate of the first epoch; it falls to lr_min along a cosine.
        lr_min: The last learning rate.
        weight_decay: Weight decay of SGD.
        clip: The largest norm of the gradient; 0 is off.
        paths: Architectures that a step averages the gradients of.
        fair: A step averages over as many paths as there are candidates, each candidate once (FairNAS).
        amp: bf16 runs the supernet under autocast in bfloat16; none in float32.
        seed: Fixes every other random choice.
        device: Where to run: cpu, cuda, cuda:1 ..., or auto for the GPU where there is one.
        jobs: Processes that evaluate at the same time. They do not change the accuracies.
        threads: CPU threads of torch in each, and in training.
    """

    space: str = "nb201"
    data: str = "digits"
    root: str | None = None
    table: str | None = None
    key: str = "arch"
    column: str = "c10_test_e200"
    errors: bool = False
    sample: str = "1000"
    sample_seed: int = 0
    checkpoints: str = ""
    bn: str = "batch"
    images: int = 1000
    image_batch: int = 250
    calibration: int = 20
    finetune: str = "0"
    finetune_lr: float = 0.01
    prune: str = ""
    keep: str = "0.5,0.25,0.1"
    channels: int = PRESET
    layers: int = PRESET
    epochs: int = PRESET
    batch_size: int = PRESET
    train_portion: float = PRESET
    lr: float = PRESET
    lr_min: float = PRESET
    weight_decay: float = PRESET
    clip: float = PRESET
    paths: int = 1
    fair: bool = False
    amp: str = "none"
    seed: int = 0
    device: str = "auto"
    jobs: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name, names in (("space", sorted(SPACES)), ("data", list(DATASETS))):
            if getattr(self, name) not in names:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(names)}")
        if self.sample != "all" and not (self.sample.isdecimal() and int(self.sample) >= 3):
            raise ValueError(f"sample={self.sample!r}: expected a whole number of at least 3, or all")
        least = {"images": 1, "image_batch": 2, "calibration": 1, "jobs": 1, "threads": 1, "seed": 0, "sample_seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least {number}")
        if self.finetune_lr <= 0:
            raise ValueError(f"finetune_lr={self.finetune_lr}: expected a number above 0")
        if not _words(self.bn) or not set(_words(self.bn)) <= set(BN_MODES):
            raise ValueError(f"bn={self.bn!r}: expected {', '.join(BN_MODES)}, or several of them")
        if not _numbers("finetune", self.finetune):
            raise ValueError(f"finetune={self.finetune!r}: expected one or several whole numbers; 0 is none")
        config = self.search()
        for field in fields(self):
            if getattr(self, field.name) is PRESET and field.name not in ("root", "table"):
                object.__setattr__(self, field.name, getattr(config, field.name))
        object.__setattr__(self, "device", config.device)
        if not self.epochs_studied or max(self.epochs_studied) > self.epochs:
            raise ValueError(f"checkpoints={self.checkpoints!r}: expected epochs from 0 to epochs={self.epochs}")
        known = (*PRUNINGS, *sorted(SCORES))
        for kind in self.prunings:
            if kind not in known:
                raise ValueError(f"prune={self.prune!r}: expected some of {', '.join(known)}")
        if self.prunings and self.fair:
            raise ValueError("fair=True with prune: pruned spaces have not every choice; leave one of them out")
        if self.prunings and not (self.parts_kept and all(0 < part < 1 for part in self.parts_kept)):
            raise ValueError(f"keep={self.keep!r}: expected parts between 0 and 1, such as 0.5,0.25,0.1")

    @property
    def modes(self) -> dict[str, tuple[str, Finetuning]]:
        """How subnets are evaluated: each of ``bn`` with each of ``finetune``, by names such as batch and batch+20.

        The first is what a supernet's verdict is taken from.
        """
        return {
            f"{bn}+{n}" if n else bn: (
                bn,
                Finetuning(n, self.finetune_lr, weight_decay=self.weight_decay, clip=self.clip) if n else Finetuning(),
            )
            for bn in _words(self.bn)
            for n in _numbers("finetune", self.finetune)
        }

    @property
    def epochs_studied(self) -> tuple[int, ...]:
        """The options' ``checkpoints``, ascending."""
        return _numbers("checkpoints", self.checkpoints) or (self.epochs,)

    @property
    def prunings(self) -> tuple[str, ...]:
        """The options' ``prune``, one by one."""
        return _words(self.prune)

    @property
    def parts_kept(self) -> tuple[float, ...]:
        """The options' ``keep``, descending."""
        try:
            return tuple(sorted({float(word) for word in _words(self.keep)}, reverse=True))
        except ValueError:
            raise ValueError(f"keep={self.keep!r}: expected parts between 0 and 1, such as 0.5,0.25,0.1") from None

    def search(self) -> SearchConfig:
        """Returns the options of the search that trains the supernet: single paths, and no alphas.

        Raises:
            ValueError: for a value that makes no sense.
        """
        values: dict[str, Any] = {}
        if self.data != "digits":  # whose few small images have a preset of their own
            values |= {**_PUBLISHED, **_SPACES.get(self.space, {})}
        names = SearchConfig.__dataclass_fields__
        values |= {name: value for name, value in asdict(self).items() if name in names and value is not None}
        values.pop("table", None)  # which the study looks things up in
        values |= {"method": "random-ws", "candidates": 1, "discrete": False}
        return SearchConfig(**values)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Returns the whole numbers in a text, ascending."""
    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{name}={text!r}: expected whole numbers, such as 0,5,20")
    return tuple(sorted({int(word) for word in words}))


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
