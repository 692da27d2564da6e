"""MixedOp: the weighted sum over an edge's candidate operations (DARTS, arXiv:1806.09055, Eq. 2)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from fastnas.nn._common import check_choice
from fastnas.nn.batch_norm import foldable, given_statistics, hooks_of, special, update_tracked
from fastnas.nn.operations import OPS, PRIMITIVES, DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero
from fastnas.nn.skip_dropout import ReduceDropout, SkipDropout
from fastnas.nn.widen import Replaced, widen
from fastnas.ops.mixed_op import CONV, SEPARABLE, Candidate, mixed_op
from fastnas.ops.mixed_sum import mixed_sum
from fastnas.ops.partial_channels import partial_channels, partial_channels_split


class MixedOp(nn.Module):
    """Weighted sum of candidate operations, computed as one fused op. Drops into DARTS scripts.

    ``MixedOp(C, stride)`` has the eight DARTS primitives; ``MixedOp(C, stride, k)`` sends the first C/k channels
    through them (PC-DARTS, DrNAS); ``MixedOp(C, stride, primitives)`` has those named; ``MixedOp([op0, op1, ...])`` has
    modules of your own. Children are named ``_ops.<i>`` as in DARTS, so its state dicts load with ``strict=True``.

    DARTS' own candidates, and the last ``BatchNorm2d(affine=False)`` of any other, are folded into the sum; everything
    else about a module (custom forward, hooks, other norms) is respected by calling it. Hooks that torch keeps for all
    modules (``register_module_forward_hook``) see the MixedOp, or the cell that it is an edge of, not the folded
    candidates.

    The result is in channels_last memory: code that views a feature map as rows needs ``.reshape``. Under autocast it
    has autocast's dtype. PC-DARTS' own class has k = 4 built in: :class:`fastnas.compat.pc_darts.MixedOp`.

    Args:
        C: channels in and out, or the candidates themselves.
        stride: 1 or 2.
        third: ``k`` or ``primitives``, by its type, as DrNAS and SmoothDARTS pass it.
        k: one channel in ``k`` goes through the candidates.
        primitives: names in :data:`fastnas.nn.operations.OPS`.
        pool_norm: end pools that are named with a batch norm, as DARTS does and NAS-Bench-201 does not.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    _C: int | None = None  # unknown of candidates given as modules, and of edges that were pickled whole without it

    def __init__(
        self,
        C: int | Iterable[nn.Module],
        stride: int = 1,
        third: int | Sequence[str] | None = None,
        *,
        k: int | None = None,
        primitives: Sequence[str] | None = None,
        pool_norm: bool = True,
    ) -> None:
        super().__init__()
        if third is not None and (k is not None or primitives is not None):
            raise ValueError("the third argument is k or primitives: give it once")
        if isinstance(third, SupportsIndex):
            k = operator.index(third)
        elif third is not None:
            primitives = third
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}: expected 1 or 2")
        self.stride = stride
        self.k = 1 if k is None else k
        if isinstance(C, SupportsIndex):
            self._C = C = operator.index(C)
            if self.k < 1 or C < 1 or C % self.k:
                raise ValueError(f"k={k} does not divide the C={C} channels: choose a k that does")
            names = PRIMITIVES if primitives is None else primitives
            unknown = [p for p in names if p not in OPS]
            if isinstance(names, str) or unknown:
                raise ValueError(f"primitives: {unknown or names!r} not known; choose a sequence from {', '.join(OPS)}")
            ops: Iterable[nn.Module] = (_build(p, C // self.k, stride, pool_norm) for p in names)
        else:
            if primitives is not None or self.k != 1:
                raise ValueError("k and primitives go with a number of channels, not with a list of modules")
            ops = C
        self._ops = nn.ModuleList(ops)
        if not len(self._ops):
            raise ValueError("a MixedOp needs at least one candidate")
        self._plans: dict[int | None, Plan] = {}

    def forward(self, x: Tensor, weights: Tensor | Sequence[Tensor], choice: int | None = None) -> Tensor:
        """Returns ``sum_o weights[o] * op_o(x)``, shape (N, C, ceil(H / stride), ceil(W / stride)).

        Args:
            x: shape (N, C, H, W).
            weights: one a candidate, as a relaxation gives them.
            choice: the only candidate that is computed: the result is ``weights[choice] * op_choice(x)``.

        Raises:
            TypeError, ValueError: where ``choice`` is no candidate.
        """
        if choice is not None:
            check_choice("choice", choice, len(self._ops))
        weights = as_table(weights, x.device)
        if self.k == 1:
            return self._sum(x, weights, choice)
        active, bypass = partial_channels_split(x, self.k, self.stride)
        return partial_channels(self._sum(active, weights, choice), bypass)

    def wider(self, k: int, generator: torch.Generator | None = None, replaced: list[Replaced] | None = None) -> None:
        """Sends more channels through the candidates: C/k from now on (DrNAS, arXiv:2006.10355, Eq. 7 and 8).

        Channel j of a widened layer is channel j of the old one, or a random old one beyond its width. Parameters are
        replaced, so optimizers must be told: ``replaced`` says what by what.

        Args:
            k: smaller than before, and a divisor of C.
            generator: source of the random channels; torch's global one by default.
            replaced: gets a record of every parameter that is replaced.

        Raises:
            ValueError: where ``k`` does not fit, or a candidate cannot be widened.
        """
        channels = self._C or _channels(self._ops) * self.k
        if not 1 <= k < self.k or channels % k:
            raise ValueError(f"k={k}: expected a divisor of the {channels} channels that is smaller than {self.k}")
        for op in self._ops:
            widen(op, channels // self.k, channels // k, generator, replaced)
        self.k = k
        self._plans = {}

    def keep(self, indices: Iterable[int]) -> None:
        """Leaves only some candidates: the others become zeros, which cost nothing, and weights keep their columns.

        Their parameters are gone, so optimizers must be told.

        Args:
            indices: of the candidates that stay.

        Raises:
            TypeError, ValueError: where there are none, or one of them is no candidate.
        """
        kept = list(indices)
        if not kept:
            raise ValueError("indices is empty: keep at least one candidate, which may be a none")
        for i, index in enumerate(kept):
            check_choice(f"indices[{i}]", index, len(self._ops))
        for o in set(range(len(self._ops))).difference(kept):
            self._ops[o] = Zero(self.stride)
        self._plans = {}

    def extra_repr(self) -> str:
        """Returns the stride, and k where it is not 1."""
        return f"stride={self.stride}" + (f", k={self.k}" if self.k != 1 else "")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_plans": {}}  # plans point at modules; a copy makes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plans = {}  # also of edges that were pickled whole before there were several

    def _sum(self, x: Tensor, weights: Tensor, choice: int | None) -> Tensor:
        if x.dim() != 4:
            ops = list(self._ops) if choice is None else [self._ops[choice]]
            return _sum_apart([op(x) for op in ops], weights, None if choice is None else [choice])
        return self.described(choice).run(x, weights)

    def described(self, choice: int | None = None) -> Plan:
        """Returns what the candidates, or the chosen one, are now; the same object while they stay so."""
        if torch.compiler.is_compiling():  # which guards on what is read, and so needs no memory of its own
            return Plan(self, choice)
        plan = self._plans.get(choice)
        if plan is None or not plan.holds(self):
            plan = Plan(self, choice)
            self._plans = {**self._plans, choice: plan}  # another dict: a replica on another thread has this one, too
        return plan


def as_table(weights: Tensor | Sequence[object], device: torch.device) -> Tensor:
    """Returns weights given as a tensor, a row of scalars or rows of them as one tensor, plain numbers on device."""
    if isinstance(weights, Tensor):
        return weights
    return torch.stack(
        [as_table(w, device) if isinstance(w, Sequence) else torch.as_tensor(w, device=device) for w in weights]
    )


def _build(name: str, C: int, stride: int, pool_norm: bool) -> nn.Module:
    op = OPS[name](C, stride, False)
    return nn.Sequential(op, nn.BatchNorm2d(C, affine=False)) if pool_norm and "pool" in name else op


def _channels(ops: nn.ModuleList) -> int:
    for module in ops.modules():
        if isinstance(module, nn.BatchNorm2d):
            return module.num_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError("no candidate tells how many channels go through it: none has a convolution or a batch norm")


@dataclass(frozen=True)
class Entry:
    """How one candidate enters the fused op."""

    candidate: Candidate
    norms: tuple[nn.BatchNorm2d, ...] = ()
    convs: tuple[nn.Conv2d, ...] = ()  # of a convolutional candidate: depthwise and pointwise, or dense, of each stage
    head: Callable[[Tensor], Tensor] | None = None  # of a map: all before its norm
    known: bool = False  # of a map: its head gives the shape of the edge's output


class Plan:
    """What a MixedOp's candidates are, found once and kept while they stay what they are.

    Of a choice, the others are zeros, which cost nothing. So weights stay as they are: to pick one of them would take a
    kernel, and an index on their device.
    """

    def __init__(self, owner: MixedOp, choice: int | None = None) -> None:
        self.training = owner.training
        self.stride = owner.stride
        self.choice = choice
        self.entries = [
            describe(op, owner.stride, owner.training) if choice in (None, o) else Entry(Candidate("none"))
            for o, op in enumerate(owner._ops)
        ]
        self.candidates = tuple(e.candidate for e in self.entries)
        self.norms = [n for e in self.entries for n in e.norms]
        self.convs = [c for e in self.entries for c in e.convs]
        self.heads = [e.head for e in self.entries if e.head is not None]
        self.known = all(e.head is None or e.known for e in self.entries)
        self.eps = [n.eps for n in self.norms]
        self.ops = self._read(owner)
        self.inside = [] if torch.compiler.is_compiling() else list(self.ops.modules())
        self.facts = [facts(m) for m in self.inside]
        self.hooks = [hooks for m in self.inside for hooks in hooks_of(m)]
        self.hooked = [bool(hooks) for hooks in self.hooks]

    def holds(self, owner: MixedOp) -> bool:
        """Whether the owner, or a copy of it that took the plan along, is still what was described."""
        return (
            self._read(owner) is self.ops
            and owner.training == self.training
            and list(map(bool, self.hooks)) == self.hooked
            and list(map(facts, self.inside)) == self.facts
        )

    def _read(self, owner: MixedOp) -> nn.Module:
        """Returns the module that everything in the plan was read of."""
        return owner._ops if self.choice is None else owner._ops._modules[str(self.choice)]

    def run(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns the edge's output, and updates running statistics."""
        n, c, h, w = x.shape
        out = (n, c, -(-h // self.stride), -(-w // self.stride))
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        maps = [head(x) for head in self.heads]
        if any(m.shape != out for m in maps):
            return self._run_apart(x, weights, maps)
        params: list[Tensor] = [conv.weight for conv in self.convs]
        if autocast:
            maps, params = [m.to(x.dtype) for m in maps], [p.to(x.dtype) for p in params]
        wrong = [n.num_features for n in self.norms if n.num_features != c]
        if wrong:
            raise ValueError(f"x has {c} channels: expected {wrong[0]}, as the candidates were made for")
        result = mixed_op(
            *(x, weights, self.candidates, params, maps),
            stride=self.stride,
            eps=self.eps,
            statistics=None if self.training or not self.norms else given_statistics(self.norms),
        )
        if n:
            update_tracked(self.norms, result)
        return result.y

    def _run_apart(self, x: Tensor, weights: Tensor, maps: list[Tensor]) -> Tensor:
        """The same for candidates whose outputs have another shape than one edge of the DARTS space gives."""
        outputs, rest, computed = [], list(maps), []
        for o, entry in enumerate(self.entries):
            if entry.candidate.kind == "none":
                continue
            if entry.head is None:
                raise ValueError(
                    f"candidates disagree in shape: {[tuple(m.shape) for m in maps]} beside {entry.candidate.kind}, "
                    f"which gives {x.shape[1]} channels with stride {self.stride}; check C and stride of your modules"
                )
            z = rest.pop(0)
            outputs.append(entry.norms[0](z) if entry.norms else z)
            computed.append(o)
        return _sum_apart(outputs, weights, computed if len(computed) < len(self.entries) else None)


def _sum_apart(outputs: list[Tensor], weights: Tensor, computed: Sequence[int] | None) -> Tensor:
    """The sum of the outputs of all or some candidates, whose dtypes may differ (under autocast), as torch promotes."""
    if computed is not None:
        weights = torch.stack([weights[o] for o in computed])
    dtype = functools.reduce(torch.promote_types, (y.dtype for y in outputs))
    return mixed_sum([y.to(dtype) for y in outputs], weights)


_NORM_FACTS = operator.itemgetter("training", "eps", "num_features", "track_running_stats")
_CONV_FACTS = operator.itemgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def facts(m: nn.Module) -> tuple[object, ...]:
    """What :func:`describe` reads of a module, hooks aside: a plan holds while none of it changes."""
    d = m.__dict__  # read on every forward, so not through nn.Module's attributes
    if type(m) is nn.BatchNorm2d:
        missing = [_missing(m, name) for name in ("running_mean", "weight", "bias")]
        return (_NORM_FACTS(d), missing, "forward" in d)
    if type(m) is nn.Conv2d:
        return (_CONV_FACTS(d), _missing(m, "bias"), "forward" in d)
    if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)):
        return (type(m), [v for name, v in d.items() if not name.startswith("_")])
    return (type(m), *d["_modules"].values(), "forward" in d, d["training"])


def _missing(m: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer is None; replicas and pruned modules keep them as plain attributes."""
    for kind in ("_parameters", "_buffers"):
        values = m.__dict__[kind]
        if name in values:
            return values[name] is None
    return getattr(m, name) is None


def describe(op: nn.Module, stride: int, training: bool, affine: bool = False) -> Entry:
    """Finds what of ``op`` the fused op can take over; anything unusual makes it a map that is simply called.

    Args:
        op: a candidate.
        stride: of the edge.
        training: whether batch norms take the batch's statistics.
        affine: whether they must have parameters, or must not.
    """
    whole = Entry(Candidate("map"), head=op)
    if any(map(special, op.modules())):
        return whole
    if type(op) is Zero and op.stride == stride:
        return Entry(Candidate("none"))
    if type(op) in (SkipDropout, ReduceDropout) and op.training:
        return Entry(Candidate("map"), head=op, known=(type(op) is ReduceDropout) == (stride == 2))
    if type(op) in (Identity, nn.Identity, SkipDropout):
        return Entry(Candidate("skip")) if stride == 1 else whole
    if isinstance(op, FactorizedReduce):
        if type(op) in (FactorizedReduce, ReduceDropout) and foldable(op.bn, training, affine):
            return Entry(Candidate("map", norm=True), (op.bn,), head=op.reduce, known=True)
        return whole
    layers = _layers(op)
    if layers is None:
        return whole
    pool = _pool(layers[0], stride)
    if pool is not None:
        if len(layers) == 1:
            return Entry(Candidate(pool))
        norm = layers[1]
        if len(layers) == 2 and isinstance(norm, nn.BatchNorm2d) and foldable(norm, training, affine):
            return Entry(Candidate(pool, norm=True), (norm,))
    convolutional = _separable(layers, stride, training, affine) or _dense(layers, stride, training, affine)
    if convolutional is not None:
        return convolutional
    last = layers[-1]
    if len(layers) > 1 and isinstance(last, nn.BatchNorm2d) and foldable(last, training, affine):
        return Entry(Candidate("map", norm=True), (last,), head=nn.Sequential(*layers[:-1]))
    return whole


def _layers(op: nn.Module) -> list[nn.Module] | None:
    """The layers of a module that does nothing but run them in order, else None."""
    if type(op) in (SepConv, DilConv, ReLUConvBN):
        return _layers(op.op)  # type: ignore[arg-type]
    if type(op) is nn.Sequential:
        nested = [_layers(m) for m in op]
        layers = [layer for part in nested if part is not None for layer in part]
        return layers if layers and None not in nested else None
    return [op] if not isinstance(op, FactorizedReduce) else None


def _pool(m: nn.Module, stride: int) -> Literal["max_pool", "avg_pool"] | None:
    """``max_pool`` or ``avg_pool`` where it is the 3x3 pool of the DARTS space with this stride."""

    def is_pair(value: object, expected: int) -> bool:
        return value in (expected, (expected, expected))

    shape = isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)) and not m.ceil_mode
    if not shape or not (is_pair(m.kernel_size, 3) and is_pair(m.stride, stride) and is_pair(m.padding, 1)):
        return None
    if type(m) is nn.MaxPool2d and is_pair(m.dilation, 1) and not m.return_indices:
        return "max_pool"
    if type(m) is nn.AvgPool2d and not m.count_include_pad and m.divisor_override is None:
        return "avg_pool"
    return None


def _separable(layers: list[nn.Module], stride: int, training: bool, affine: bool) -> Entry | None:
    """One or more times ReLU, depthwise, pointwise, batch norm, all of one kernel size and width."""
    if len(layers) % 4:
        return None
    convs: list[nn.Conv2d] = []
    norms: list[nn.BatchNorm2d] = []
    for i in range(0, len(layers), 4):
        act, dw, pw, norm = layers[i : i + 4]
        if type(act) is not nn.ReLU or type(dw) is not nn.Conv2d or type(pw) is not nn.Conv2d:
            return None
        if not isinstance(norm, nn.BatchNorm2d) or not foldable(norm, training, affine):
            return None
        channels, kernel, dilation = dw.in_channels, dw.kernel_size[0], dw.dilation[0]
        expected_stride = stride if i == 0 else 1
        if (
            (kernel, dilation) not in SEPARABLE
            or dw.kernel_size != (kernel, kernel)
            or dw.dilation != (dilation, dilation)
            or dw.stride != (expected_stride, expected_stride)
            or dw.padding != (dilation * (kernel - 1) // 2,) * 2
            or not dw.groups == dw.out_channels == channels == pw.in_channels == pw.out_channels == norm.num_features
            or (pw.kernel_size, pw.stride, pw.padding, pw.groups) != ((1, 1), (1, 1), (0, 0), 1)
            or any(c.bias is not None or c.padding_mode != "zeros" for c in (dw, pw))
            or (convs and (convs[0].kernel_size, convs[0].dilation) != (dw.kernel_size, dw.dilation))
        ):
            return None
        convs += [dw, pw]
        norms.append(norm)
    kernel, dilation = convs[0].kernel_size[0], convs[0].dilation[0]
    candidate = Candidate("separable", kernel=kernel, dilation=dilation, stages=len(norms))
    return Entry(candidate, tuple(norms), tuple(convs))


def _dense(layers: list[nn.Module], stride: int, training: bool, affine: bool) -> Entry | None:
    """ReLU, dense convolution that keeps the channels, batch norm."""
    if len(layers) != 3:
        return None
    act, conv, norm = layers
    if type(act) is not nn.ReLU or type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d):
        return None
    kernel = conv.kernel_size[0]
    if (
        not foldable(norm, training, affine)
        or (kernel, 1) not in CONV
        or (conv.kernel_size, conv.stride, conv.dilation) != ((kernel, kernel), (stride, stride), (1, 1))
        or conv.padding != ((kernel - 1) // 2,) * 2
        or not conv.in_channels == conv.out_channels == norm.num_features
        or (conv.groups, conv.padding_mode, conv.bias) != (1, "zeros", None)
    ):
        return None
    return Entry(Candidate("conv", kernel=kernel, stages=1), (norm,), (conv,))
