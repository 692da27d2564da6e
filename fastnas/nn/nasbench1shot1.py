"""The supernet of NAS-Bench-1Shot1 (arXiv:2001.10422) and the networks of NAS-Bench-101 (arXiv:1902.09635)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastnas.genotype import OneShotGenotype
from fastnas.nn._common import Between, check_primitives, check_sizes
from fastnas.nn.mixed_op import MixedOp, as_table
from fastnas.nn.operations import OPS, ReLUConvBN, primitive
from fastnas.ops.mixed_sum import mixed_sum

NASBENCH1SHOT1_PRIMITIVES: tuple[str, ...] = ("maxpool3x3", "conv3x3-bn-relu", "conv1x1-bn-relu")
"""The three candidates of a node, in the published order (the columns of the alphas ``"ops"``)."""


class ConvBNReLU(nn.Module):
    """Convolution that keeps height and width, batch norm, ReLU."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.Conv2d(C_in, C_out, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H, W) from (N, C_in, H, W)."""
        y: Tensor = self.op(x)
        return y


@primitive("maxpool3x3")
def _maxpool3x3(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride=stride, padding=1)


@primitive("conv3x3-bn-relu")
def _conv3x3_bn_relu(C: int, stride: int, affine: bool) -> nn.Module:
    _only_stride_1("conv3x3-bn-relu", stride)
    return ConvBNReLU(C, C, 3, affine)


@primitive("conv1x1-bn-relu")
def _conv1x1_bn_relu(C: int, stride: int, affine: bool) -> nn.Module:
    _only_stride_1("conv1x1-bn-relu", stride)
    return ConvBNReLU(C, C, 1, affine)


def _only_stride_1(name: str, stride: int) -> None:
    if stride != 1:
        raise ValueError(f"{name} with stride {stride}: cells of NAS-Bench-101 have stride 1 only")


class ChoiceBlockCell(nn.Module):
    """A search cell: node i is a MixedOp of the weighted sum of all nodes before it.

    Node 0, the cell's input, is projected anew by a 1x1 convolution for every node that reads it. The output
    concatenates all nodes, each times its weight, the projected input first.

    Args:
        choices: for each node and, last, for the output, whether its inputs are chosen, that is, weighted.
        C_in: channels of the input.
        C: channels of every node; the output has ``C`` times their number, the input included.
        primitives: the candidates of a node.
    """

    def __init__(self, choices: Sequence[bool], C_in: int, C: int, primitives: Sequence[str]) -> None:
        super().__init__()
        self._choices = tuple(choices)
        steps = len(choices) - 1
        # the published cell has affine norms within the candidates, too
        self._choice_blocks = nn.ModuleList(MixedOp([OPS[p](C, 1, True) for p in primitives]) for _ in range(steps))
        self._input_projections = nn.ModuleList(ConvBNReLU(C_in, C, 1) for _ in range(steps + 1))

    def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns the output, (N, (steps + 1) * C, H, W), from (N, C_in, H, W); weights as the supernet's."""
        ops = as_table(weights["ops"], x.device)
        states: list[Tensor] = []
        for n, block in enumerate(self._choice_blocks):
            read = [self._input_projections[n](x), *states]
            if self._choices[n]:
                read = [mixed_sum(read, weights[f"inputs-{n + 1}"][0])]
            states.append(block(functools.reduce(operator.add, read), ops[n]))
        states.insert(0, self._input_projections[-1](x))
        if self._choices[-1]:
            factors = weights["output"][0]
            states = [factors[n] * state for n, state in enumerate(states)]
        return torch.cat(states, dim=1)


class OneShotSupernet(nn.Module):
    """Stem, ``layers`` search cells, a 1x1 convolution, global average pooling and a linear classifier.

    Before cells ``layers // 3`` and ``2 * layers // 3`` a 2x2 max pool with a padding of 1 halves height and width
    (32, 17, 9), and the channels double. Architecture parameters are no part of the module.

    Args:
        choices: for each node and, last, for the output, whether its inputs are weighted.
        channels: channels of the first cells' nodes.
        layers: number of cells.
        num_classes: number of logits.
        in_channels: channels of the images.
        primitives: the candidates of a node.
        bn_momentum: of the norms within the cells and the stem. The default is the published code's: it took
            TensorFlow's number for NAS-Bench-101, which torch reads the other way round, so that running statistics
            are those of the last batch.

    Raises:
        ValueError: where a size is below 1, or a primitive is not known.
    """

    def __init__(
        self,
        choices: Sequence[bool],
        channels: int = 16,
        layers: int = 9,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        primitives: Sequence[str] = NASBENCH1SHOT1_PRIMITIVES,
        bn_momentum: float = 0.997,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, layers=layers, num_classes=num_classes, in_channels=in_channels)
        check_primitives(primitives)
        self.stem = ConvBNReLU(in_channels, channels, 3)
        self.cells = nn.ModuleList()
        self._pooled = (layers // 3, 2 * layers // 3)
        C_prev, C = channels, channels
        for i in range(layers):
            if i in self._pooled:
                C *= 2
            self.cells.append(ChoiceBlockCell(choices, C_prev, C, primitives))
            C_prev = len(choices) * C
        _set_momentum(self, bn_momentum)
        self.pool = nn.MaxPool2d(2, stride=2, padding=1)
        self.postprocess = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C, num_classes)
        steps = len(choices) - 1
        self._shapes = {"ops": (steps, len(primitives))}
        self._shapes |= {f"inputs-{n + 1}": (1, n + 1) for n in range(steps) if choices[n]}
        if choices[-1]:
            self._shapes["output"] = (1, steps + 1)

    def forward(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        *,
        between: Between | None = None,
    ) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images.
            weights: what a relaxation makes of the alphas: ``"ops"``, one row a node; for each node i whose inputs are
                chosen ``"inputs-<i>"``, (1, i), one column a node before it; and ``"output"``, (1, steps + 1).
            between: called after every cell with ``(x,)``, what the next one reads; returns what it reads instead.

        Raises:
            ValueError: where a table of weights is missing or has another shape.
        """
        for name, shape in self._shapes.items():
            if name not in weights or tuple(weights[name].shape) != shape:
                got = tuple(weights[name].shape) if name in weights else "nothing"
                raise ValueError(f"weights[{name!r}] must have shape {shape}, got {got}")
        x = self.stem(x)
        for i, cell in enumerate(self.cells):
            if i in self._pooled:
                x = self.pool(x)
            x = cell(x, weights)
            if between is not None:
                (x,) = between((x,))
        logits: Tensor = self.classifier(self.global_pooling(self.postprocess(x)).flatten(1))
        return logits


class NASBench101Cell(nn.Module):
    """A cell of one operation a node.

    The nodes that the output reads are concatenated and share its channels, those before them have as many as they are
    read for. Whoever reads the input reads its projection by a 1x1 convolution, which the output adds.

    Args:
        genotype: the cell; nodes that the output does not depend on are left out.
        C_in: channels of the input.
        C_out: channels of the output.
    """

    def __init__(self, genotype: OneShotGenotype, C_in: int, C_out: int) -> None:
        super().__init__()
        genotype = genotype.pruned().validate(OPS)
        self.genotype = genotype
        self.channels = vertex_channels(genotype, C_out)
        self.ops = nn.ModuleList(OPS[op](C, 1, True) for op, C in zip(genotype.ops, self.channels, strict=False))
        self.projections = nn.ModuleDict(
            {str(n): ConvBNReLU(C_in, self.channels[n], 1) for n, nodes in enumerate(genotype.inputs) if 0 in nodes}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H, W) from (N, C_in, H, W)."""
        states = [x]
        for n, op in enumerate(self.ops):
            # a division with a remainder gives some nodes one channel more than what reads them
            read = [states[j][:, : self.channels[n]] for j in self.genotype.inputs[n] if j]
            if str(n) in self.projections:
                read.append(self.projections[str(n)](x))
            states.append(op(functools.reduce(operator.add, read)))
        ends = [states[j] for j in self.genotype.inputs[-1] if j]
        last = str(len(self.ops))
        if not ends:
            y: Tensor = self.projections[last](x)
            return y
        y = torch.cat(ends, dim=1)
        return y + self.projections[last](x) if last in self.projections else y


class NASBench101Network(nn.Module):
    """The network of a cell as NAS-Bench-101 trained it: stem, ``layers`` cells, average pooling, a linear classifier.

    Before cells ``layers // 3`` and ``2 * layers // 3`` a 2x2 max pool halves height and width, and channels double.

    Args:
        genotype: the cell.
        channels: channels of the stem and of the first cells.
        layers: number of cells.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: where a size is below 1, the cell has an unknown operation or more ends than channels.
    """

    def __init__(
        self,
        genotype: OneShotGenotype,
        channels: int = 128,
        layers: int = 9,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, layers=layers, num_classes=num_classes, in_channels=in_channels)
        self.genotype = genotype
        self.stem = ConvBNReLU(in_channels, channels, 3)
        self.cells = nn.ModuleList()
        self._pooled = (layers // 3, 2 * layers // 3)
        C_prev, C = channels, channels
        for i in range(layers):
            if i in self._pooled:
                C *= 2
            self.cells.append(NASBench101Cell(genotype, C_prev, C))
            C_prev = C
        _set_momentum(self, 0.003)  # 0.997 in TensorFlow's sense
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, (N, num_classes), from images (N, in_channels, H, W)."""
        x = self.stem(x)
        for i, cell in enumerate(self.cells):
            x = cell(self.pool(x) if i in self._pooled else x)
        logits: Tensor = self.classifier(self.global_pooling(x).flatten(1))
        return logits


def vertex_channels(genotype: OneShotGenotype, C_out: int) -> tuple[int, ...]:
    """Returns the channels of a cell's nodes and, last, of its output.

    The nodes that the output reads divide its channels among them, the first ones get the remainder; another node has
    as many channels as the widest that reads it.

    Args:
        genotype: the cell, :meth:`~fastnas.genotype.OneShotGenotype.pruned`.
        C_out: channels of the output.

    Raises:
        ValueError: where the output reads more nodes than it has channels.
    """
    ends = [j for j in genotype.inputs[-1] if j]
    if len(ends) > C_out:
        raise ValueError(f"the output of {genotype.to_text()} reads {len(ends)} nodes: {C_out} channels are too few")
    steps = len(genotype.ops)
    channels = [0] * steps + [C_out]
    for n, j in enumerate(ends):
        channels[j - 1] = C_out // len(ends) + (n < C_out % len(ends))
    for j in range(steps, 0, -1):
        if j not in ends:
            channels[j - 1] = max(channels[i - 1] for i in range(j + 1, steps + 1) if j in genotype.inputs[i - 1])
    return tuple(channels)


def _set_momentum(net: nn.Module, momentum: float) -> None:
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
