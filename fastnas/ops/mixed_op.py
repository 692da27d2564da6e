"""mixed_op: a whole edge of candidate operations as one autograd node.

``y = sum_o w_o * BN_o(candidate_o(x))`` (DARTS, arXiv:1806.09055, Eq. 2), where the batch norms have no affine
parameters. The sum reads the candidates' outputs from before their batch norm; normalised outputs, products and partial
sums are never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common

Kind = Literal["none", "skip", "max_pool", "avg_pool", "separable", "map", "conv"]
_KINDS: tuple[Kind, ...] = ("none", "skip", "max_pool", "avg_pool", "separable", "map", "conv")  # csrc/mixed_op.h
SEPARABLE = {(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)}  # (kernel, dilation) that have a kernel
CONV = {(1, 1), (3, 1)}
MAX_EDGES, MAX_STAGES, MAX_TERMS = 8, 32, 40  # csrc/mixed_op.h: of all edges that leave one state


@dataclass(frozen=True)
class Candidate:
    """One candidate operation of an edge.

    ``none``: zeros. ``skip``: the input. ``max_pool``, ``avg_pool``: 3x3, padding 1, padding not counted.
    ``separable``: ``stages`` times ReLU, depthwise ``kernel`` x ``kernel`` with ``dilation`` (same padding), pointwise,
    batch norm; the edge's stride is the first stage's. ``conv``: the same with one dense ``kernel`` x ``kernel``
    convolution in the place of the two. ``map``: a tensor computed outside.

    Attributes:
        kind: what it is.
        norm: whether a batch norm (no affine parameters) ends it; a convolutional candidate always has one a stage.
        kernel: width of the depthwise or dense kernels.
        dilation: of the depthwise kernels.
        stages: 1 for a dilated convolution, 2 for DARTS' separable convolution.
    """

    kind: Kind
    norm: bool = False
    kernel: int = 0
    dilation: int = 1
    stages: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind is {self.kind!r}: expected one of {', '.join(_KINDS)}")
        known = {"separable": SEPARABLE, "conv": CONV}.get(self.kind)
        if known is not None and ((self.kernel, self.dilation) not in known or self.stages < 1):
            raise ValueError(
                f"no {self.kind} candidate with kernel {self.kernel}, dilation {self.dilation}, {self.stages} stages: "
                f"(kernel, dilation) is one of {sorted(known)} and there is at least one stage"
            )
        if self.norm and self.kind in ("none", "skip"):
            raise ValueError(f"a candidate of kind {self.kind!r} has no batch norm")

    @property
    def norms(self) -> int:
        """How many batch norms it has."""
        return self.stages or int(self.norm)

    @property
    def row(self) -> tuple[int, int, int, int, int]:
        """What the native ops are told of it: a row of their plan."""
        return (_KINDS.index(self.kind), int(self.norm), self.kernel, self.dilation, self.stages)

    def shapes(self, c: int) -> list[tuple[int, int, int, int]]:
        """The shapes of its parameters on ``c`` channels, in order."""
        k = self.kernel
        if self.kind == "conv":
            return [(c, c, k, k)] * self.stages
        return [(c, 1, k, k), (c, c, 1, 1)] * self.stages


class MixedOpResult(NamedTuple):
    """What :func:`mixed_op` returns: the sum, and in training mode the batch statistics, one row a batch norm."""

    y: Tensor  # (N, C, OH, OW)
    mean: Tensor | None  # (norms, C)
    variance: Tensor | None  # (norms, C), unbiased


def _normalise(z: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    shape = (1, -1, 1, 1)
    return (z - mean.to(z.dtype).view(shape)) * torch.rsqrt(variance + eps).to(z.dtype).view(shape)


def mixed_op_reference(
    x: Tensor,
    weights: Tensor,
    candidates: Sequence[Candidate],
    params: Sequence[Tensor],
    maps: Sequence[Tensor],
    stride: int,
    eps: Sequence[float],
    statistics: tuple[Tensor, Tensor] | None,
) -> MixedOpResult:
    """Returns what :func:`mixed_op` does, in plain PyTorch."""
    means: list[Tensor] = []
    variances: list[Tensor] = []
    rest_params, rest_maps = list(params), list(maps)

    def norm(z: Tensor) -> Tensor:
        row = len(means)
        if statistics is not None:
            mean, biased = statistics[0][row].detach(), statistics[1][row].detach()
            unbiased = biased
        else:
            wide = z.to(_common.compute_dtype(z))
            count = z.numel() // z.shape[1]
            mean = wide.mean((0, 2, 3))
            biased = (wide - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
            unbiased = biased.detach() * (count / (count - 1))
        means.append(mean.detach())
        variances.append(unbiased)
        return _normalise(z, mean, biased, eps[row])

    total = x.new_zeros(())
    for w, c in zip(weights.to(x.dtype), candidates, strict=True):
        if c.kind == "none":
            continue
        if c.kind == "skip":
            z = x
        elif c.kind == "max_pool":
            z = F.max_pool2d(x, 3, stride, 1)
        elif c.kind == "avg_pool":
            z = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        elif c.kind == "map":
            z = rest_maps.pop(0)
        else:
            z = x
            for s in range(c.stages):
                step, pad = stride if s == 0 else 1, c.dilation * (c.kernel - 1) // 2
                if c.kind == "conv":
                    z = norm(F.conv2d(F.relu(z), rest_params.pop(0), None, step, pad))
                    continue
                dw, pw = rest_params.pop(0), rest_params.pop(0)
                z = F.conv2d(F.relu(z), dw, None, step, pad, c.dilation, x.shape[1])
                z = norm(F.conv2d(z, pw))
        total = total + w * (norm(z) if c.norm and not c.stages else z)
    if total.dim() == 0:
        total = (x[:, :, ::stride, ::stride] * 0) + total
    if statistics is not None:
        return MixedOpResult(total, None, None)
    empty = x.new_empty((0, x.shape[1]), dtype=_common.compute_dtype(x))
    return MixedOpResult(total, torch.stack(means) if means else empty, torch.stack(variances) if means else empty)


class _MixedOp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        plan: list[int],
        stride: int,
        eps: list[float],
        statistics: tuple[Tensor, Tensor] | None,
        counts: tuple[int, int],
        x: Tensor,
        weights: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        params, maps = tensors[: counts[0]], tensors[counts[0] :]
        mean, invstd = statistics if statistics is not None else (None, None)
        y, outs, batch_mean, batch_invstd, variance = ops.mixed_op(
            x, weights, params, maps, plan, stride, eps, mean, invstd
        )
        training = mean is None or invstd is None
        ctx.call = (ops, plan, stride, training, counts)
        ctx.save_for_backward(
            x, weights, *tensors, *outs, batch_mean if training else mean, batch_invstd if training else invstd
        )
        ctx.mark_non_differentiable(batch_mean, variance)
        return y, batch_mean, variance

    @staticmethod
    @_common.differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        ops, plan, stride, training, (n_params, n_maps) = ctx.call
        x, weights, *rest, mean, invstd = saved
        x, *maps_and_outs = (t.contiguous(memory_format=torch.channels_last) for t in (x, *rest[n_params:]))
        params, maps, outs = rest[:n_params], maps_and_outs[:n_maps], maps_and_outs[n_maps:]
        need_x, need_weights = ctx.needs_input_grad[6:8]
        need = ctx.needs_input_grad[8:]
        need_params, need_maps = any(need[:n_params]), any(need[n_params:])
        grad_x, grad_weights, grad_params, grad_maps = ops._mixed_op_backward(
            grad.contiguous(memory_format=torch.channels_last),
            *(x, weights, params, maps, outs, mean, invstd, plan, stride, training, need_x, need_params, need_maps),
        )
        return (
            *(None,) * 6,
            grad_x if need_x else None,
            grad_weights if need_weights else None,
            *(grad_params if need_params else (None,) * n_params),
            *(grad_maps if need_maps else (None,) * n_maps),
        )


def mixed_op(
    x: Tensor,
    weights: Tensor,
    candidates: Sequence[Candidate],
    params: Sequence[Tensor] = (),
    maps: Sequence[Tensor] = (),
    *,
    stride: int = 1,
    eps: Sequence[float] | float = 1e-5,
    statistics: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> MixedOpResult:
    """Returns ``sum_o weights[o] * candidate_o(x)`` and the batch statistics of the candidates' batch norms.

    Batch norms are numbered by candidate, then by stage. Their statistics are the batch's (each then needs more than
    one value a channel), or those given. The result is in channels_last memory where a native backend runs; edges of
    more than 40 candidates, or 32 stages, run on the reference.

    Args:
        x: shape (N, C, H, W).
        weights: shape (len(candidates),), any floating dtype.
        candidates: the edge's operations, in the order of ``weights``.
        params: of each stage of each separable candidate the depthwise (C, 1, k, k) and pointwise (C, C, 1, 1) weights,
            of each stage of each conv candidate its (C, C, k, k).
        maps: of each candidate of kind ``map`` its tensor (N, C, OH, OW), from before its batch norm where it has one.
        stride: 1 or 2; OH = ceil(H / stride), OW likewise.
        eps: of the batch norms: one for all, or one each.
        statistics: mean and biased variance to normalise with instead of the batch's, each (norms, C).
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check(x, weights, candidates, params, maps, stride)
    norms = sum(c.norms for c in candidates)
    out = (x.shape[0], x.shape[1], -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    eps = check_norms(norms, eps, statistics, out)
    ops = _library.namespace(backend, x)
    stages = sum(c.stages for c in candidates)
    if ops is None or x.numel() == 0 or len(candidates) > MAX_TERMS or stages > MAX_STAGES:
        return mixed_op_reference(x, weights, candidates, params, maps, stride, eps, statistics)
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu" and ops is torch.ops.fastnas:
        x = x.float()  # the CPU kernels take float32 and float64
    compute = _common.compute_dtype(x)
    if statistics is not None:
        statistics = mean_and_invstd(statistics, eps, compute)
    plan = [v for c in candidates for v in c.row]
    y, batch_mean, batch_variance = _MixedOp.apply(  # type: ignore[no-untyped-call]
        *(ops, plan, stride, eps, statistics, (len(params), len(maps))),
        x.contiguous(memory_format=torch.channels_last),
        weights.to(compute).contiguous(),
        *(p.to(x.dtype).contiguous() for p in params),
        *(m.to(x.dtype).contiguous(memory_format=torch.channels_last) for m in maps),
    )
    y = y.to(dtype)
    return MixedOpResult(y, None, None) if statistics is not None else MixedOpResult(y, batch_mean, batch_variance)


def check_norms(
    norms: int, eps: Sequence[float] | float, statistics: tuple[Tensor, Tensor] | None, out: tuple[int, int, int, int]
) -> list[float]:
    """Returns one eps for each of ``norms`` batch norms of maps of shape ``out``.

    Raises:
        ValueError: where eps or statistics do not fit, or the batch is too small to take statistics of.
    """
    eps = [float(eps)] * norms if isinstance(eps, (int, float)) else list(eps)
    if len(eps) != norms:
        raise ValueError(f"eps has {len(eps)} entries for {norms} batch norms")
    if statistics is not None and any(s.shape != (norms, out[1]) for s in statistics):
        raise ValueError(f"statistics must be two tensors of shape ({norms}, {out[1]}): one row a batch norm")
    if norms and statistics is None and out[0] * out[2] * out[3] == 1:
        raise ValueError(  # the words of torch's batch norm
            f"Expected more than 1 value per channel when training, got input size {torch.Size(out)}"
        )
    return eps


def mean_and_invstd(
    statistics: tuple[Tensor, Tensor], eps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the mean and 1 / sqrt(variance + eps) of given statistics, as the native ops take them."""
    mean, variance = (s.to(dtype) for s in statistics)
    invstd = torch.rsqrt(variance + torch.tensor(eps, dtype=dtype, device=mean.device)[:, None])
    return mean.contiguous(), invstd


def _check(
    x: Tensor,
    weights: Tensor,
    candidates: Sequence[Candidate],
    params: Sequence[Tensor],
    maps: Sequence[Tensor],
    stride: int,
) -> None:
    _common.check_tensors("x", [x])
    if x.dim() != 4:
        raise ValueError(f"x has {x.dim()} dimensions: expected (N, C, H, W)")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}: expected 1 or 2")
    if not candidates:
        raise ValueError("candidates is empty: expected at least one")
    _common.check_weights(weights, len(candidates), x)
    n, c, h, w = x.shape
    if stride == 2 and any(o.kind == "skip" for o in candidates):
        raise ValueError("a skip candidate returns its input, which stride 2 does not allow: pass it as a map")
    shapes = [s for o in candidates for s in o.shapes(c)]
    for name, tensors, expected in (
        ("params", params, shapes),
        ("maps", maps, [(n, c, -(-h // stride), -(-w // stride))] * sum(o.kind == "map" for o in candidates)),
    ):
        if len(tensors) != len(expected):
            raise ValueError(f"{name} has {len(tensors)} tensors but the candidates need {len(expected)}")
        for i, (t, shape) in enumerate(zip(tensors, expected, strict=True)):
            if tuple(t.shape) != shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}: expected {shape}")
            if t.device != x.device:
                raise ValueError(f"{name}[{i}] is on {t.device} but x is on {x.device}: move one of them")
            if t.dtype != x.dtype:
                raise ValueError(f"{name}[{i}] has dtype {t.dtype} but x has {x.dtype}: they must agree")


def _fake(
    x: Tensor,
    weights: Tensor,
    params: list[Tensor],
    maps: list[Tensor],
    plan: list[int],
    stride: int,
    eps: list[float],
    mean: Tensor | None,
    invstd: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape

    def out() -> Tensor:
        shape = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
        return x.new_empty(shape).contiguous(memory_format=torch.channels_last)

    def statistic() -> Tensor:
        return x.new_empty((len(eps) if mean is None else 0, c), dtype=_common.compute_dtype(x))

    return out(), [out() for _ in range(sum(plan[4::5]))], statistic(), statistic(), statistic()


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    params: list[Tensor],
    maps: list[Tensor],
    outs: list[Tensor],
    mean: Tensor,
    invstd: Tensor,
    plan: list[int],
    stride: int,
    training: bool,
    need_x: bool,
    need_params: bool,
    need_maps: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weights),
        [torch.empty_like(p) for p in params] if need_params else [],
        [torch.empty_like(m) for m in maps] if need_maps else [],
    )


_common.register_fakes({"mixed_op": _fake, "_mixed_op_backward": _fake_backward})
