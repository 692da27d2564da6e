"""The names of DrNAS' search code (arXiv:2006.10355), of the DARTS space and of NAS-Bench-201.

They are those of ``model_search``, ``search_model``, ``search_model_gdas``, ``cell_operations``, ``architect`` and
``net2wider``. Candidates' weights are drawn anew in every forward. ``pruning`` and ``wider`` begin another stage of a
search; ``configure_optimizer`` and ``configure_scheduler`` carry momentum and learning rate over to it.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastnas import nn as _nn
from fastnas.compat.darts import (
    OPS,
    Criterion,
    DilConv,
    FactorizedReduce,
    Genotype,
    Identity,
    ReLUConvBN,
    SepConv,
    Zero,
    apply_to,
    renewed,
)
from fastnas.compat.darts import PRIMITIVES as _PRIMITIVES
from fastnas.compat.darts import Architect as _Architect
from fastnas.compat.darts import Network as _Network
from fastnas.compat.darts import _Model as _ArchitectModel
from fastnas.genotype import NASBench201Genotype
from fastnas.nn.nasbench201 import NASBENCH201_PRIMITIVES, NASBench201Cell, NASBench201Supernet
from fastnas.nn.widen import Replaced
from fastnas.relaxations import get_relaxation, softmax
from fastnas.search.regularizers import kl
from fastnas.spaces.nasbench201 import NASBench201Space

__all__ = [
    "NAS_BENCH_201",
    "OPS",
    "PRIMITIVES",
    "Architect",
    "Cell",
    "DilConv",
    "FactorizedReduce",
    "Genotype",
    "Identity",
    "MixedOp",
    "NAS201SearchCell_PartialChannel",
    "Network",
    "ReLUConvBN",
    "SepConv",
    "Structure",
    "TinyNetwork",
    "TinyNetworkGDAS",
    "Zero",
    "configure_optimizer",
    "configure_scheduler",
]

PRIMITIVES = [p for p in _PRIMITIVES if p != "none"]
NAS_BENCH_201 = list(NASBENCH201_PRIMITIVES)

_LOG = logging.getLogger(__name__)

# a widened parameter -> the one that it replaced, and what maps a tensor of the old one's shape to its own
_WIDENED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_Scheduler = TypeVar("_Scheduler", bound=torch.optim.lr_scheduler.LRScheduler)
_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


class _Candidates:
    """Which candidates are left on each edge, and how their weights are drawn."""

    def __init__(self, relaxation: str, reg_type: str, reg_scale: float) -> None:
        if reg_type not in ("l2", "kl"):
            raise ValueError(f"reg_type={reg_type!r}: expected 'l2' or 'kl'")
        if reg_type == "kl" and relaxation != "dirichlet":
            raise ValueError("reg_type='kl' is a divergence of Dirichlet distributions: set species to 'dirichlet'")
        self.relaxation = relaxation
        self.reg_type = reg_type
        self.reg_scale = reg_scale
        self.tau = 10.0
        self.kept: dict[str, Tensor] = {}  # (edges, candidates left), their columns

    def among(self, name: str, alphas: Tensor, relax: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns ``relax`` of the columns that are left, and 0 in the others."""
        if name not in self.kept:
            return relax(alphas)
        kept = self.kept[name].to(alphas.device)
        return torch.zeros_like(alphas).scatter(1, kept, relax(alphas.gather(1, kept)))

    def draw(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns weights, drawn anew where the relaxation draws."""
        relaxation = get_relaxation(self.relaxation)
        return {name: self.among(name, a, lambda left: relaxation(left, None, self.tau)) for name, a in tables.items()}

    def mean(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the softmax of the alphas, which is what architectures are derived from."""
        return {name: self.among(name, alphas.detach(), softmax) for name, alphas in tables.items()}

    def penalty(self, tables: Mapping[str, Tensor]) -> Tensor | float:
        """Returns reg_scale Σ KL(Dir(β) ‖ Dir(1)) over all edges; 0 where α is regularised by its optimizer."""
        if self.reg_type == "l2":
            return 0.0
        left = {n: a.gather(1, self.kept[n].to(a.device)) if n in self.kept else a for n, a in tables.items()}
        return kl(left, self.reg_scale)

    def prune(self, tables: Mapping[str, Tensor], num_keep: int) -> dict[str, Tensor]:
        """Keeps the ``num_keep`` largest alphas of each edge, sets the others to 0, and returns masks of the kept."""
        masks = {}
        for name, alphas in tables.items():
            left = self.kept[name].shape[1] if name in self.kept else alphas.shape[1]
            if not 1 <= num_keep <= left:
                raise ValueError(f"num_keep={num_keep}: expected 1 to {left}, the candidates that an edge has")
            data = alphas.data
            if name in self.kept:
                kept = self.kept[name].to(data.device)
                data = torch.full_like(data, -torch.inf).scatter(1, kept, data.gather(1, kept))
            self.kept[name] = data.topk(num_keep, dim=1).indices.sort(dim=1).values
            masks[name] = torch.zeros_like(data, dtype=torch.bool).scatter(1, self.kept[name], True)
            alphas.data.masked_fill_(~masks[name], 0)
        return masks


def _widen(ops: Iterator[_nn.MixedOp], k: int) -> None:
    replaced: list[Replaced] = []
    for op in ops:
        op.wider(k, replaced=replaced)
    for one in replaced:
        _WIDENED[one.new] = (one.old, one.select)


class _Staged:
    """What the supernets of both spaces do alike: stages, and the regularised loss."""

    k: int
    _candidates: _Candidates
    _criterion: Criterion
    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

        def _tables(self) -> dict[str, Tensor]: ...

        def mixed_ops(self) -> Iterator[tuple[str, int, _nn.MixedOp]]: ...

    def _loss(self, input: Tensor, target: Tensor) -> Tensor:
        return self._criterion(self(input), target) + self._candidates.penalty(self._tables())

    def _prune(self, num_keep: int) -> dict[str, Tensor]:
        masks = self._candidates.prune(self._tables(), num_keep)
        kept = {name: columns.tolist() for name, columns in self._candidates.kept.items()}
        for name, edge, op in self.mixed_ops():
            op.keep(kept[name][edge])
        return masks

    def wider(self, k: int) -> None:
        """Sends 1/k of the channels through the candidates from now on; see :meth:`fastnas.nn.MixedOp.wider`."""
        _widen((op for _, _, op in self.mixed_ops()), k)
        self.k = k

    def show_arch_parameters(self) -> None:
        """Logs the softmax of the alphas."""
        for name, weights in self._candidates.mean(self._tables()).items():
            _LOG.info("%s\n%s", name, weights.cpu())


class MixedOp(_nn.MixedOp):
    """A MixedOp of the seven candidates without ``none``, with ``wider(k)``."""

    def __init__(self, C: int, stride: int, k: int) -> None:
        super().__init__(C, stride, k=k, primitives=PRIMITIVES)


class Cell(_nn.Cell):
    """A search cell whose candidates see 1/k of the channels."""

    def __init__(
        self,
        steps: int,
        multiplier: int,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
        k: int,
    ) -> None:
        super().__init__(
            *(steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev), primitives=PRIMITIVES, k=k
        )

    def wider(self, k: int) -> None:
        """Sends 1/k of the channels through the candidates from now on."""
        _widen(iter(self._ops), k)  # type: ignore[arg-type]


class Network(_Staged, _Network):
    """The supernet of the DARTS space together with its architecture parameters.

    Args:
        C, num_classes, layers, criterion, steps, multiplier, stem_multiplier, in_channels: as those of
            :class:`fastnas.compat.darts.Network`.
        k: the candidates see 1/k of the channels.
        reg_type: ``l2``, which is the Architect's weight decay of the alphas, or ``kl``, a term of ``_loss``.
        reg_scale: its factor.

    Attributes:
        mask_normal: (E, O), true where a candidate is left; None before ``pruning``.
        mask_reduce: likewise.
    """

    _primitives = PRIMITIVES

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        criterion: Criterion,
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        k: int = 4,
        reg_type: str = "l2",
        reg_scale: float = 1e-3,
        *,
        in_channels: int = 3,
    ) -> None:
        super().__init__(
            *(C, num_classes, layers, criterion, steps, multiplier, stem_multiplier), in_channels=in_channels, k=k
        )
        self._candidates = _Candidates("dirichlet", reg_type, reg_scale)
        self.k = k
        self.mask_normal: Tensor | None = None
        self.mask_reduce: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the logits, (N, num_classes), for weights that are drawn anew, in evaluation as well."""
        return _nn.Supernet.forward(self, input, self._candidates.draw(self._tables()))

    def _weights(self) -> dict[str, Tensor]:
        return self._candidates.mean(self._tables())

    def pruning(self, num_keep: int) -> None:
        """Keeps the ``num_keep`` candidates of each edge with the largest alphas; the others are not computed any more.

        Raises:
            ValueError: where an edge has fewer left.
        """
        masks = self._prune(num_keep)
        self.mask_normal, self.mask_reduce = masks["normal"], masks["reduce"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the published pools are modules with their norm as op.1
        pools = re.compile(rf"({re.escape(prefix)}cells\.\d+\._ops\.\d+\._ops\.[01]\.)op\.1\.(.*)")
        _rename(state_dict, lambda key: pools.sub(r"\g<1>1.\2", key))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rename(state_dict: dict[str, Any], name: Callable[[str], str]) -> None:
    for key in list(state_dict):
        if name(key) != key:
            state_dict[name(key)] = state_dict.pop(key)


class Structure(NASBench201Genotype):
    """A cell of NAS-Bench-201; the benchmark's own query functions take it."""

    def tostr(self) -> str:
        """Returns the notation of the benchmark, ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``."""
        return self.to_text()


def _renorm(ops: nn.Module, affine: bool, track_running_stats: bool) -> None:
    """Gives candidates other batch norms than the usual ones."""
    if affine or not track_running_stats:
        for parent in list(ops.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    norm = nn.BatchNorm2d(child.num_features, affine=affine, track_running_stats=track_running_stats)
                    setattr(parent, name, norm)


class NAS201SearchCell_PartialChannel(NASBench201Cell):  # noqa: N801
    """A search cell of NAS-Bench-201 with partial channels; ``forward(inputs, weightss)``.

    Raises:
        ValueError: where it should change the number of channels or the size: residual blocks do that.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        stride: int,
        max_nodes: int,
        op_names: Sequence[str],
        affine: bool = False,
        track_running_stats: bool = True,
        k: int = 4,
    ) -> None:
        if C_in != C_out or stride != 1:
            raise ValueError(f"C_in={C_in}, C_out={C_out}, stride={stride}: a search cell keeps channels and size")
        super().__init__(C_in, max_nodes, primitives=op_names, k=k)
        _renorm(self._ops, affine, track_running_stats)

    def wider(self, k: int) -> None:
        """Sends 1/k of the channels through the candidates from now on."""
        _widen(iter(self._ops), k)  # type: ignore[arg-type]


class TinyNetwork(_Staged, NASBench201Supernet):
    """The supernet of NAS-Bench-201 together with its architecture parameters.

    Args:
        C: channels of the first stage.
        N: cells of a stage.
        max_nodes: nodes of a cell, its input included.
        num_classes: number of logits.
        criterion: the loss.
        search_space: the candidates of an edge, such as ``NAS_BENCH_201``.
        affine: whether the candidates' batch norms have parameters.
        track_running_stats: whether they keep statistics; they use those of the batch in evaluation where not.
        k: the candidates see 1/k of the channels.
        species: what makes weights of the alphas: ``softmax``, ``dirichlet`` or ``gumbel``.
        reg_type: ``l2``, which is the Architect's weight decay of the alphas, or ``kl``, a term of ``_loss``.
        reg_scale: its factor.

    Raises:
        ValueError: where an argument does not fit.
    """

    _relaxations: Mapping[str, str] = {"softmax": "softmax", "dirichlet": "dirichlet", "gumbel": "gumbel_softmax"}

    def __init__(
        self,
        C: int,
        N: int,
        max_nodes: int,
        num_classes: int,
        criterion: Criterion,
        search_space: Sequence[str],
        affine: bool = False,
        track_running_stats: bool = True,
        k: int = 2,
        species: str = "softmax",
        reg_type: str = "l2",
        reg_scale: float = 1e-3,
    ) -> None:
        if species not in self._relaxations:
            raise ValueError(f"species={species!r}: choose from {', '.join(self._relaxations)}")
        super().__init__(C, N, num_classes, nodes=max_nodes, primitives=search_space, k=k)
        for _, _, op in self.mixed_ops():
            _renorm(op, affine, track_running_stats)
        self._criterion = criterion
        self._C = C
        self._layerN = N
        self.max_nodes = max_nodes
        self.op_names = list(search_space)
        self.k = k
        self.species = species
        self._candidates = _Candidates(self._relaxations[species], reg_type, reg_scale)
        self._mask: Tensor | None = None
        self._arch_parameters = self._space().init_alphas()["cell"]

    def _space(self) -> NASBench201Space:
        return NASBench201Space(primitives=tuple(self.op_names), nodes=self.max_nodes)

    def _tables(self) -> dict[str, Tensor]:
        return {"cell": self._arch_parameters}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TinyNetwork:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        apply_to(self.arch_parameters(), fn)
        return self

    def new(self) -> TinyNetwork:
        """Returns a network of the same size with fresh parameters and a copy of the architecture parameters."""
        return renewed(self)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the logits, (N, num_classes), for weights that are drawn anew, in evaluation as well."""
        return super().forward(input, self._candidates.draw(self._tables()))

    def get_weights(self) -> list[nn.Parameter]:
        """Returns the parameters that are no architecture parameters, for an optimizer."""
        return list(self.parameters())

    def arch_parameters(self) -> list[Tensor]:
        """Returns the architecture parameters, for an optimizer."""
        return [self._arch_parameters]

    def set_tau(self, tau: float) -> None:
        """Sets the temperature of the Gumbel noise."""
        self._candidates.tau = tau

    def get_tau(self) -> float:
        """Returns the temperature of the Gumbel noise."""
        return self._candidates.tau

    def genotype(self) -> Structure:
        """Returns the architecture that the architecture parameters stand for now."""
        return Structure(self._space().derive(self._candidates.mean(self._tables())).ops)

    def pruning(self, num_keep: int) -> None:
        """Keeps the ``num_keep`` candidates of each edge with the largest alphas; the others are not computed any more.

        Raises:
            ValueError: where an edge has fewer left.
        """
        self._mask = self._prune(num_keep)["cell"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the published cells keep their edges by name, '2<-1'
        edges = re.compile(rf"({re.escape(prefix)}cells\.\d+\.)edges\.(\d+)<-(\d+)\.(.*)")

        def name(match: re.Match[str]) -> str:
            i, j = int(match[2]), int(match[3])
            return f"{match[1]}_ops.{i * (i - 1) // 2 + j}._ops.{match[4]}"

        _rename(state_dict, lambda key: edges.sub(name, key))
        super()._load_from_state_dict(state_dict, prefix, *args)


class TinyNetworkGDAS(TinyNetwork):
    """The same with one candidate an edge in each forward, drawn with Gumbel noise (GDAS, arXiv:1910.04465)."""

    _relaxations: Mapping[str, str] = {"gdas": "gdas"}

    def __init__(
        self,
        C: int,
        N: int,
        max_nodes: int,
        num_classes: int,
        criterion: Criterion,
        search_space: Sequence[str],
        affine: bool = False,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            *(C, N, max_nodes, num_classes, criterion, search_space, affine, track_running_stats), k=1, species="gdas"
        )

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the logits, (N, num_classes), of one path that is drawn anew."""
        weights = self._candidates.draw(self._tables())
        path = {name: table.argmax(dim=1).tolist() for name, table in weights.items()}
        return NASBench201Supernet.forward(self, input, weights, path=path)


class Architect(_Architect):
    """Takes the steps of the architecture parameters, with Adam; first or second order.

    Args:
        model: a Network or a TinyNetwork.
        args: has ``momentum`` and ``weight_decay`` (of the weights' SGD), ``arch_learning_rate``, and ``reg_type`` and
            ``reg_scale``, of which ``l2`` is Adam's weight decay; or, as older scripts, ``arch_weight_decay`` instead.
    """

    def __init__(self, model: _ArchitectModel, args: Any) -> None:
        decay = args.reg_scale if hasattr(args, "reg_scale") else args.arch_weight_decay
        if getattr(args, "reg_type", "l2") == "kl":
            decay = 0.0
        super().__init__(model, argparse.Namespace(**{**vars(args), "arch_weight_decay": decay}))


def configure_optimizer(optimizer_old: torch.optim.Optimizer, optimizer_new: _Optimizer) -> _Optimizer:
    """Returns the new optimizer with the old one's state, such as momentum, of every parameter that both know.

    A parameter that was widened in between has the state of the one it replaced, with its channels copied as the
    parameter's own were.
    """
    for group in optimizer_new.param_groups:
        for parameter in group["params"]:
            source, selections = parameter, []
            while source not in optimizer_old.state and source in _WIDENED:
                source, select = _WIDENED[source]
                selections.append(select)
            for name, value in optimizer_old.state.get(source, {}).items():
                if isinstance(value, Tensor) and value.shape == source.shape:
                    for select in reversed(selections):
                        value = select(value)
                optimizer_new.state[parameter][name] = value.clone() if isinstance(value, Tensor) else value
    return optimizer_new


def configure_scheduler(scheduler_old: _Scheduler, scheduler_new: _Scheduler) -> _Scheduler:
    """Returns the new scheduler where the old one was; its optimizer goes on with the old one's learning rates.

    Raises:
        ValueError: where the two optimizers do not have as many groups of parameters.
    """
    rates = scheduler_old.get_last_lr()
    groups = scheduler_new.optimizer.param_groups
    if len(rates) != len(groups):
        raise ValueError(f"scheduler_new has {len(groups)} groups of parameters, scheduler_old {len(rates)}")
    scheduler_new.load_state_dict(scheduler_old.state_dict())
    for group, rate, base in zip(groups, rates, scheduler_new.base_lrs, strict=True):
        group["lr"], group["initial_lr"] = rate, base
    return scheduler_new
