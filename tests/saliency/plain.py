"""SynFlow's definition evaluated plainly: float64, every candidate by itself, nothing shared with fastnas' kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.nn.cells import Cell
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero


def conv(m: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight.detach().double().abs(), None, m.stride, m.padding, m.dilation, m.groups)


def linear(m: nn.Module, x: Tensor) -> Tensor:
    """A candidate, a preprocessing or a stem in absolute values, batch norm left out."""
    if isinstance(m, nn.Conv2d):
        return conv(m, x)
    if isinstance(m, (nn.BatchNorm2d, nn.ReLU, Identity, nn.Identity)):
        return x
    if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)):
        return m(x)
    if isinstance(m, Zero):
        return torch.zeros_like(x[:, :, :: m.stride, :: m.stride])
    if isinstance(m, FactorizedReduce):
        return torch.cat([conv(m.conv_1, x), conv(m.conv_2, x[:, :, 1:, 1:])], 1)
    if isinstance(m, (ReLUConvBN, DilConv, SepConv)):
        return linear(m.op, x)
    assert isinstance(m, nn.Sequential), type(m)
    for layer in m:
        x = linear(layer, x)
    return x


def mixed(m: MixedOp, x: Tensor, weights: Tensor) -> Tensor:
    assert m.k == 1
    return torch.stack([w * linear(op, x) for w, op in zip(weights, m._ops, strict=True)]).sum(0)


def darts_cell(cell: Cell, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    states = [linear(cell.preprocess0, s0), linear(cell.preprocess1, s1)]
    edge = 0
    for _ in range(cell._steps):
        node = []
        for j, state in enumerate(states):
            node.append(mixed(cell._ops[edge + j], state, weights[edge + j]))
        edge += len(states)
        states.append(torch.stack(node).sum(0))
    return torch.cat(states[-cell._multiplier :], 1)


def nasbench201_cell(cell: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    states, edge = [x], 0
    for _ in range(1, cell._nodes):
        ends = [mixed(cell._ops[edge + j], s, weights[edge + j]) for j, s in enumerate(states)]
        edge += len(ends)
        states.append(torch.stack(ends).sum(0))
    return states[-1]


def residual(block: nn.Module, x: Tensor) -> Tensor:
    return linear(block.downsample, x) + linear(block.conv_b, linear(block.conv_a, x))


def synflow(net: nn.Module, alphas: Mapping[str, Tensor], image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns R and |α ∂R/∂α| of DARTS' or NAS-Bench-201's supernet."""
    weights = {t: a.detach().double().abs().requires_grad_() for t, a in alphas.items()}
    x = linear(net.stem, torch.ones_like(image, dtype=torch.float64))
    if "normal" in weights:
        s0 = s1 = x
        for cell in net.cells:
            s0, s1 = s1, darts_cell(cell, s0, s1, weights["reduce" if cell.reduction else "normal"])
        x = s1
    else:
        for cell in net.cells:
            x = nasbench201_cell(cell, x, weights["cell"]) if hasattr(cell, "_ops") else residual(cell, x)
    r = (x.mean((2, 3)) @ net.classifier.weight.detach().double().abs().T).sum()
    gradients = torch.autograd.grad(r, list(weights.values()), materialize_grads=True)
    return r.detach(), {t: w.detach() * g for (t, w), g in zip(weights.items(), gradients, strict=True)}
