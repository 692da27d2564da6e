"""A network trained from scratch, in steps that can be stopped, saved and resumed."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas._device import as_device
from fastnas.data import Augment, ImageData, augment, normalize
from fastnas.genotype import Genotype
from fastnas.inference.networks import build_network, space_of
from fastnas.nn.counting import Complexity, count
from fastnas.nn.preserved import preserved
from fastnas.runs.checkpoint import Checkpoints
from fastnas.runs.machine import AMP, GPU_READ_EVERY, DivergenceError, describe, seed_of, settings
from fastnas.train.config import TrainConfig
from fastnas.train.source import open_source

CHECKPOINTS = Checkpoints("training", 1)


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a training came to.

    Attributes:
        epoch: Counted from 1.
        lr: Its learning rate.
        drop_path: Its probability of losing an edge.
        train_loss: Mean loss of its steps, each measured before the step: with label smoothing and the auxiliary head.
        train_accuracy: The same batches' accuracy, 0 to 1.
        test_loss: Cross entropy on all test images, after the epoch.
        top1: The part of the test images whose class is the network's first choice, 0 to 1.
        top5: The part whose class is among its first five.
        seconds: Wall-clock time.
    """

    epoch: int
    lr: float
    drop_path: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    top1: float
    top5: float
    seconds: float


class Training:
    """A training that can be stopped, saved and resumed between any two steps.

    Everything random follows from the seed, the epoch and the step, so a checkpoint has no state of random generators,
    and a resumed training goes on with the same bits on any number of worker processes.

    Args:
        config: The options.
        data: Images to train on instead of those that ``config.data`` names.

    Attributes:
        epoch: Finished epochs.
        step: Finished steps of the epoch under way.
        steps_per_epoch: Steps in an epoch.
        genotype: The architecture.
        network: What is trained.
        network_options: The arguments that :func:`fastnas.inference.build_network` made it of.
        source: Its images.
        size: Parameters, without the auxiliary head's, and multiply-adds for one image.
        history: One record for each finished epoch.

    Raises:
        ValueError: for options that do not fit the data or the architecture, or an unusable device.
        OSError: where the data cannot be read.
    """

    FREE_ON_RESUME = frozenset({"device", "threads", "root", "workers", "skip_corrupt", "checkpoint_every"})
    """Options that a resumed training may change: it may move to another machine, where its rounding may differ, and
    go on without the image that stopped it."""

    def __init__(self, config: TrainConfig, *, data: ImageData | None = None) -> None:
        self.config = config
        self.device = as_device(config.device)
        self.genotype = config.architecture()
        self.source = source = open_source(config, self.device, data)
        # Here once: to move them in each step would make it wait for the GPU.
        self._mean = torch.tensor(source.mean, dtype=torch.float32, device=self.device)
        self._std = torch.tensor(source.std, dtype=torch.float32, device=self.device)
        self._augment = Augment(pad=config.pad, flip=config.flip, cutout=config.cutout)
        self._check_images()
        self.steps_per_epoch = len(self._batches(0))

        self.network_options: dict[str, Any] = {
            "space": self._space(),
            "channels": config.channels,
            "layers": config.layers,
            "num_classes": len(source.classes),
            "in_channels": source.shape[0],
            "stem": config.stem,
        }
        extra = {"auxiliary": config.auxiliary > 0} if isinstance(self.genotype, Genotype) else {}
        # Modules draw their initial parameters from torch's global generator: seed it for them alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(config.seed, "weights"))
            network = build_network(self.genotype, self.network_options, **extra)
        self.size: Complexity = count(network, source.shape)
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(
            self.network.parameters(),
            torch.tensor(config.lr, device=self.device),  # which the fused update reads on the device
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
        self.epoch = 0
        self.step = 0
        self.history: list[EpochRecord] = []
        # Summed loss, correct answers and images of the steps.
        self._totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._seconds = 0.0
        self._stop = False

    def _space(self) -> str:
        space = space_of(self.genotype)
        # the same blocks, after a stem and stages for large images or for small ones
        return "proxyless-cifar" if space == "proxyless" and self.config.data != "imagefolder" else space

    def _check_images(self) -> None:
        """Checks the options that not all images have room for."""
        c, (channels, height, width) = self.config, self.source.shape
        imagenet = c.stem == "imagenet"
        multiple, size = (32, 224) if imagenet else (4, 32)
        if height % multiple or width % multiple:
            raise ValueError(
                f"the images are {height}x{width}: the network wants multiples of {multiple} (stem={c.stem})"
                + ("; choose another image_size" if c.data == "imagefolder" else "")
            )
        if height != width:
            raise ValueError(f"the images are {height}x{width}: crop or pad them to squares")
        if c.auxiliary and (height, width) != (size, size):
            raise ValueError(
                f"auxiliary={c.auxiliary} with images of {height}x{width}: that head wants {size}x{size} "
                f"(stem={c.stem}); set auxiliary to 0"
            )
        if any(c.jitter) and channels != 3:
            raise ValueError(f"jitter={c.jitter} with images of {channels} channels: it wants 3; set jitter to []")
        if self.source.counts[0] < 2:
            raise ValueError("there is one training image: batch norm wants 2 or more")

    def _batches(self, epoch: int) -> list[Tensor]:
        """Returns the indices of an epoch's batches; a last one of one image, which has no statistics, is left out."""
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, f"order {epoch}"))
        order = torch.randperm(self.source.counts[0], generator=generator)
        batches = list(torch.split(order, self.config.batch_size))
        return batches if len(batches[-1]) > 1 else batches[:-1]

    def stop(self) -> None:
        """Asks the training to stop after the step under way; it can be called from a callback or a signal handler."""
        self._stop = True

    def run(
        self,
        *,
        on_step: Callable[[Training], object] | None = None,
        on_epoch: Callable[[Training, EpochRecord], object] | None = None,
        on_checkpoint: Callable[[Training], object] | None = None,
    ) -> bool:
        """Returns whether the training has come to its end; else :meth:`stop` was called.

        Args:
            on_step: Called after each step; :meth:`progress` has the numbers.
            on_epoch: Called after each epoch with its record, when the state can be saved.
            on_checkpoint: Called inside an epoch, every ``checkpoint_every`` seconds, to save the state.

        Raises:
            DivergenceError: where the loss is no longer a finite number.
        """
        gpus = [self.device] if self.device.type == "cuda" else []
        with (
            settings(self.device, self.config.threads),
            torch.random.fork_rng(devices=gpus),
            contextlib.closing(self.source),
        ):
            while self.epoch < self.config.epochs and not self._stop:
                if self._run_epoch(on_step, on_checkpoint):
                    record = self._end_epoch()
                    if on_epoch:
                        on_epoch(self, record)
        self._stop = False
        return self.epoch == self.config.epochs

    def progress(self) -> dict[str, float]:
        """Returns the means over the epoch under way: train_loss and train_accuracy."""
        loss, correct, images = self._totals.tolist()
        return {
            "train_loss": loss / images if images else math.nan,
            "train_accuracy": correct / images if images else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the rest of the training depends on, as tensors and plain values.

        The tensors are those that the training goes on changing: save or copy them before the next step.

        Raises:
            DivergenceError: where a weight is no longer a finite number.
        """
        network = self.network.state_dict()
        # a finite loss may have left weights that are not
        norms = torch._foreach_norm([t for t in network.values() if t.is_floating_point()])
        if not torch.isfinite(torch.stack(list(norms))).all():
            raise self._diverged("a weight")
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self._totals,
            "seconds": self._seconds,
            "history": [asdict(record) for record in self.history],
            "unreadable": sorted(self.source.unreadable),
            "machine": describe(self.device, self.config.threads),
            "network": network,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the training where :meth:`state_dict` was taken; it then goes on with the same bits.

        Raises:
            CheckpointError: where the state is of a training with other options; the training is then unchanged.
        """
        CHECKPOINTS.check(self.config.to_dict(), state["config"], self.FREE_ON_RESUME)
        CHECKPOINTS.compare(describe(self.device, self.config.threads), state["machine"])
        self.network.load_state_dict(state["network"])
        # An optimizer keeps the tensors that it is given; they may be another training's. Its settings follow from the
        # options and the machine, and the machine may be another.
        saved = copy.deepcopy(state["optimizer"]["state"])
        self._optimizer.load_state_dict({"state": saved, "param_groups": self._optimizer.state_dict()["param_groups"]})
        self.epoch, self.step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self._totals.copy_(state["totals"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.source.unreadable.update(state["unreadable"])

    def _run_epoch(
        self, on_step: Callable[[Training], object] | None, on_checkpoint: Callable[[Training], object] | None
    ) -> bool:
        """Runs what is left of the epoch under way; returns whether it came to its end."""
        self.network.train()
        self.network.drop_path = self._drop_path()
        for group in self._optimizer.param_groups:
            group["lr"].fill_(self._lr())
        batches = self._batches(self.epoch)
        start = saved = time.perf_counter()
        before = self._seconds
        for images, labels in self.source.train(batches[self.step :], self.epoch):
            self._update(images, labels)
            self.step += 1
            now = time.perf_counter()
            self._seconds = before + now - start
            due = on_checkpoint is not None and 0 < self.config.checkpoint_every <= now - saved
            last = self.step == len(batches)
            if self.device.type == "cpu" or last or due or self._stop or self.step % GPU_READ_EVERY == 0:
                if not torch.isfinite(self._totals[0]):
                    raise self._diverged("the loss")
                if on_step:
                    on_step(self)
            if self._stop and not last:
                return False
            if due and not last and on_checkpoint:
                on_checkpoint(self)
                saved = time.perf_counter()
        return True

    def _update(self, images: Tensor, labels: Tensor) -> None:
        if len(labels) < 2:  # the others could not be read; one alone has no batch statistics
            return
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, f"step {self.epoch} {self.step}"))
        images = augment(images, self._augment, self._mean, self._std, generator, jitter=self.config.jitter)
        torch.manual_seed(seed_of(self.config.seed, f"drop {self.epoch} {self.step}"))  # for what the network drops
        self._optimizer.zero_grad()
        parts = min(self.config.accumulate, len(labels) // 2)
        for part, answers in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            logits, auxiliary = self._forward(part)
            loss = self._loss(logits, answers)
            if auxiliary is not None:
                loss = loss + self.config.auxiliary * self._loss(auxiliary, answers)
            (loss * (len(answers) / len(labels))).backward()  # type: ignore[no-untyped-call]
            self._totals[0].add_(loss.detach() * len(answers))
            self._totals[1].add_((logits.detach().argmax(1) == answers).sum())
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip, foreach=True)
        self._optimizer.step()
        self._totals[2].add_(len(labels))

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns both classifiers' logits, float32 (N, num_classes)."""
        dtype = AMP[self.config.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            output = self.network(images)
        if isinstance(output, Tensor):
            return output.float(), None
        return output.logits.float(), output.auxiliary.float()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def _end_epoch(self) -> EpochRecord:
        start = time.perf_counter()
        loss, top1, top5 = self.evaluate()
        record = EpochRecord(
            epoch=self.epoch + 1,
            lr=self._lr(),
            drop_path=self._drop_path(),
            **self.progress(),
            test_loss=loss,
            top1=top1,
            top5=top5,
            seconds=self._seconds + time.perf_counter() - start,
        )
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._totals.zero_()
        self.history.append(record)
        return record

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, float]:
        """Returns the mean cross entropy on all test images, and the parts whose class is the first, the first five."""
        totals = torch.zeros(4, device=self.device, dtype=torch.float64)
        with preserved(self.network, training=False):
            for images, labels in self.source.test():
                if not len(labels):
                    continue
                logits, _ = self._forward(normalize(images, self._mean, self._std))
                # the class' place among the logits; one that is no number counts as better
                own = logits.gather(1, labels[:, None])
                place = (~(logits <= own)).sum(1)
                totals[0] += F.cross_entropy(logits, labels, reduction="sum")
                totals[1] += (place < 1).sum()
                totals[2] += (place < 5).sum()
                totals[3] += len(labels)
        loss, top1, top5, images = totals.tolist()
        if not images:
            raise ValueError(f"none of the {self.source.counts[1]:,} test images could be read")
        return loss / images, top1 / images, top5 / images

    def _lr(self) -> float:
        return learning_rate(self.config, self.epoch)

    def _drop_path(self) -> float:
        return self.config.drop_path * self.epoch / self.config.epochs

    def _diverged(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"{what} is not a finite number in epoch {self.epoch + 1}, step {self.step}; the last checkpoint "
            "before that is kept; try a smaller lr or clip"
        )


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Returns the learning rate of an epoch, which is counted from 0."""
    epochs, left = config.epochs, config.epochs - epoch
    if config.schedule == "cosine":
        lr = config.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    elif config.schedule == "exponential":
        lr = config.lr * config.lr_decay**epoch
    elif epochs <= 5:
        lr = config.lr * left / epochs
    else:
        # to 0 in five epochs fewer, but the last five share what one step of that is
        lr = config.lr * ((left - 5) / (epochs - 5) if left > 5 else left / (5 * (epochs - 5)))
    if epoch < config.lr_warmup:
        lr *= (epoch + 1) / config.lr_warmup
    return lr
