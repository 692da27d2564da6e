"""A network as SynFlow sees it: absolute weights, no batch norm, no biases (arXiv:2006.05467, Eq. 2)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastnas.nn.batch_norm import special
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.nasbench201 import NASBench201Cell
from fastnas.nn.operations import Identity, ReLUConvBN, Zero
from fastnas.ops.abs_cell import AbsOp, abs_cell
from fastnas.ops.absolute import absolute_, restore_

_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, _InstanceNorm)


@contextmanager
def linearised(network: nn.Module) -> Iterator[None]:
    """Makes the network positively homogeneous in the block: θ becomes |θ|, batch norms pass on what they are given.

    Biases are left out, the classifier's too, and modules are in evaluation mode, so that dropout does nothing. On a
    non-negative input ReLU does nothing either, nor does ReLU6, which has no bound in the block, and a network of
    convolutions and average pools is linear.

    Afterwards, also where the block raises, every parameter, buffer and mode is what it was, bit for bit. Don't change
    the network in the block.

    Raises:
        ValueError: where the network has a norm of another kind, which would make it something else.
    """
    modules = list(network.modules())
    other = [type(m).__name__ for m in modules if isinstance(m, _OTHER_NORMS)]
    if other:
        raise ValueError(f"network has a {other[0]}: only batch norms can be left out, so that what remains is linear")
    training = [m for m in modules if m.__dict__["training"]]
    norms = [m for m in modules if isinstance(m, _BatchNorm)]
    bounded = [m for m in modules if isinstance(m, nn.ReLU6)]
    kept = [(n.eps, dict(n._buffers)) for n in norms]
    # a norm's weight and everybody's bias
    left_out = [(n._parameters, "weight", n._parameters["weight"]) for n in norms]
    left_out += [(m._parameters, "bias", m._parameters["bias"]) for m in modules if "bias" in m._parameters]
    left_out = [entry for entry in left_out if entry[2] is not None]
    cells = [(m, fused) for m in modules if type(m) is NASBench201Cell and (fused := _fused(m)) is not None]
    unit: dict[int, dict[str, Tensor | None]] = {}
    signs: Tensor | None = None
    parameters: list[Tensor] = []
    try:
        # straight into the dicts: a DARTS supernet has 5,000 modules
        for m in training:
            m.__dict__["training"] = False
        for owner, name, _ in left_out:
            owner[name] = None
        for m in bounded:
            m.__dict__["max_val"] = math.inf
        like = next(network.parameters(), torch.empty(0))
        for n in norms:
            if n.num_features not in unit:
                zeros = torch.zeros(n.num_features, dtype=like.dtype, device=like.device)
                unit[n.num_features] = {"running_mean": zeros, "running_var": torch.ones_like(zeros)}
            n.__dict__["eps"] = 0.0
            n._buffers.update(unit[n.num_features])
        for cell, fused in cells:
            cell.__dict__["forward"] = fused
        parameters = [p.detach() for p in {p: None for m in modules for p in m._parameters.values() if p is not None}]
        signs = absolute_(parameters)
        yield
    finally:
        if signs is not None:
            restore_(parameters, signs)
        for cell, _ in cells:
            cell.__dict__.pop("forward", None)
        for n, (eps, buffers) in zip(norms, kept, strict=True):
            n.__dict__["eps"] = eps
            n._buffers.update(buffers)
        for owner, name, value in left_out:
            owner[name] = value
        for m in bounded:
            m.__dict__["max_val"] = 6.0
        for m in training:
            m.__dict__["training"] = True


def _fused(cell: NASBench201Cell) -> Callable[..., Tensor] | None:
    """Returns the linear forward of a cell as one op; None where that is not what its candidates compute."""
    known: list[list[AbsOp]] = []
    kernels: list[Tensor] = []
    for edge in cell._ops:
        if type(edge) is not MixedOp or edge.k != 1 or special(edge):
            return None
        known.append([])
        for candidate in edge._ops:
            op, kernel = _abs_op(candidate)
            if op is None:
                return None
            known[-1].append(op)
            kernels += [] if kernel is None else [kernel]
    if special(cell) or any(ops != known[0] for ops in known):
        return None

    def forward(x: Tensor, weights: Tensor, *more: Any) -> Tensor:
        if any(m is not None for m in more):
            return type(cell).forward(cell, x, weights, *more)
        return abs_cell(x, weights, known[0], kernels)

    return forward


def _abs_op(candidate: nn.Module) -> tuple[AbsOp | None, Tensor | None]:
    """Returns what the op calls a candidate, and its kernel where it has one; None where it knows no such candidate."""
    if special(candidate):
        return None, None
    if type(candidate) is Zero:
        return "none", None
    if type(candidate) is Identity:
        return "skip", None
    if type(candidate) is nn.AvgPool2d and _is_average(candidate):
        return "avg_pool_3x3", None
    if type(candidate) is ReLUConvBN and type(candidate.op) is nn.Sequential and len(candidate.op) == 3:
        relu, conv, norm = candidate.op
        plain = type(relu) is nn.ReLU and isinstance(norm, _BatchNorm) and not any(map(special, candidate.op))
        if plain and type(conv) is nn.Conv2d and conv.padding_mode == "zeros":
            shape = (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups)
            if shape == ((1, 1), (0, 0), (1, 1), (1, 1), 1):
                return "conv_1x1", conv.weight
            if shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1):
                return "conv_3x3", conv.weight
    return None, None


def _is_average(pool: nn.AvgPool2d) -> bool:
    """Whether it is the 3x3 pool of stride 1 that does not count its padding."""
    sizes = [v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride, pool.padding)]
    return (
        sizes == [(3, 3), (1, 1), (1, 1)]
        and not pool.ceil_mode
        and not pool.count_include_pad
        and pool.divisor_override is None
    )


class Rescale:
    """Divides the states between two cells by a power of two that brings the newest below 1, and keeps its logarithm.

    A linearised network is positively homogeneous in the states that a cell reads, so this changes its output by the
    factor ``exp(log)`` and no more, and by no rounding; float32 then neither overflows nor goes denormal at any depth,
    as long as a single cell stays in its range.
    """

    def __init__(self) -> None:
        self.log: Tensor | float = 0.0

    def __call__(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns the states divided by one power of two; the last one is the newest."""
        exponent = torch.frexp(states[-1].detach().amax())[1].clamp(-126, 126)
        self.log = self.log + exponent.double() * math.log(2)
        factor = torch.ldexp(torch.ones_like(exponent, dtype=states[-1].dtype), -exponent)
        return tuple(s * factor for s in states)


def rescalable(network: nn.Module) -> bool:
    """Tells whether ``network.forward`` has an argument ``between``, a function of the states between its cells."""
    return "between" in inspect.signature(network.forward).parameters


def in_range(network: nn.Module) -> nn.Module:
    """Returns a network whose linearised pass keeps within its floats' range.

    That is the network itself where it can be rescaled between its cells, else a copy in float64, which reaches 1e308.

    Raises:
        ValueError: where the network has no parameters.
    """
    if next(network.parameters(), None) is None:
        raise ValueError("network has no parameters: SynFlow says how much flows through them")
    return network if rescalable(network) else copy.deepcopy(network).double()
