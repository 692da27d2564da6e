"""The bilevel search: weights and alphas take turns, each on its own images (arXiv:1806.09055, Algorithm 1)."""

from __future__ import annotations

import copy
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas._device import as_device
from fastnas.data import Augment, Batches, ImageData, augment, load, normalize, split, to_device
from fastnas.genotype import AnyGenotype
from fastnas.relaxations import get_relaxation
from fastnas.search.architect import Batch, Bilevel
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.config import AMP, SearchConfig
from fastnas.search.graphs import CudaRecorder, GraphedStep
from fastnas.search.methods import get_method
from fastnas.spaces import get_space

# On a GPU, reading a loss back waits for the step to end; every tenth step is often enough for a progress bar.
_GPU_READ_EVERY = 10


class DivergenceError(ArithmeticError):
    """The loss is no longer a number; the message says where and what helps."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a search came to.

    Attributes:
        epoch: Counted from 1.
        lr: Learning rate of the weights.
        train_loss: Mean cross entropy of the weight steps, each measured before the step.
        train_accuracy: The same batches' accuracy, 0 to 1.
        alpha_loss: Mean cross entropy of the batches of the architecture steps; NaN while the alphas warm up.
        valid_loss: Cross entropy of the supernet on all validation images, after the epoch. BatchNorm uses its
            running statistics (eval mode) and images are not augmented.
        valid_accuracy: The accuracy of that pass, 0 to 1. The alphas are trained on these images, as in DARTS, so
            this is no measure of generalisation.
        alpha_spread: max - min of an edge's alphas, averaged over the edges.
        entropy: Entropy of an edge's weights in nats, averaged over the edges; log(primitives) is undecided.
        seconds: Wall-clock time.
        peak_memory: Bytes: allocated by torch on a GPU, else the largest resident size of the process so far.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    alpha_loss: float
    valid_loss: float
    valid_accuracy: float
    alpha_spread: float
    entropy: float
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind.

    Attributes:
        config: The options it ran with.
        finished: False where it was stopped before its last epoch.
        genotype: The architecture that the weights of the mixed operations stand for now.
        alphas: Architecture parameters, name -> (edges, primitives), on the CPU.
        weights: The mixed operations' weights at the start and after each epoch, oldest first.
        history: One record for each finished epoch.
        supernet: The trained supernet, on the search's device.
    """

    config: SearchConfig
    finished: bool
    genotype: AnyGenotype
    alphas: dict[str, Tensor]
    weights: list[dict[str, Tensor]]
    history: list[EpochRecord]
    supernet: nn.Module


class Search:
    """A bilevel search that can be stopped, saved and resumed between any two steps.

    Each step first moves the alphas on a batch of the validation part, then the weights on a batch of the training
    part. Both forward passes update BatchNorm's running statistics, as in DARTS' scripts.

    Args:
        config: The options.
        data: Images to search on instead of those that ``config.data`` names; the name then only selects the preset.

    Attributes:
        epoch: Finished epochs.
        step: Finished steps of the epoch under way.
        space: The search space.
        steps_per_epoch: Steps in an epoch.
        parts: The indices of the images that train the weights, and of those that train the alphas.
        history: One record for each finished epoch.
        weights: The mixed operations' weights at the start and after each finished epoch, on the CPU.

    Raises:
        ValueError: for an unknown space, relaxation or data set, an unusable device or a batch larger than the data.
        OSError: where the data cannot be read.
    """

    FREE_ON_RESUME = frozenset({"device", "threads", "cuda_graphs"})
    """Options that a resumed search may change: it may move to another machine, where its rounding may differ."""

    def __init__(self, config: SearchConfig, *, data: ImageData | None = None) -> None:
        self.config = config
        self.device = as_device(config.device)
        self._method = get_method(config.method)
        self._relax = get_relaxation(config.relaxation)
        self.space = get_space(config.space)
        data = load(config.data, config.root) if data is None else data
        train, valid = split(len(data.images), config.train_portion, self._generator("split"))
        for part, name in ((train, "training"), (valid, "validation")):
            if len(part) < config.batch_size:
                raise ValueError(
                    f"batch_size={config.batch_size} is larger than the {len(part)} {name} images that "
                    f"train_portion={config.train_portion} leaves; choose a smaller batch_size"
                )
        self._data = data.to(self.device)
        # Here once: to move them in each step would make it wait for the GPU.
        self._mean = torch.tensor(data.mean, dtype=torch.float32, device=self.device)
        self._std = torch.tensor(data.std, dtype=torch.float32, device=self.device)
        self.parts = (train, valid)
        self._augment = Augment(pad=config.pad, flip=config.flip, cutout=config.cutout)
        # BatchNorm wants no small last batch; the images that miss an epoch are others each time.
        self._train_batches = Batches(train, config.batch_size, seed=_seed(config.seed, "train"), drop_last=True)
        self._valid_batches = Batches(valid, config.batch_size, seed=_seed(config.seed, "valid"))
        self._augment_generator = self._generator("augment")
        self.steps_per_epoch = len(self._train_batches)

        # Modules draw their initial parameters from torch's global generator: seed it for them alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(config.seed, "weights"))
            supernet = self.space.supernet(
                config.channels, config.layers, len(data.classes), data.images.shape[1], config.k
            )
        self.supernet = supernet.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.alphas = self.space.init_alphas(self._generator("alphas"), config.alpha_scale, self.device)
        if len({alpha.shape[1] for alpha in self.alphas.values()}) > 1:
            raise ValueError(
                f"space={config.space!r} has alphas for more than operations, which this search does not follow; "
                "train its supernet in a loop of your own, or choose darts or nb201"
            )
        # The learning rate is a tensor on the device, which only the fused update reads there.
        self._weight_optimizer = torch.optim.SGD(
            self.supernet.parameters(),
            torch.tensor(config.lr, device=self.device),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        on_gpu = self.device.type == "cuda"
        self._alpha_optimizer = torch.optim.Adam(
            list(self.alphas.values()),
            config.alpha_lr,
            betas=config.alpha_betas,
            weight_decay=config.alpha_weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
            foreach=not on_gpu,
        )
        self._bilevel = Bilevel(self.supernet, self._weight_optimizer, self.alphas, self._loss)
        self._alpha_step: Callable[..., None] = self._update_alphas
        self._weight_step: Callable[..., None] = self._update_weights
        if config.cuda_graphs:
            self._record_steps()

        self.epoch = 0
        self.step = 0
        self.history: list[EpochRecord] = []
        self.weights = [self._current_weights()]
        # Summed loss, correct answers and images of the weight steps; summed loss and images of the alpha steps.
        self._totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        self._seconds = 0.0
        self._stop = False

    def stop(self) -> None:
        """Asks the search to stop after the step under way; it can be called from a callback or a signal handler."""
        self._stop = True

    def run(
        self,
        *,
        on_step: Callable[[Search], object] | None = None,
        on_epoch: Callable[[Search, EpochRecord], object] | None = None,
    ) -> SearchResult:
        """Returns the result of the search, run to its end or until :meth:`stop`.

        Args:
            on_step: Called after each step; :meth:`progress` has the numbers.
            on_epoch: Called after each epoch with its record, when the state can be saved.

        Raises:
            DivergenceError: where the loss is no longer a finite number.
        """
        with _settings(self.device, self.config.threads):
            while self.epoch < self.config.epochs and not self._stop:
                self._run_epoch(on_step)
                if self.step == self.steps_per_epoch:
                    record = self._end_epoch()
                    if on_epoch:
                        on_epoch(self, record)
        self._stop = False
        return self.result()

    def result(self) -> SearchResult:
        """Returns what the search has come to so far."""
        weights = self._current_weights()
        return SearchResult(
            config=self.config,
            finished=self.epoch == self.config.epochs,
            genotype=self.space.derive(weights),
            alphas={name: alpha.detach().cpu().clone() for name, alpha in self.alphas.items()},
            weights=list(self.weights),
            history=list(self.history),
            supernet=self.supernet,
        )

    def progress(self) -> dict[str, float]:
        """Returns the means over the epoch under way: train_loss, train_accuracy and alpha_loss."""
        loss, correct, images, alpha_loss, alpha_images = self._totals.tolist()
        return {
            "train_loss": loss / images if images else math.nan,
            "train_accuracy": correct / images if images else math.nan,
            "alpha_loss": alpha_loss / alpha_images if alpha_images else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the rest of the search depends on, as tensors and plain values.

        The tensors are those that the search goes on changing: save or copy them before the next step.
        """
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self._totals,
            "seconds": self._seconds,
            "history": [asdict(record) for record in self.history],
            "weights": self.weights,
            "supernet": self.supernet.state_dict(),
            "alphas": {name: alpha.detach() for name, alpha in self.alphas.items()},
            "weight_optimizer": self._weight_optimizer.state_dict(),
            "alpha_optimizer": self._alpha_optimizer.state_dict(),
            "train_batches": self._train_batches.state_dict(),
            "valid_batches": self._valid_batches.state_dict(),
            "augment_generator": self._augment_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the search where :meth:`state_dict` was taken; it then goes on with the same bits.

        Raises:
            CheckpointError: where the state is of a search with other options; the search is then unchanged.
        """
        mine = self.config.to_dict()
        # Options that are newer than the checkpoint have a default that changes nothing.
        theirs = {**{field.name: field.default for field in fields(self.config)}, **state["config"]}
        differs = [k for k in mine if k not in self.FREE_ON_RESUME and mine[k] != theirs[k]]
        if differs:
            name = differs[0]
            raise CheckpointError(
                f"the checkpoint is of a search with {name}={theirs[name]!r}, this one has "
                f"{name}={mine[name]!r}; resume with the options of the checkpoint"
            )
        self.supernet.load_state_dict(state["supernet"])
        with torch.no_grad():
            for name, alpha in self.alphas.items():
                alpha.copy_(state["alphas"][name])
        for name, optimizer in (("weight", self._weight_optimizer), ("alpha", self._alpha_optimizer)):
            # An optimizer keeps the tensors that it is given; they may be another search's. Its settings follow from
            # the options and the machine, and the machine may be another.
            saved = copy.deepcopy(state[f"{name}_optimizer"]["state"])
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.config.cuda_graphs:
            self._record_steps()  # anew: the optimizers' tensors are others now
        self._train_batches.load_state_dict(state["train_batches"])
        self._valid_batches.load_state_dict(state["valid_batches"])
        self._augment_generator.set_state(state["augment_generator"])
        self.epoch, self.step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self._totals.copy_(state["totals"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.weights = list(state["weights"])

    def _run_epoch(self, on_step: Callable[[Search], object] | None) -> None:
        self.supernet.train()
        for group in self._weight_optimizer.param_groups:
            group["lr"].fill_(self._lr())
        start = time.perf_counter()
        before = self._seconds
        for indices in self._train_batches:
            self._step(indices)
            self.step += 1
            self._seconds = before + time.perf_counter() - start
            last_of_epoch = self.step == self.steps_per_epoch
            if self.device.type == "cpu" or last_of_epoch or self._stop or self.step % _GPU_READ_EVERY == 0:
                self._check_finite()
                if on_step:
                    on_step(self)
            if self._stop and not last_of_epoch:
                break

    def _step(self, indices: Tensor) -> None:
        train = self._augmented(indices)
        if self.epoch >= self.config.alpha_warmup:
            valid = self._augmented(self._valid_batches.sample())
            self._alpha_step(*train, *valid)
        self._weight_step(*train)

    def _record_steps(self) -> None:
        recorder = CudaRecorder(self.device)
        self._alpha_step = GraphedStep(self._update_alphas, recorder)
        self._weight_step = GraphedStep(self._update_weights, recorder)

    def _update_alphas(self, train_images: Tensor, train_labels: Tensor, images: Tensor, labels: Tensor) -> None:
        loss, _ = self._method.architect(self._bilevel, (train_images, train_labels), (images, labels))
        self._alpha_optimizer.step()
        self._totals[3].add_(loss * len(labels))
        self._totals[4].add_(len(labels))

    def _update_weights(self, images: Tensor, labels: Tensor) -> None:
        self._weight_optimizer.zero_grad()
        # The alphas stand still here, so their gradient is not computed.
        with torch.no_grad():
            weights = self._weights()
        logits = self._logits(images, weights)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip:
            nn.utils.clip_grad_norm_(self._bilevel.parameters, self.config.clip, foreach=True)
        self._weight_optimizer.step()
        self._totals[0].add_(loss.detach() * len(labels))
        self._totals[1].add_((logits.detach().argmax(1) == labels).sum())
        self._totals[2].add_(len(labels))

    def _end_epoch(self) -> EpochRecord:
        start = time.perf_counter()
        valid_loss, valid_accuracy = self.evaluate()
        weights = self._current_weights()
        rows = torch.cat(list(weights.values()))
        record = EpochRecord(
            epoch=self.epoch + 1,
            lr=self._lr(),
            **self.progress(),
            valid_loss=valid_loss,
            valid_accuracy=valid_accuracy,
            alpha_spread=alpha_spread(self.alphas),
            entropy=torch.special.entr(rows).sum(1).mean().item(),
            seconds=self._seconds + time.perf_counter() - start,
            peak_memory=peak_memory(self.device),
        )
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._totals.zero_()
        self.weights.append(weights)
        self.history.append(record)
        return record

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Returns the supernet's mean loss and accuracy on all validation images.

        BatchNorm uses its running statistics (eval mode), never those of the batch; images are not augmented.
        """
        training = self.supernet.training
        self.supernet.eval()
        weights = self._weights()
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        for indices in torch.split(self.parts[1], self.config.batch_size):
            pixels, labels = self._batch(indices)
            logits = self._logits(normalize(pixels, self._mean, self._std), weights)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
        self.supernet.train(training)
        images = len(self.parts[1])
        return loss.item() / images, correct.item() / images

    def _batch(self, indices: Tensor) -> Batch:
        indices = to_device(indices, self.device)
        return self._data.images[indices], self._data.labels[indices]

    def _augmented(self, indices: Tensor) -> Batch:
        images, labels = self._batch(indices)
        return augment(images, self._augment, self._mean, self._std, self._augment_generator), labels

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self._logits(images, self._weights())
        return F.cross_entropy(logits, labels), logits

    def _logits(self, images: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        # Each parameter is read once a forward, so a cache of their casts would only hold memory.
        dtype = AMP[self.config.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            logits: Tensor = self.supernet(images, weights)
        return logits.float()

    def _weights(self) -> dict[str, Tensor]:
        return {name: self._relax(alpha) for name, alpha in self.alphas.items()}

    def _current_weights(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: weights.cpu() for name, weights in self._weights().items()}

    def _lr(self) -> float:
        c = self.config
        return c.lr_min + (c.lr - c.lr_min) * (1 + math.cos(math.pi * self.epoch / c.epochs)) / 2

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(_seed(self.config.seed, purpose))

    def _check_finite(self) -> None:
        totals = self._totals
        if not torch.isfinite(totals).all():
            which = "weights" if not torch.isfinite(totals[0]) else "alphas"
            advice = "a smaller lr or clip" if which == "weights" else "a smaller alpha_lr"
            raise DivergenceError(
                f"the loss of the {which} is not a finite number in epoch {self.epoch + 1}, step {self.step}; "
                f"try {advice}"
            )


def search(
    config: SearchConfig,
    *,
    data: ImageData | None = None,
    on_step: Callable[[Search], object] | None = None,
    on_epoch: Callable[[Search, EpochRecord], object] | None = None,
) -> SearchResult:
    """Returns the result of a whole search; :class:`Search` has the same in parts, and can be saved and resumed.

    Example:
        >>> result = search(SearchConfig(data="digits", epochs=5))
        >>> result.genotype, result.history[-1].valid_accuracy
    """
    return Search(config, data=data).run(on_step=on_step, on_epoch=on_epoch)


def alpha_spread(alphas: Mapping[str, Tensor]) -> float:
    """Returns max - min of an edge's alphas, averaged over all edges: how far the search has moved them apart."""
    rows = torch.cat([alpha.detach() for alpha in alphas.values()])  # (E, O)
    return (rows.amax(1) - rows.amin(1)).mean().item()


def peak_memory(device: torch.device) -> int:
    """Returns bytes: torch's largest allocation on a GPU, else this process' largest resident size; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _seed(seed: int, purpose: str) -> int:
    # One independent stream for each purpose: a change in one (another batch size, say) leaves the others alone.
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "little") >> 1


@contextmanager
def _settings(device: torch.device, threads: int) -> Iterator[None]:
    """Runs the block with this number of threads (0: as it is) and, on a GPU, cuDNN's deterministic algorithms."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        if device.type == "cuda":
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
                yield
        else:
            yield
    finally:
        if threads:
            torch.set_num_threads(before)
