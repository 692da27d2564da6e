"""What a supernet makes of its subnets: their accuracy with the shared weights."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas.genotype import AnyGenotype
from fastnas.runs.checkpoint import Checkpoints
from fastnas.runs.machine import AMP
from fastnas.saliency.rank import Scored, Scorer
from fastnas.search.loop import Arguments, path_of
from fastnas.spaces import Space

BN_MODES = ("batch", "recalibrated", "inherited")
"""Whose statistics normalise a subnet: those of the batch it sees, those of training batches that it is shown first, or
the running ones of the supernet, which are of all paths."""

SNAPSHOTS = Checkpoints("supernet", 1)

Images = Sequence[tuple[Tensor, Tensor]]
"""Batches of normalised images and their labels."""


@dataclass(frozen=True)
class Finetuning:
    """Training of a subnet by itself, from the shared weights, before it is evaluated.

    Attributes:
        batches: How many; 0 is none.
        lr: Learning rate of SGD, the same all along.
        momentum: Its momentum.
        weight_decay: Its weight decay.
        clip: The largest norm of the gradient; 0 is off.
    """

    batches: int = 0
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 5.0


class Subnets:
    """Evaluates subnets of a supernet one after another, on the same images. The supernet itself is left alone.

    What subnets have in common is computed once: the stem, and in a space of chains all layers up to the first in which
    a subnet differs from the one before, so those should come in an order in which such beginnings repeat. Neither
    changes the accuracy. For the latter, what each layer but the last gives for all of the images is kept: a chain of
    NAS-Bench-Macro takes 256 KiB an image of 32x32.

    Args:
        space: the space.
        supernet: its supernet, with all channels.
        images: what the subnets are evaluated on, on the supernet's device.
        bn: one of :data:`BN_MODES`.
        training: batches of training images, for ``recalibrated`` and for the fine-tuning.
        calibration: how many of them ``recalibrated`` shows each subnet; all where None.
        finetuning: of each subnet by itself; None is none.
        amp: as the search's option.

    Raises:
        ValueError: for an unknown mode, or without the batches that it needs.
    """

    def __init__(
        self,
        space: Space,
        supernet: nn.Module,
        images: Images,
        bn: str = "batch",
        *,
        training: Images = (),
        calibration: int | None = None,
        finetuning: Finetuning | None = None,
        amp: str = "none",
    ) -> None:
        if bn not in BN_MODES:
            raise ValueError(f"bn={bn!r}: expected one of {', '.join(BN_MODES)}")
        self._finetuning = finetuning or Finetuning()
        if not images or (not training and (bn == "recalibrated" or self._finetuning.batches)):
            raise ValueError(f"bn={bn!r} needs {'training batches' if images else 'images'}")
        self._space, self._bn, self._amp = space, bn, amp
        self._net = copy.deepcopy(supernet).train(bn != "inherited")
        self._net.requires_grad_(bool(self._finetuning.batches))
        self._norms = [m for m in self._net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._images, self._training = list(images), list(training)
        self._calibrating = self._training[:calibration]
        for norm in self._norms:
            if bn == "batch":
                norm.track_running_stats = False  # which may stay as they are
            elif bn == "recalibrated":
                norm.momentum = None  # the mean over the batches
        if not self._finetuning.batches:
            self._run_stem()
        features = getattr(self._net, "features", None)
        self._layers = features if isinstance(features, nn.ModuleList) and bn != "recalibrated" else None
        self._prefix: list[int] = []
        self._states: list[list[Tensor]] = []  # after each layer of the prefix, a tensor a batch

    @torch.no_grad()
    def _run_stem(self) -> None:
        """Puts what the stem makes of the images into their place: it is the same for all subnets."""
        stem = getattr(self._net, "stem", None)
        if not isinstance(stem, nn.Module):
            return
        if self._bn == "recalibrated":
            for module in stem.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.reset_running_stats()
            self._calibrating = [(self._cast(stem, x), y) for x, y in self._calibrating]
            stem.eval()
        self._images = [(self._cast(stem, x), y) for x, y in self._images]
        self._net.stem = nn.Identity()
        self._norms = [m for m in self._net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def accuracy(self, genotype: AnyGenotype) -> float:
        """Returns the part of the images that the subnet classifies rightly, 0 to 1.

        Raises:
            ValueError: where the genotype is none of the space.
        """
        arguments = subnet_arguments(self._space, self._net, genotype)
        if self._finetuning.batches:
            with self._copy():
                self._finetune(arguments)
                return self._accuracy(arguments)
        return self._accuracy(arguments)

    @torch.no_grad()
    def _accuracy(self, arguments: Arguments) -> float:
        if self._bn == "recalibrated":
            for norm in self._norms:
                norm.reset_running_stats()
            self._net.train()
            for x, _ in self._calibrating:
                self._cast(self._net, x, **arguments)
            self._net.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self._images[0][1].device)
        inputs, begun = self._shared(arguments)
        with self._skipped(begun):
            for n, (x, (_, labels)) in enumerate(zip(inputs, self._images, strict=True)):
                logits = self._cast(self._net, x, **arguments, **self._keeping(n, begun))
                correct += (logits.argmax(1) == labels).sum()
        return int(correct) / sum(len(labels) for _, labels in self._images)

    def _shared(self, arguments: Arguments) -> tuple[list[Tensor], int]:
        """Returns what is left to be read, and how many layers have been computed for the subnet before."""
        whole = [x for x, _ in self._images]
        if self._layers is None or self._finetuning.batches:
            return whole, 0
        path = list(next(iter(arguments["path"].values())))
        begun = 0
        while begun < len(self._prefix) and path[begun] == self._prefix[begun]:
            begun += 1
        self._prefix = path[:-1]  # no other subnet goes on from the last layer
        self._states = [*self._states[:begun], *([] for _ in path[begun:-1])]
        return (self._states[begun - 1] if begun else whole), begun

    def _keeping(self, batch: int, begun: int) -> dict[str, Any]:
        """Returns the argument of the supernet that keeps what the layers from ``begun`` on compute of a batch."""
        if self._layers is None or self._finetuning.batches:
            return {}
        layer = 0

        def keep(states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal layer
            if begun <= layer < len(self._states):
                self._states[layer].append(states[0])
            layer += 1
            return states

        return {"between": keep}

    @contextmanager
    def _skipped(self, begun: int) -> Iterator[None]:
        """Runs the block with the first layers of a chain out of the way."""
        layers = [] if self._layers is None else list(self._layers[:begun])
        for layer in layers:  # which stay what they are for whoever looks at their class
            layer.__dict__["forward"] = _pass
        try:
            yield
        finally:
            for layer in layers:
                del layer.__dict__["forward"]

    @contextmanager
    def _copy(self) -> Iterator[None]:
        """Runs the block, after which the weights and statistics are those of before."""
        before = {name: value.clone() for name, value in self._net.state_dict().items()}
        try:
            yield
        finally:
            self._net.load_state_dict(before)

    def _finetune(self, arguments: Arguments) -> None:
        how = self._finetuning
        parameters = list(self._net.parameters())
        optimizer = torch.optim.SGD(parameters, how.lr, momentum=how.momentum, weight_decay=how.weight_decay)
        mode = self._net.training
        self._net.train()
        for n in range(how.batches):
            x, labels = self._training[n % len(self._training)]
            optimizer.zero_grad()
            logits = self._cast(self._net, x, **arguments).float()
            F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            if how.clip:
                nn.utils.clip_grad_norm_(parameters, how.clip)
            optimizer.step()  # off the path there are no gradients, and nothing decays
        optimizer.zero_grad()
        self._net.train(mode)

    def _cast(self, module: nn.Module, x: Tensor, **arguments: Any) -> Tensor:
        dtype = AMP[self._amp]
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            y: Tensor = module(x, **arguments)
        return y


def _pass(x: Tensor, *rest: object) -> Tensor:
    """Stands for a layer whose output is given."""
    return x


@dataclass(frozen=True, eq=False)
class SubnetJob:
    """Evaluates subnets in any process; called, it gives what :func:`fastnas.saliency.rank.score_all` runs.

    Attributes:
        space: The space.
        snapshot: A file of :func:`save_snapshot`.
        sizes: Channels, layers, classes and channels of the images, as the space's supernet takes them.
        images: Normalised images, float32 numpy (N, C, H, W), and their labels.
        training: The same for :class:`Subnets`' training batches; may be empty.
        batch_sizes: Images in a batch of each.
        bn: One of :data:`BN_MODES`.
        calibration: As :class:`Subnets` takes it.
        finetuning: Of each subnet by itself.
        device: Where to run.
        amp: As the search's option.
    """

    space: Space
    snapshot: Path
    sizes: tuple[int, int, int, int]
    images: tuple[Any, Any]
    training: tuple[Any, Any]
    batch_sizes: tuple[int, int]
    bn: str
    calibration: int
    finetuning: Finetuning
    device: str = "cpu"
    amp: str = "none"

    def __call__(self) -> Scorer:
        """Returns the scorer: its score is the accuracy, 0 to 1."""
        device = torch.device(self.device)
        supernet = self.space.supernet(*self.sizes)
        supernet.load_state_dict(SNAPSHOTS.load(self.snapshot)["supernet"])
        images, training = (
            batches(torch.from_numpy(x), torch.from_numpy(y), size, device)
            for (x, y), size in zip((self.images, self.training), self.batch_sizes, strict=True)
        )
        subnets = Subnets(
            self.space,
            supernet.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            images,
            self.bn,
            training=training,
            calibration=self.calibration,
            finetuning=self.finetuning,
            amp=self.amp,
        )

        def score(index: int, genotype: AnyGenotype) -> Scored:
            started = time.perf_counter()
            accuracy = subnets.accuracy(genotype)
            return Scored(index, genotype.to_text(), accuracy, time.perf_counter() - started)

        return score


def batches(images: Tensor, labels: Tensor, size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Returns the images in batches on the device; a single last one, which has no statistics, joins the others."""
    x = images.to(device, memory_format=torch.channels_last)
    cuts = list(range(0, len(x), size))
    if len(cuts) > 1 and len(x) - cuts[-1] == 1:
        cuts.pop()
    ends = [*cuts[1:], len(x)] if cuts else []
    labels = labels.to(device)
    return [(x[i:j], labels[i:j]) for i, j in zip(cuts, ends, strict=True)]


def save_snapshot(path: str | os.PathLike[str], supernet: nn.Module, epoch: int) -> None:
    """Writes the supernet's parameters and statistics, and no more, atomically.

    Raises:
        OSError: where the file cannot be written.
    """
    SNAPSHOTS.save(path, {"epoch": epoch, "supernet": supernet.state_dict()})


def subnet_arguments(space: Space, supernet: nn.Module, genotype: AnyGenotype) -> Arguments:
    """Returns the arguments beside the images with which a supernet of all channels computes a subnet.

    Raises:
        ValueError: where the genotype is none of the space.
    """
    weights = space.encode(genotype)
    if not hasattr(supernet, "mixed_ops"):
        return {"weights": weights}
    return {"weights": weights, "path": path_of(weights, space.primitives)}
