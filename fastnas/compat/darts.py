"""The names of quark0/darts' ``cnn`` folder: ``genotypes``, ``operations``, ``model_search`` and ``architect``.

In a search script, ``from fastnas.compat.darts import Network, Architect`` stands for the imports of ``model_search``
and ``architect``. Nothing here calls ``.cuda()``: a model lives where its script moves it, architecture parameters
included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from fastnas.genotype import Genotype
from fastnas.nn.cells import Cell
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import OPS, DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero
from fastnas.nn.operations import PRIMITIVES as _PRIMITIVES
from fastnas.nn.supernet import Supernet
from fastnas.relaxations.softmax import softmax
from fastnas.search.architect import Batch, Bilevel, Copies, first_order, rewinding, second_order
from fastnas.spaces.darts import DartsSpace

__all__ = [
    "DARTS",
    "DARTS_V1",
    "DARTS_V2",
    "OPS",
    "PRIMITIVES",
    "AmoebaNet",
    "Architect",
    "Cell",
    "DilConv",
    "FactorizedReduce",
    "Genotype",
    "Identity",
    "MixedOp",
    "NASNet",
    "Network",
    "ReLUConvBN",
    "SepConv",
    "Zero",
]

PRIMITIVES = list(_PRIMITIVES)

# The cells found by the papers, as the scripts name them.
NASNet = Genotype.from_text(
    "Genotype(normal=[('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 0), ('sep_conv_3x3', 0), "
    "('avg_pool_3x3', 1), ('skip_connect', 0), ('avg_pool_3x3', 0), ('avg_pool_3x3', 0), ('sep_conv_3x3', 1), "
    "('skip_connect', 1)], normal_concat=[2, 3, 4, 5, 6], reduce=[('sep_conv_5x5', 1), ('sep_conv_7x7', 0), "
    "('max_pool_3x3', 1), ('sep_conv_7x7', 0), ('avg_pool_3x3', 1), ('sep_conv_5x5', 0), ('skip_connect', 3), "
    "('avg_pool_3x3', 2), ('sep_conv_3x3', 2), ('max_pool_3x3', 1)], reduce_concat=[4, 5, 6])"
)
AmoebaNet = Genotype.from_text(
    "Genotype(normal=[('avg_pool_3x3', 0), ('max_pool_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 2), "
    "('sep_conv_3x3', 0), ('avg_pool_3x3', 3), ('sep_conv_3x3', 1), ('skip_connect', 1), ('skip_connect', 0), "
    "('avg_pool_3x3', 1)], normal_concat=[4, 5, 6], reduce=[('avg_pool_3x3', 0), ('sep_conv_3x3', 1), "
    "('max_pool_3x3', 0), ('sep_conv_7x7', 2), ('sep_conv_7x7', 0), ('avg_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('conv_7x1_1x7', 0), ('sep_conv_3x3', 5)], reduce_concat=[3, 4, 6])"
)
DARTS_V1 = Genotype.from_text(
    "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
    "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])"
)
DARTS_V2 = Genotype.from_text(
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
DARTS = DARTS_V2

Criterion = Callable[[Tensor, Tensor], Tensor]

_Model_T = TypeVar("_Model_T", bound="_Model")


def apply_to(alphas: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> None:
    """Moves or casts alphas through ``.data``, so that optimizers that hold them keep them."""
    for alpha in alphas:
        grad = alpha.grad
        alpha.data = fn(alpha.data)
        if grad is not None:
            alpha.grad = fn(grad)


def renewed(model: _Model_T) -> _Model_T:
    """Returns a copy with fresh parameters, the same architecture parameters and no gradients."""
    model = copy.deepcopy(model)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    for alpha in model.arch_parameters():
        alpha.grad = None
    return model


class Network(Supernet):
    """The supernet together with its architecture parameters, as in ``model_search.py``.

    The alphas are plain tensors: outside ``parameters()`` and ``state_dict()``, but moved and cast with the module.
    """

    _k = 1  # where no other is given
    _primitives: Sequence[str] = PRIMITIVES

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        criterion: Criterion,
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        *,
        in_channels: int = 3,
        k: int | None = None,
    ) -> None:
        super().__init__(
            C,
            layers,
            num_classes,
            in_channels,
            primitives=self._primitives,
            steps=steps,
            multiplier=multiplier,
            stem_multiplier=stem_multiplier,
            k=self._k if k is None else k,
        )
        self._C = C
        self._num_classes = num_classes
        self._layers = layers
        self._criterion = criterion
        self._steps = steps
        self._multiplier = multiplier
        self._stem_multiplier = stem_multiplier
        self._in_channels = in_channels
        self._initialize_alphas()

    def _space(self) -> DartsSpace:
        return DartsSpace(primitives=tuple(self._primitives), steps=self._steps, multiplier=self._multiplier)

    def _initialize_alphas(self) -> None:
        alphas = self._space().init_alphas()
        self.alphas_normal = alphas["normal"]
        self.alphas_reduce = alphas["reduce"]
        self._arch_parameters = [self.alphas_normal, self.alphas_reduce]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        apply_to(self._arch_parameters, fn)
        return self

    def new(self) -> Network:
        """Returns a network of the same size with fresh parameters and a copy of the architecture parameters."""
        return renewed(self)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the logits, (N, num_classes)."""
        return super().forward(input, self._weights())

    def _tables(self) -> dict[str, Tensor]:
        return {"normal": self.alphas_normal, "reduce": self.alphas_reduce}

    def _weights(self) -> dict[str, Tensor]:
        return {name: softmax(alphas) for name, alphas in self._tables().items()}

    def _loss(self, input: Tensor, target: Tensor) -> Tensor:
        return self._criterion(self(input), target)

    def arch_parameters(self) -> list[Tensor]:
        """Returns the architecture parameters, for an optimizer."""
        return self._arch_parameters

    def genotype(self) -> Genotype:
        """Returns the architecture that the architecture parameters stand for now."""
        return self._space().derive(self._weights())


class _Arguments(Protocol):
    momentum: float
    weight_decay: float
    arch_learning_rate: float
    arch_weight_decay: float


class _Model(Protocol):
    """What an Architect asks of a model; ``_loss`` may be any function of the model's parameters and alphas."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def arch_parameters(self) -> list[Tensor]: ...

    def _loss(self, input: Tensor, target: Tensor) -> Tensor: ...


class Architect:
    """Takes the steps of the architecture parameters, with Adam (arXiv:1806.09055, Eq. 7 and 8).

    Args:
        model: a Network.
        args: has ``momentum`` and ``weight_decay`` (of the weights' SGD), ``arch_learning_rate`` and
            ``arch_weight_decay``.
    """

    def __init__(self, model: _Model, args: _Arguments) -> None:
        self.network_momentum = args.momentum
        self.network_weight_decay = args.weight_decay
        self.model = model
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(),
            lr=args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
        )
        self._copies = Copies()

    def step(
        self,
        input_train: Tensor,
        target_train: Tensor,
        input_valid: Tensor,
        target_valid: Tensor,
        eta: float | Tensor,
        network_optimizer: torch.optim.Optimizer,
        unrolled: bool,
    ) -> None:
        """Steps the architecture parameters; the weights are as before, bit for bit.

        Args:
            input_train: images of the training half; used where ``unrolled``.
            target_train: their labels.
            input_valid: images of the half for the architecture.
            target_valid: their labels.
            eta: the weights' learning rate (a float or a tensor of one element).
            network_optimizer: the weights' optimizer; its momentum buffers enter the unrolled step.
            unrolled: differentiate through one step of the weights (second order). Running statistics then stay as
                they were, and the first-order gradient's own forward updates them, as any forward in training does.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # what a step of the weights would be: this one is never taken
        optimizer = torch.optim.SGD(
            parameters, eta, momentum=self.network_momentum, weight_decay=self.network_weight_decay
        )
        optimizer.state = network_optimizer.state
        generators = [torch.default_generator]
        generators += [torch.cuda.default_generators[i] for i in {p.device.index for p in parameters if p.is_cuda}]
        bilevel = Bilevel(
            cast("nn.Module", self.model),
            optimizer,
            {str(i): alpha for i, alpha in enumerate(self.model.arch_parameters())},
            self._loss,
            rewinding(generators),
            self._copies,
        )
        architect = second_order if unrolled else first_order
        architect(bilevel, (input_train, target_train), (input_valid, target_valid))
        self.optimizer.step()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = self.model._loss(*batch)
        return loss, loss  # a step returns logits, which the published signature has no place for
