"""What fastnas is compared with: plain PyTorch, as the definitions read.

DARTS (arXiv:1806.09055), PC-DARTS (arXiv:1907.05737) and NAS-Bench-201's supernet (arXiv:2001.00326); SynFlow on α
(FreeDARTS, arXiv:2106.11542).

Nothing here uses fastnas. Submodules carry the names of DARTS' code, so one state dict fits both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NASBENCH201 = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def norm(C: int) -> nn.Module:
    return nn.BatchNorm2d(C, affine=False)


def separable(C: int, kernel: int, stride: int, dilation: int = 1) -> list[nn.Module]:
    """ReLU, depthwise, pointwise, batch norm."""
    pad = dilation * (kernel - 1) // 2
    depthwise = nn.Conv2d(C, C, kernel, stride, pad, dilation, groups=C, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(C, C, 1, bias=False), norm(C)]


class Op(nn.Module):
    """Layers in a row, named ``op`` as in DARTS."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def dense(C_in: int, C_out: int, kernel: int, stride: int = 1, affine: bool = False) -> Op:
    """ReLU, convolution, batch norm."""
    conv = nn.Conv2d(C_in, C_out, kernel, stride, kernel // 2, bias=False)
    return Op(nn.ReLU(), conv, nn.BatchNorm2d(C_out, affine=affine))


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class FactorizedReduce(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, 2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, 2, bias=False)
        self.bn = norm(C_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], 1))


def candidate(name: str, C: int, stride: int) -> nn.Module:
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), norm(C))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm(C))
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(C, C)
    kernel = int(name[-1])
    if name.startswith("nor_conv"):
        return dense(C, C, kernel, stride)
    if name.startswith("dil"):
        return Op(*separable(C, kernel, stride, 2))
    return Op(*separable(C, kernel, stride), *separable(C, kernel, 1))


def mixed_sum(xs: list[Tensor], weights: Tensor) -> Tensor:
    return sum(w * x for w, x in zip(weights, xs, strict=True))


def shuffled(mixed: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
    """PC-DARTS' (arXiv:1907.05737) end of an edge: ``x`` bypasses the candidates, and channels are shuffled."""
    bypass = x[:, x.shape[1] // k :]
    y = torch.cat([mixed, F.max_pool2d(bypass, 2, 2) if stride == 2 else bypass], 1)
    n, c, h, w = y.shape
    return y.view(n, k, c // k, h, w).transpose(1, 2).reshape(n, c, h, w)


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int, k: int = 1, primitives: Sequence[str] = PRIMITIVES) -> None:
        super().__init__()
        self.stride, self.k = stride, k
        self._ops = nn.ModuleList(candidate(name, C // k, stride) for name in primitives)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        active = x[:, : x.shape[1] // self.k]
        y = sum(w * op(active) for w, op in zip(weights, self._ops, strict=True))
        return shuffled(y, x, self.k, self.stride) if self.k > 1 else y


class Cell(nn.Module):
    def __init__(
        self,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
        k: int = 1,
        steps: int = 4,
        primitives: Sequence[str] = PRIMITIVES,
    ) -> None:
        super().__init__()
        self.reduction, self.steps = reduction, steps
        self.preprocess0 = FactorizedReduce(C_prev_prev, C) if reduction_prev else dense(C_prev_prev, C, 1)
        self.preprocess1 = dense(C_prev, C, 1)
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and j < 2 else 1, k, primitives) for i in range(steps) for j in range(2 + i)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, edge_weights: Tensor | None = None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self.steps):
            ends = [self._ops[edge + j](h, weights[edge + j]) for j, h in enumerate(states)]
            if edge_weights is not None:
                ends = [edge_weights[edge + j] * y for j, y in enumerate(ends)]
            states.append(sum(ends))
            edge += len(ends)
        return torch.cat(states[2:], 1)


class Supernet(nn.Module):
    def __init__(
        self,
        channels: int,
        layers: int,
        num_classes: int = 10,
        *,
        k: int = 1,
        steps: int = 4,
        primitives: Sequence[str] = PRIMITIVES,
        stem: str = "cifar",
    ) -> None:
        super().__init__()
        C, width = channels, 3 * channels if stem == "cifar" else channels
        if stem == "cifar":
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        else:
            half = [nn.Conv2d(3, C // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(C // 2), nn.ReLU()]
            self.stem0 = nn.Sequential(*half, nn.Conv2d(C // 2, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
            self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, reduction_prev = width, width, stem == "imagenet"
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            self.cells.append(Cell(C_prev_prev, C_prev, C, reduction, reduction_prev, k, steps, primitives))
            C_prev_prev, C_prev, reduction_prev = C_prev, steps * C, reduction
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(
        self, x: Tensor, weights: Mapping[str, Tensor], edge_weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        s0 = self.stem(x) if hasattr(self, "stem") else self.stem0(x)
        s1 = s0 if hasattr(self, "stem") else self.stem1(s0)
        for cell in self.cells:
            name = "reduce" if cell.reduction else "normal"
            s0, s1 = s1, cell(s0, s1, weights[name], edge_weights[name] if edge_weights else None)
        return self.classifier(s1.mean((2, 3)))


class NASBench201MixedOp(MixedOp):
    def __init__(self, C: int) -> None:
        super().__init__(C, 1, 1, NASBENCH201)
        self._ops[4] = self._ops[4][0]  # its average pool has no batch norm


class NASBench201Cell(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(NASBench201MixedOp(C) for _ in range(6))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        states = [x]
        for first in (0, 1, 3):  # the edges into a node are 0; 1, 2; 3, 4, 5
            states.append(sum(self._ops[first + j](h, weights[first + j]) for j, h in enumerate(states)))
        return states[3]


class Residual(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a, self.conv_b = dense(C_in, C_out, 3, 2, affine=True), dense(C_out, C_out, 3, affine=True)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class NASBench201Supernet(nn.Module):
    def __init__(self, channels: int, cells: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        for stage in range(3):
            C = channels * 2**stage
            if stage:
                self.cells.append(Residual(C // 2, C))
            self.cells.extend(NASBench201Cell(C) for _ in range(cells))
        self.lastact = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
        self.classifier = nn.Linear(C, num_classes)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, weights) if isinstance(cell, NASBench201Cell) else cell(x)
        return self.classifier(self.lastact(x).mean((2, 3)))


class SynFlow:
    """R = 1ᵀ Π |W(θ, α)| 1 and |α ∂R/∂α| of a supernet, in float64: no batch norm, no bias, an image of ones."""

    def __init__(self, net: nn.Module) -> None:
        self.net = copy.deepcopy(net).double()
        for module in list(self.net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        self.net.classifier.bias = None
        self.layers = [m for m in self.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def draw(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()

    def __call__(self, weights: Mapping[str, Tensor] | Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.abs_()
        tables = weights if isinstance(weights, Mapping) else {"": weights}
        leaves = {name: w.detach().double().abs().requires_grad_() for name, w in tables.items()}
        ones = torch.ones_like(x, dtype=torch.float64)
        r = self.net(ones, leaves if isinstance(weights, Mapping) else leaves[""]).sum()
        gradients = torch.autograd.grad(r, list(leaves.values()))
        return r.detach(), [w.detach() * g for w, g in zip(leaves.values(), gradients, strict=True)]
