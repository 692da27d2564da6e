"""The network that a genotype of the DARTS space stands for (arXiv:1806.09055, section 3.2 and appendix A.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnas.genotype import Genotype
from fastnas.nn._common import check_sizes
from fastnas.nn.folded_cell import FoldedCell
from fastnas.nn.operations import OPS, FactorizedReduce, Identity, ReLUConvBN
from fastnas.nn.stems import Stem, check_stem, cifar_stem, imagenet_stems


class DerivedCell(nn.Module):
    """A cell of a genotype: node i = 2, 3, ... is the sum of its two kept edges. Norms are affine.

    Args:
        genotype: of which the normal or the reduction cell is built.
        C_prev_prev: channels of the cell before the previous one.
        C_prev: channels of the previous cell.
        C: channels of every state; the output has ``multiplier * C``.
        reduction: halve height and width: the edges from state 0 and 1 have stride 2.
        reduction_prev: the previous cell was a reduction, so that its predecessor's output is twice as large.
    """

    _folded: FoldedCell | None = None  # of cells that were pickled whole before there was one

    def __init__(
        self, genotype: Genotype, C_prev_prev: int, C_prev: int, C: int, reduction: bool, reduction_prev: bool
    ) -> None:
        super().__init__()
        self.preprocess0: nn.Module
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        self.reduction = reduction
        edges = genotype.reduce if reduction else genotype.normal
        self._concat = tuple(genotype.reduce_concat if reduction else genotype.normal_concat)
        self._inputs = tuple(j for _, j in edges)
        strides = [2 if reduction and j < 2 else 1 for _, j in edges]
        self._ops = nn.ModuleList(OPS[op](C, s, True) for (op, _), s in zip(edges, strides, strict=True))
        wiring = [(j, 2 + i // 2, s) for i, ((_, j), s) in enumerate(zip(edges, strides, strict=True))]
        self._folded = FoldedCell(wiring, 2, self._concat)

    @property
    def multiplier(self) -> int:
        """Number of states that are concatenated to the output."""
        return len(self._concat)

    def forward(self, s0: Tensor, s1: Tensor, drop_path: float = 0.0) -> Tensor:
        """Returns the cell's output, (N, multiplier * C, H, W), or (N, multiplier * C, H / 2, W / 2) of a reduction.

        Args:
            s0: output of the cell before the previous one.
            s1: output of the previous cell.
            drop_path: in training, the probability with which an image loses an edge that is not the identity.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        if self._folded is not None and not self.training:
            folded = self._folded.run(self._ops, states)  # type: ignore[arg-type]
            if folded is not None:
                return folded
        ends: list[Tensor] = []
        for op, j in zip(self._ops, self._inputs, strict=True):
            y = op(states[j])
            if self.training and drop_path > 0 and not isinstance(op, Identity):
                y = _drop_path(y, drop_path)
            ends.append(y)
            if len(ends) == 2:
                states.append(ends[0] + ends[1])
                ends = []
        return torch.cat([states[i] for i in self._concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier that reads the first cell after two reductions, in training.

    Args:
        C: channels that it reads.
        num_classes: number of logits.
        stem: of the network. For ``imagenet`` the pool has stride 2 and the last norm is missing, as in the paper's
            experiments.
    """

    def __init__(self, C: int, num_classes: int, stem: Stem) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=2 if imagenet else 3, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([] if imagenet else [nn.BatchNorm2d(768)]),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, num_classes) from (N, C, 8, 8), for ``imagenet`` from (N, C, 7, 7)."""
        y: Tensor = self.classifier(self.features(x).flatten(1))
        return y


class Logits(NamedTuple):
    """What a network with an auxiliary head returns in training: two classifiers' logits, (N, num_classes) each."""

    logits: Tensor
    auxiliary: Tensor


class Network(nn.Module):
    """Stem, ``layers`` cells of a genotype, global average pooling and a linear classifier, to be trained from scratch.

    DARTS' ``NetworkCIFAR``, or ``NetworkImageNet`` with ``stem="imagenet"``, with its parameters' names. Cells
    ``layers // 3`` and ``2 * layers // 3`` are reductions: they halve height and width and double the channels.

    Args:
        genotype: the cells.
        channels: channels of the first cells' states.
        layers: number of cells.
        num_classes: number of logits.
        in_channels: channels of the images.
        stem: ``cifar`` for images such as 32x32, ``imagenet`` for those such as 224x224.
        auxiliary: add the auxiliary head. The cell that it reads must be 8x8 (for ``imagenet`` 7x7), as it is with
            images of 32x32 (224x224).
        drop_path: see the attribute.

    Attributes:
        drop_path: In training, the probability with which an image loses an edge that is not the identity; the others
            are scaled up accordingly (arXiv:1605.07648). It may be changed from epoch to epoch.

    Raises:
        ValueError: where the genotype describes no architecture or has an unknown operation, or another argument does
            not fit.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 36,
        layers: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        stem: Stem = "cifar",
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, layers=layers, num_classes=num_classes, in_channels=in_channels)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} must be a probability below 1")
        check_stem(stem, channels)
        genotype = genotype.validate(OPS)
        self.genotype = genotype
        self.drop_path = drop_path
        if stem == "cifar":
            C_prev_prev = C_prev = 3 * channels
            self.stem = cifar_stem(in_channels, C_prev)
        else:
            C_prev_prev = C_prev = channels
            self.stem0, self.stem1 = imagenet_stems(in_channels, channels)
        C, reduction_prev = channels, stem == "imagenet"
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                C *= 2
            cell = DerivedCell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, cell.multiplier * C
            if auxiliary and i == 2 * layers // 3:
                self.auxiliary_head = AuxiliaryHead(C_prev, num_classes, stem)
        self._stem: Stem = stem
        self._auxiliary_at = 2 * layers // 3 if auxiliary else None
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x: Tensor) -> Tensor | Logits:
        """Returns the logits, (N, num_classes); with an auxiliary head, in training, both classifiers'.

        Args:
            x: (N, in_channels, H, W) images; H and W are multiples of 4, for ``imagenet`` of 32.

        Raises:
            ValueError: where the images cannot be halved that often, or do not fit the auxiliary head.
        """
        if self._stem == "cifar":
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        auxiliary: Tensor | None = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path)
            if i == self._auxiliary_at and self.training:
                size = (8, 8) if self._stem == "cifar" else (7, 7)
                if tuple(s1.shape[2:]) != size:
                    raise ValueError(
                        f"the auxiliary head reads maps of {size}, got {tuple(s1.shape[2:])}: give images of "
                        f"{'32x32' if self._stem == 'cifar' else '224x224'}, or build the network without it"
                    )
                auxiliary = self.auxiliary_head(s1)
        logits: Tensor = self.classifier(self.global_pooling(s1).flatten(1))
        return logits if auxiliary is None else Logits(logits, auxiliary)


def _drop_path(x: Tensor, probability: float) -> Tensor:
    """Returns x with each image zeroed with this probability, and scaled so that the mean stays."""
    keep = 1 - probability
    return x * (torch.rand(len(x), 1, 1, 1, device=x.device) < keep).to(x.dtype).div_(keep)
