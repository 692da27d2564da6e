"""The bilevel search: weights and alphas take turns, each on its own images (arXiv:1806.09055, Algorithm 1)."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas._device import as_device
from fastnas.data import Augment, Batches, ImageData, augment, load, normalize, split, to_device
from fastnas.genotype import AnyGenotype, parse_genotype
from fastnas.nn.preserved import preserved
from fastnas.nn.skip_dropout import set_skip_dropout
from fastnas.relaxations import get_relaxation
from fastnas.runs.checkpoint import CheckpointError
from fastnas.runs.machine import AMP, GPU_READ_EVERY, DivergenceError, describe, peak_memory, seed_of, settings
from fastnas.search import perturbation
from fastnas.search.architect import Batch, Bilevel, first_order, second_order
from fastnas.search.candidates import Candidates
from fastnas.search.chance import Chance
from fastnas.search.checkpoint import CHECKPOINTS
from fastnas.search.config import SearchConfig, Stage
from fastnas.search.graphs import CudaRecorder, GraphedStep
from fastnas.search.hessian import curvature
from fastnas.search.measures import Measures
from fastnas.search.regularizers import get_regularizer
from fastnas.search.stages import reshape
from fastnas.spaces import get_space
from fastnas.spaces._registry import allowed
from fastnas.spaces._tables import draw

Arguments = dict[str, Any]
"""What a supernet's forward is given beside the images."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a search came to.

    Attributes:
        epoch: Counted from 1.
        stage: Of a search in stages, counted from 1.
        k: Partial channels of that stage.
        lr: Learning rate of the weights.
        train_loss: Mean cross entropy of the weight steps, each measured before the step.
        train_accuracy: The same batches' accuracy, 0 to 1.
        alpha_loss: Mean cross entropy of the batches of the architecture steps; NaN while the alphas warm up.
        valid_loss: Cross entropy of the supernet on all validation images, after the epoch, with the relaxation's mean
            weights; as :meth:`Search.evaluate` says.
        valid_accuracy: The accuracy of that pass, 0 to 1. The alphas are trained on these images, as in DARTS, so
            this is no measure of generalisation.
        alpha_spread: max - min of an edge's alphas, averaged over the edges.
        entropy: Entropy of an edge's weights in nats, averaged over the edges; log(primitives) is undecided.
        genotype: What the weights of the mixed operations stand for, in its notation.
        measures: What the options ask for beside that, by name; see :mod:`fastnas.search.measures`.
        seconds: Wall-clock time.
        peak_memory: Bytes: allocated by torch on a GPU, else the largest resident size of the process so far.
    """

    epoch: int
    stage: int
    k: int
    lr: float
    train_loss: float
    train_accuracy: float
    alpha_loss: float
    valid_loss: float
    valid_accuracy: float
    alpha_spread: float
    entropy: float
    genotype: str
    measures: dict[str, float]
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
        scores: What the architecture is derived from, in the same shapes: the relaxation's mean, times the weights of
            the edges where they have any.
        weights: The mixed operations' weights at the start and after each epoch, oldest first.
        history: One record for each finished epoch.
        supernet: The trained supernet, on the search's device.
    """

    config: SearchConfig
    finished: bool
    genotype: AnyGenotype
    alphas: dict[str, Tensor]
    scores: dict[str, Tensor]
    weights: list[dict[str, Tensor]]
    history: list[EpochRecord]
    supernet: nn.Module


class Search:
    """A bilevel search that can be stopped, saved and resumed between any two steps.

    Each step moves the alphas on a batch of the validation part and the weights on a batch of the training part, in the
    order that the options say. Both forward passes update BatchNorm's running statistics, as in DARTS' scripts; those
    of a second-order step do not.

    Args:
        config: The options.
        data: Images to search on instead of those that ``config.data`` names; the name then only selects the preset.
        draw_architecture: What ``select=evaluate`` trains and compares, instead of the space's ``sample``.

    Attributes:
        epoch: Finished epochs.
        step: Finished steps of the epoch under way.
        stage: Index of the stage that the next step belongs to.
        space: The search space.
        relaxation: From alphas to the weights of the mixed operations.
        steps_per_epoch: Steps in an epoch.
        parts: The indices of the images that train the weights, and of those that train the alphas.
        kept: The operations that each edge keeps, (E, n) ascending indices for each table of alphas; empty as long as
            it is all.
        history: One record for each finished epoch.
        weights: The mixed operations' weights at the start and after each finished epoch, on the CPU.
        measures: What is measured at the end of an epoch.

    Raises:
        ValueError: for an unknown space, relaxation or data set, an unusable device or a batch larger than the data.
        OSError: where the data cannot be read.
    """

    FREE_ON_RESUME = frozenset({"device", "threads", "cuda_graphs", "root", "table"})
    """Options that a resumed search may change: it may move to another machine, where its rounding may differ."""

    def __init__(
        self,
        config: SearchConfig,
        *,
        data: ImageData | None = None,
        draw_architecture: Callable[[torch.Generator | None], AnyGenotype] | None = None,
    ) -> None:
        self.config = config
        self.device = as_device(config.device)
        self.relaxation = get_relaxation(config.relaxation)
        self.space = get_space(config.space)
        self._draw_architecture = draw_architecture or self.space.sample
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
        self._train_batches = Batches(train, config.batch_size, seed=seed_of(config.seed, "train"), drop_last=True)
        self._valid_batches = Batches(valid, config.batch_size, seed=seed_of(config.seed, "valid"))
        self._augment_generator = self._generator("augment")
        self.steps_per_epoch = len(self._train_batches)

        self.alphas = self.space.init_alphas(self._generator("alphas"), config.alpha_scale, self.device)
        self._check_space()
        # Modules draw their initial parameters from torch's global generator: seed it for them alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(config.seed, "weights"))
            supernet = self.space.supernet(
                config.channels, config.layers, len(data.classes), data.images.shape[1], config.schedule[0].k
            )
        self.supernet = supernet.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.checkpoint_cells:
            if not hasattr(self.supernet, "checkpoint_cells"):
                raise ValueError(f"checkpoint_cells with space={config.space}: it cannot run cells again; leave it out")
            self.supernet.checkpoint_cells = True
        self._edge_alphas = self._init_edge_alphas() if config.edge_normalization else {}
        self._chance = Chance(self.device, seed_of(config.seed, "chance"))
        self.kept: dict[str, Tensor] = {}
        self._candidates = self._candidates_of_edges()
        self._regularizer = get_regularizer(config.regularizer)
        self._weight_optimizer = self._sgd({})
        self._alpha_optimizer = self._optimizer_of_alphas()
        self._prepare()

        self.epoch = 0
        self.step = 0
        self.stage = 0
        self.history: list[EpochRecord] = []
        self.weights = [self._current_weights()]
        self._chosen: AnyGenotype | None = None
        self.measures = Measures(config, self.space)
        # Summed loss, correct answers and images of the weight steps; summed loss and images of the alpha steps.
        self._totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        self._seconds = 0.0
        self._stop = False

    def _check_space(self) -> None:
        """Checks the options that not every space has room for."""
        c, space = self.config, self.space
        widths = {alpha.shape[1] for alpha in self.alphas.values()}
        fewest = min(widths | {int(table.sum(1).min()) for table in allowed(space).values()})
        if any(alpha.shape != (len(space.edges), len(space.primitives)) for alpha in self.alphas.values()):
            wanted = {
                "stages": (bool(c.stages), "[]"),
                "edge_normalization": (c.edge_normalization, "false"),
                "skip_dropout": (c.skip_dropout > 0, "0"),
                "relaxation": (self.relaxation.single_path and c.select != "evaluate", "softmax"),
            }
            for name, (given, instead) in wanted.items():
                if given:
                    raise ValueError(
                        f"{name}={getattr(c, name)} with space={c.space}, whose tables are not of candidates on edges: "
                        f"set {name} to {instead}" + (", and k to 1" if c.k > 1 and name != "stages" else "")
                    )
        if c.fair and not self._chooses_everywhere():
            raise ValueError(
                f"fair=True with space={c.space}, whose edges do not all have a candidate each: set it to False"
            )
        for n, stage in enumerate(c.schedule):
            if stage.ops > max(widths) or (n == 0 and 0 < stage.ops < max(widths)):
                raise ValueError(
                    f"stages={c.stages}: stage {n + 1} has {stage.ops} of {max(widths)} operations; the first stage "
                    f"has all, which 0 stands for as well, and no other has more"
                )
            if n and stage.ops > fewest:
                raise ValueError(f"stages={c.stages}: stage {n + 1} has {stage.ops} operations, some edges {fewest}")
            if stage.ops == 1 and "none" in space.primitives:
                raise ValueError(f"stages={c.stages}: one operation may be none on every edge; keep 2 or more")

    def _chooses_everywhere(self) -> bool:
        """Tells whether an architecture is any one candidate on each edge."""
        space = self.space
        shape = (len(space.edges), len(space.primitives))
        if allowed(space) or any(alpha.shape != shape for alpha in self.alphas.values()):
            return False
        return all(bool(t.any(1).all()) for t in space.encode(space.sample(self._generator("fair"))).values())

    def _init_edge_alphas(self) -> dict[str, Tensor]:
        shapes = {name: (1, len(self.space.edges)) for name in self.alphas}
        drawn = draw(shapes, self._generator("edge alphas"), self.config.alpha_scale, self.device)
        return {name: row.detach()[0].requires_grad_() for name, row in drawn.items()}

    def _sgd(self, state: Mapping[Tensor, Any]) -> torch.optim.SGD:
        """Returns the optimizer of the supernet's parameters, with the state of those that have one."""
        c = self.config
        optimizer = torch.optim.SGD(
            self.supernet.parameters(),
            torch.tensor(c.lr, device=self.device),  # which the fused update reads on the device
            momentum=c.momentum,
            weight_decay=c.weight_decay,
            nesterov=c.nesterov,
            fused=True,
        )
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter in state:
                optimizer.state[parameter] = state[parameter]
            elif c.momentum:  # at once: a parameter off the first paths is not in the first updates
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def _optimizer_of_alphas(self) -> torch.optim.Optimizer:
        c = self.config
        weight_decay = c.alpha_weight_decay + (c.regularizer_scale if self._regularizer.weight_decay else 0.0)
        tables = [*self.alphas.values(), *self._edge_alphas.values()]
        if c.alpha_optimizer == "sgd":
            return torch.optim.SGD(tables, c.alpha_lr, weight_decay=weight_decay, foreach=True)
        on_gpu = self.device.type == "cuda"
        return torch.optim.Adam(
            tables,
            c.alpha_lr,
            betas=c.alpha_betas,
            weight_decay=weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
            foreach=not on_gpu,
        )

    def _prepare(self) -> None:
        """Makes the steps, which hold on to the optimizers' tensors."""
        upper = {**self.alphas, **{f"betas-{name}": beta for name, beta in self._edge_alphas.items()}}
        self._bilevel = Bilevel(self.supernet, self._weight_optimizer, upper, self._loss, self._chance.rewind)
        self._alpha_step: Callable[..., None] = self._update_alphas
        self._weight_step: Callable[..., None] = self._update_weights
        if self.config.cuda_graphs:
            recorder = CudaRecorder(self.device)
            generators = [self._chance.generator]
            self._alpha_step = GraphedStep(self._update_alphas, recorder, generators)
            self._weight_step = GraphedStep(self._update_weights, recorder, generators)

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
        with settings(self.device, self.config.threads), self._chance:
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
        return SearchResult(
            config=self.config,
            finished=self.epoch == self.config.epochs,
            genotype=self.genotype(),
            alphas={name: alpha.detach().cpu().clone() for name, alpha in self.alphas.items()},
            scores={name: scores.cpu() for name, scores in self.mean_weights().items()},
            weights=list(self.weights),
            history=list(self.history),
            supernet=self.supernet,
        )

    def genotype(self) -> AnyGenotype:
        """Returns the architecture so far."""
        if self._chosen is not None:
            return self._chosen
        if self.config.select != "derive":  # until the end, when one is chosen
            return next(self._random_architectures())
        return self.space.derive(self.mean_weights())

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
            "stage": self.stage,
            "kept": self.kept,
            "chosen": None if self._chosen is None else self._chosen.to_text(),
            "chance": self._chance.state_dict(),
            "machine": describe(self.device, self.config.threads),
            "supernet": self.supernet.state_dict(),
            "alphas": {name: alpha.detach() for name, alpha in self._bilevel.alphas.items()},
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
        # its own machine does not count, and may not be here
        theirs = SearchConfig.from_dict({**state["config"], "device": "cpu", "cuda_graphs": False}).to_dict()
        CHECKPOINTS.check(mine, theirs, self.FREE_ON_RESUME)
        CHECKPOINTS.compare(describe(self.device, self.config.threads), state["machine"])
        if self.stage > state["stage"]:
            raise CheckpointError(
                f"the checkpoint is of stage {state['stage'] + 1}, this search is in stage {self.stage + 1} and cannot "
                "go back: load it into a new one"
            )
        self.stage = state["stage"]
        if self.stage:
            self._reshape({name: kept.to(self.device) for name, kept in state["kept"].items()})
        self.supernet.load_state_dict(state["supernet"])
        with torch.no_grad():
            for name, alpha in self._bilevel.alphas.items():
                alpha.copy_(state["alphas"][name])
        for name, optimizer in (("weight", self._weight_optimizer), ("alpha", self._alpha_optimizer)):
            # An optimizer keeps the tensors that it is given; they may be another search's. Its settings follow from
            # the options and the machine, and the machine may be another.
            saved = copy.deepcopy(state[f"{name}_optimizer"]["state"])
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        self._prepare()  # anew: the optimizers' tensors are others now
        self._chance.load_state_dict(state["chance"])
        chosen = state["chosen"]
        self._chosen = None if chosen is None else parse_genotype(chosen)
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
        if self.config.skip_dropout:
            set_skip_dropout(self.supernet, self._skip_dropout())
        start = time.perf_counter()
        before = self._seconds
        for indices in self._train_batches:
            self._step(indices)
            self.step += 1
            self._seconds = before + time.perf_counter() - start
            last_of_epoch = self.step == self.steps_per_epoch
            if self.device.type == "cpu" or last_of_epoch or self._stop or self.step % GPU_READ_EVERY == 0:
                self._check_finite()
                if on_step:
                    on_step(self)
            if self._stop and not last_of_epoch:
                break

    def _step(self, indices: Tensor) -> None:
        train = self._augmented(indices)
        if not self.config.alpha_first:
            self._weight_step(*train)
        if self.config.order and self.epoch >= self._first_epoch(self.stage) + self._current_stage.warmup:
            valid = self._augmented(self._valid_batches.sample())
            self._alpha_step(*train, *valid)
        if self.config.alpha_first:
            self._weight_step(*train)

    @property
    def _current_stage(self) -> Stage:
        return self.config.schedule[self.stage]

    def _first_epoch(self, stage: int) -> int:
        return sum(s.epochs for s in self.config.schedule[:stage])

    def _update_alphas(self, train_images: Tensor, train_labels: Tensor, images: Tensor, labels: Tensor) -> None:
        architect = second_order if self.config.order == 2 else first_order
        parts = self._parts_of(images, labels)
        if len(parts) > 1:
            rewind = self._chance.rewind()
        sums: list[Tensor] = []
        tables = list(self._bilevel.alphas.values())
        for i, part in enumerate(parts):
            if i:
                rewind()
            _, logits = architect(self._bilevel, (train_images, train_labels), part)
            self._totals[3].add_(F.cross_entropy(logits, part[1], reduction="sum"))
            if len(parts) > 1:
                share = len(part[1]) / len(labels)
                grads = [share * table.grad for table in tables if table.grad is not None]
                sums = grads if not sums else list(torch._foreach_add(sums, grads))
        for table, grad in zip(tables, sums, strict=bool(sums)):
            table.grad = grad
        self._alpha_optimizer.step()
        self._totals[4].add_(len(labels))

    def _update_weights(self, images: Tensor, labels: Tensor) -> None:
        self._weight_optimizer.zero_grad()
        # The alphas stand still here, so their gradient is not computed.
        with torch.no_grad():
            drawn = self._fair_paths() if self.config.fair else [self._arguments() for _ in range(self.config.paths)]
        images_seen = len(drawn) * len(labels)
        for arguments in drawn:
            if self.config.perturbation != "none":
                arguments["weights"] = self._perturbed(arguments, images, labels)
            for part, answers in self._parts_of(images, labels):
                logits = self._logits(part, arguments)
                loss = F.cross_entropy(logits, answers)
                (loss * (len(answers) / images_seen)).backward()  # type: ignore[no-untyped-call]
                self._totals[0].add_(loss.detach() * len(answers))
                self._totals[1].add_((logits.detach().argmax(1) == answers).sum())
        if self.config.clip:
            # a path that is not taken leaves no gradient
            nn.utils.clip_grad_norm_(self._bilevel.parameters, self.config.clip, foreach=True)
        self._weight_optimizer.step()
        self._totals[2].add_(images_seen)

    def _parts_of(self, images: Tensor, labels: Tensor) -> list[Batch]:
        """Returns a batch in the parts that its gradient is accumulated over."""
        if self.config.accumulate == 1:
            return [(images, labels)]
        number = self.config.accumulate
        return list(zip(images.tensor_split(number), labels.tensor_split(number), strict=True))

    def _perturbed(self, arguments: Arguments, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns weights for one step of the network's parameters that are disturbed, within the epoch's radius."""
        generator = self._chance.generator
        weights = self._candidates.split(arguments["weights"])  # those of pruned operations stay 0
        epsilon = perturbation.radius(self.epoch, self.config.epochs, *self.config.perturbation_radius)
        if self.config.perturbation == "random":
            found = perturbation.random(weights, epsilon, generator)
        else:

            def loss(tables: dict[str, Tensor]) -> Tensor:
                return F.cross_entropy(
                    self._logits(images, {**arguments, "weights": self._candidates.join(tables)}), labels
                )

            with preserved(self.supernet, training=False):
                found = perturbation.adversarial(weights, epsilon, loss, self._bilevel.parameters, generator)
        return self._candidates.join(found)

    def _end_epoch(self) -> EpochRecord:
        start = time.perf_counter()
        last = self.epoch + 1 == self.config.epochs
        if last and self.config.select == "evaluate":
            self._chosen = self._best_architecture()
        valid_loss, valid_accuracy = self.evaluate()
        weights = self._current_weights()
        genotype = self.genotype()
        rows = [row for table in weights.values() for row in table]
        record = EpochRecord(
            epoch=self.epoch + 1,
            stage=self.stage + 1,
            k=self._current_stage.k,
            lr=self._lr(),
            **self.progress(),
            valid_loss=valid_loss,
            valid_accuracy=valid_accuracy,
            alpha_spread=alpha_spread(self._candidates.split(self.alphas)),
            entropy=sum(torch.special.entr(row).sum().item() for row in rows) / len(rows),
            genotype=genotype.to_text(),
            measures=self.measures(self, genotype),
            seconds=self._seconds + time.perf_counter() - start,
            peak_memory=peak_memory(self.device),
        )
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._totals.zero_()
        self.weights.append(weights)
        self.history.append(record)
        if not last and self.epoch == self._first_epoch(self.stage + 1):
            self.stage += 1
            self._reshape(self._best_operations(self._current_stage.ops))
            self._prepare()
        return record

    def _best_operations(self, number: int) -> dict[str, Tensor]:
        """Returns the indices of the operations that a stage keeps, (E, number) in ascending order for each table."""
        if not number:
            return self.kept
        return {
            name: weights.topk(number, dim=1).indices.sort(dim=1).values
            for name, weights in self.mean_weights().items()
        }

    def _reshape(self, kept: dict[str, Tensor]) -> None:
        """Gives the supernet the form of the stage: the kept operations, and its k; momentum goes along."""
        self.kept = kept
        self._candidates = self._candidates_of_edges()
        replaced = reshape(self.supernet, kept, self._current_stage.k, self._generator(f"stage {self.stage}"))
        state: dict[Tensor, Any] = dict(self._weight_optimizer.state)
        for record in replaced:
            if record.old in state:
                state[record.new] = {
                    key: record.select(value)
                    if isinstance(value, Tensor) and value.shape == record.old.shape
                    else value
                    for key, value in state.pop(record.old).items()
                }
        self._weight_optimizer = self._sgd(state)

    def evaluate(self, genotype: AnyGenotype | None = None) -> tuple[float, float]:
        """Returns the mean loss and the accuracy on all validation images, with the supernet's parameters.

        Images are not augmented. Of the supernet itself, BatchNorm uses its running statistics (eval mode). Those of
        single paths are of as many networks as there are steps: there, every batch takes a path of its own and is
        normalised by its own statistics, as in training, and so is a single architecture.

        Args:
            genotype: One architecture of the space, instead of the supernet with the relaxation's mean weights.
        """
        single_path = self.relaxation.single_path
        if genotype is None and not single_path:
            return self._evaluate(lambda: self._mean_arguments(), running=True)
        if genotype is not None:
            arguments = self._arguments_of(genotype)
            return self._evaluate(lambda: arguments, running=False)
        on = "cpu" if self.config.select == "evaluate" else self.device
        generator = torch.Generator(on).manual_seed(seed_of(self.config.seed, f"paths {self.epoch}"))
        return self._evaluate(lambda: self._arguments(generator), running=False)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Runs the block without dropout on skip connections, also where the supernet is in training mode."""
        if not self.config.skip_dropout:
            yield
            return
        set_skip_dropout(self.supernet, 0.0)
        try:
            yield
        finally:
            set_skip_dropout(self.supernet, self._skip_dropout())

    def _skip_dropout(self) -> float:
        return self.config.skip_dropout * math.exp(-0.2 * self.epoch)

    @torch.no_grad()
    def _evaluate(self, arguments: Callable[[], Arguments], *, running: bool) -> tuple[float, float]:
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        batches = list(torch.split(self.parts[1], self.config.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # which has no statistics of its own
            batches[-2:] = [torch.cat(batches[-2:])]
        with preserved(self.supernet, training=not running), self._without_dropout(), self._chance.repeated():
            for indices in batches:
                pixels, labels = self._batch(indices)
                logits = self._logits(normalize(pixels, self._mean, self._std), arguments())
                loss += F.cross_entropy(logits, labels, reduction="sum")
                correct += (logits.argmax(1) == labels).sum()
        images = len(self.parts[1])
        return loss.item() / images, correct.item() / images

    def hessian(self) -> dict[str, float]:
        """Returns the curvature of the loss on the first batch of validation images, by the names of measures.

        Derivatives are with respect to the weights of the mixed operations, at the relaxation's mean.
        """
        pixels, labels = self._batch(self.parts[1][: self.config.batch_size])
        images = normalize(pixels, self._mean, self._std)
        edges = self._mean_arguments().get("edge_weights")
        extra = {} if edges is None else {"edge_weights": {name: e.detach() for name, e in edges.items()}}

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(self._logits(images, {"weights": self._candidates.join(weights), **extra}), labels)

        generator = torch.Generator().manual_seed(seed_of(self.config.seed, f"hessian {self.epoch}"))
        with self._chance.repeated(), self._without_dropout(), self._whole_cells():
            found = curvature(
                self.supernet, loss, self._candidates.split(self.alphas), self.relaxation, generator=generator
            )
        values = {f"hessian/{name}": value for name, value in asdict(found).items()}
        return {name: value for name, value in values.items() if value is not None}

    @contextmanager
    def _whole_cells(self) -> Iterator[None]:
        """Runs the block with cells that keep what they computed, which second derivatives need."""
        if self.config.checkpoint_cells:
            self.supernet.checkpoint_cells = False
        try:
            yield
        finally:
            if self.config.checkpoint_cells:
                self.supernet.checkpoint_cells = True

    def _random_architectures(self) -> Iterator[AnyGenotype]:
        generator = self._generator("architectures")
        while True:
            yield self._draw_architecture(generator)

    def _best_architecture(self) -> AnyGenotype:
        """Returns the best of random architectures by the validation accuracy with the supernet's parameters."""
        candidates = list(itertools.islice(self._random_architectures(), self.config.candidates))
        return max(candidates, key=lambda genotype: self.evaluate(genotype)[1])

    def _batch(self, indices: Tensor) -> Batch:
        indices = to_device(indices, self.device)
        return self._data.images[indices], self._data.labels[indices]

    def _augmented(self, indices: Tensor) -> Batch:
        images, labels = self._batch(indices)
        return augment(images, self._augment, self._mean, self._std, self._augment_generator), labels

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self._logits(images, self._arguments())
        loss = F.cross_entropy(logits, labels)
        return loss + self._regularizer(self.alphas, self.config.regularizer_scale), logits

    def _logits(self, images: Tensor, arguments: Arguments) -> Tensor:
        # Each parameter is read once a forward, so a cache of their casts would only hold memory.
        dtype = AMP[self.config.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            logits: Tensor = self.supernet(images, **arguments)
        return logits.float()

    def _arguments(self, generator: torch.Generator | None = None) -> Arguments:
        """Returns what the supernet is given in a forward, with a new draw of all that is random."""
        if self.config.select == "evaluate":  # what is trained are the architectures that will be compared
            return self._arguments_of(self._draw_architecture(generator))
        generator = self._chance.generator if generator is None else generator
        temperature = self._temperature()
        weights = self._tables(lambda alpha: self.relaxation(alpha, generator, temperature))
        arguments = self._with_edge_weights(weights)
        if self.relaxation.single_path:
            arguments["path"] = path_of(weights)
        return arguments

    def _fair_paths(self) -> list[Arguments]:
        """Returns as many paths as there are candidates, of which each is once on every edge (arXiv:1907.01845)."""
        generator, count = self._chance.generator, len(self.space.primitives)
        orders = {
            name: torch.rand(alpha.shape, generator=generator, device=self.device).argsort(1)
            for name, alpha in self.alphas.items()
        }
        drawn = []
        for n in range(count):
            weights = {name: F.one_hot(order[:, n], count).float() for name, order in orders.items()}
            drawn.append({**self._with_edge_weights(weights), "path": path_of(weights)})
        return drawn

    def _mean_arguments(self) -> Arguments:
        return self._with_edge_weights(self._tables(self.relaxation.mean))

    def _arguments_of(self, genotype: AnyGenotype) -> Arguments:
        """Returns the supernet's arguments for one architecture: weights 1 and 0.

        Edges that it does not have, or has ``none`` on, add nothing to a node, not even the channels that bypass the
        candidates; the weights of the others, where edges have weights, are normalised over them.
        """
        weights = self.space.encode(genotype)
        if not hasattr(self.supernet, "mixed_ops"):
            return {"weights": {name: table.to(self.device) for name, table in weights.items()}}
        path = path_of(weights, self.space.primitives)
        arguments: Arguments = {"weights": {name: t.to(self.device) for name, t in weights.items()}, "path": path}
        if self._edge_alphas or self._current_stage.k > 1:
            none = [o for o, name in enumerate(self.space.primitives) if name == "none"]
            present = {
                name: torch.tensor([bool(row.any()) and o not in none for row, o in zip(t, path[name], strict=True)])
                for name, t in weights.items()
            }
            arguments["edge_weights"] = self._edge_weights_of(present)
        return arguments

    def _edge_weights_of(self, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights of the edges that are present, (E,) for each cell type, and 0 for the others."""
        masks = {name: mask.to(self.device, torch.float32) for name, mask in present.items()}
        if not self._edge_alphas:
            return masks
        weights = {name: masks[name] * edges for name, edges in self._edge_weights().items()}
        return {
            name: torch.cat([n / n.sum().clamp(min=1e-12) for n in torch.split(edges, self._fan_in())])
            for name, edges in weights.items()
        }

    def _fan_in(self) -> list[int]:
        return [len(list(group)) for _, group in itertools.groupby(i for i, _ in self.space.edges)]

    def _with_edge_weights(self, weights: dict[str, Tensor]) -> Arguments:
        if not self._edge_alphas:
            return {"weights": weights}
        return {"weights": weights, "edge_weights": self._edge_weights()}

    def _edge_weights(self) -> dict[str, Tensor]:
        """Returns the relaxation's mean over the edges that enter a node, (E,) for each cell type."""
        return {
            name: torch.cat([self.relaxation.mean(node[None])[0] for node in torch.split(beta, self._fan_in())])
            for name, beta in self._edge_alphas.items()
        }

    def _tables(self, relax: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Returns the weights of all candidates: what ``relax`` makes of the alphas of those there are, and 0."""
        return self._candidates.join(
            {name: relax(alpha) for name, alpha in self._candidates.split(self.alphas).items()}
        )

    def _candidates_of_edges(self) -> Candidates:
        has = {name: table.to(self.device) for name, table in allowed(self.space).items()}
        if self.kept:  # of what is allowed
            none = {name: torch.zeros_like(alpha, dtype=torch.bool) for name, alpha in self.alphas.items()}
            has = {name: none[name].scatter(1, kept, True) for name, kept in self.kept.items()}
        return Candidates(has)

    @torch.no_grad()
    def mean_weights(self) -> dict[str, Tensor]:
        """Returns the scores that an architecture is derived from: the relaxation's mean, times the edges' weights."""
        weights = self._tables(self.relaxation.mean)
        if not self._edge_alphas:
            return weights
        return {name: weights[name] * edges[:, None] for name, edges in self._edge_weights().items()}

    @torch.no_grad()
    def sampled_weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns scores of a random architecture, as likely as the relaxation has it.

        A relaxation that draws gives a draw; from one that does not, an operation is drawn for each edge with the
        probabilities that its weights are.
        """
        if self.relaxation.sampler is not None:
            return self._tables(lambda alpha: self.relaxation(alpha, generator, self._temperature()))
        scores = {}
        for name, w in self.mean_weights().items():
            u = torch.rand(w.shape, generator=generator, device=w.device)
            scores[name] = w / -u.clamp(1e-20, 1 - 1e-7).log()  # an exponential race: o is first with probability w_o
        return scores

    def _current_weights(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: weights.cpu() for name, weights in self._tables(self.relaxation.mean).items()}

    def _temperature(self) -> float:
        first, last = self.config.temperature
        return first + (last - first) * self.epoch / max(1, self.config.epochs - 1)

    def _lr(self) -> float:
        c = self.config
        return c.lr_min + (c.lr - c.lr_min) * (1 + math.cos(math.pi * self.epoch / c.epochs)) / 2

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.config.seed, purpose))

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
    """Returns max - min of an edge's alphas, averaged over all edges: how far the search has moved them apart.

    Args:
        alphas: Tables (E, O).
    """
    tables = [alpha.detach() for alpha in alphas.values()]
    return torch.cat([table.amax(1) - table.amin(1) for table in tables]).mean().item()


def path_of(weights: Mapping[str, Tensor], primitives: Sequence[str] = ()) -> dict[str, list[int]]:
    """Returns the candidate of each edge whose weight is not 0; of an edge without one, ``none`` where there is that.

    All tables are read back from a GPU by one copy.
    """
    rows = torch.cat(list(weights.values()))
    chosen = rows.argmax(1)
    if "none" in primitives:
        chosen = torch.where(rows.amax(1) > 0, chosen, primitives.index("none"))
    indices = iter(chosen.tolist())
    return {name: list(itertools.islice(indices, len(table))) for name, table in weights.items()}
