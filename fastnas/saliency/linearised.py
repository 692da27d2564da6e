"""A network as SynFlow sees it: absolute weights, no batch norm, no biases (arXiv:2006.05467, Eq. 2)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def linearised(network: nn.Module) -> Iterator[None]:
    """Makes the network positively homogeneous in the block: θ becomes |θ|, batch norms pass on what they are given.

    Biases are left out, the classifier's too, and modules are in evaluation mode, so that dropout does nothing. On a
    non-negative input ReLU does nothing either, and a network of convolutions and average pools is linear.

    Afterwards, also where the block raises, every parameter, buffer and mode is what it was, bit for bit. Don't change
    the network in the block.
    """
    modules = list(network.modules())
    modes = [m.training for m in modules]
    norms = [m for m in modules if isinstance(m, _BatchNorm)]
    biased = [m for m in modules if m._parameters.get("bias") is not None]
    biases = [m._parameters["bias"] for m in biased]
    kept = [(n.eps, n.weight, n.running_mean, n.running_var) for n in norms]
    unit: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
    signs: list[Tensor] | None = None
    parameters: list[Tensor] = []
    try:
        for m in modules:
            m.training = False
        for m in biased:
            m.register_parameter("bias", None)
        like = next(network.parameters(), torch.empty(0))
        for n in norms:
            key = (n.num_features, like.dtype, like.device)
            if key not in unit:
                zeros = torch.zeros(n.num_features, dtype=like.dtype, device=like.device)
                unit[key] = (zeros, torch.ones_like(zeros))
            n.eps = 0.0
            n.register_parameter("weight", None)
            n.running_mean, n.running_var = unit[key]
        parameters = [p.detach() for p in network.parameters()]
        signs = [torch.signbit(p) for p in parameters]
        torch._foreach_abs_(parameters)
        yield
    finally:
        if signs is not None:
            for p, negative in zip(parameters, signs, strict=True):
                p.copy_(torch.where(negative, -p, p))
        for n, (eps, weight, mean, var) in zip(norms, kept, strict=True):
            n.register_parameter("weight", weight)
            n.eps, n.running_mean, n.running_var = eps, mean, var
        for m, bias in zip(biased, biases, strict=True):
            m.register_parameter("bias", bias)
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode


class Rescale:
    """Divides the states between two cells by a power of two that brings the newest below 1, and keeps its logarithm.

    A linearised network is positively homogeneous in the states that a cell reads, so this changes its output by the
    factor ``exp(log)`` and no more, and by no rounding; float32 then neither overflows nor goes denormal at any depth.
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
    """
    return network if rescalable(network) else copy.deepcopy(network).double()
