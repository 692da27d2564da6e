"""Networks of one block after another: the supernet and the final networks of NAS-Bench-Macro and ProxylessNAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from fastnas.genotype import ChainGenotype
from fastnas.nn._common import Between, check_choice, check_sizes
from fastnas.nn.checkpointing import run_cell
from fastnas.nn.mbconv import BLOCKS, InvertedResidual
from fastnas.nn.mixed_op import MixedOp, as_table
from fastnas.nn.operations import Zero


class Place(NamedTuple):
    """What a layer of a chain does to the shape of a feature map, whatever its block."""

    C_in: int
    C_out: int
    stride: int

    @property
    def same(self) -> bool:
        """Whether a map leaves it in the shape in which it came."""
        return self.C_in == self.C_out and self.stride == 1


@dataclass(frozen=True)
class Skeleton:
    """All of a chain but its choices.

    Attributes:
        stem: Channels of the 3x3 convolution that reads the images.
        stem_stride: Its stride.
        first: Channels of a fixed block after it, 3x3 without expansion; 0 for none.
        stages: (channels, layers, stride of the first) of each.
        head: Channels of the 1x1 convolution before the pooling.
        activation: ReLU or ReLU6, of stem and head.
        eps: Of all batch norms.
    """

    stem: int
    stem_stride: int
    first: int
    stages: tuple[tuple[int, int, int], ...]
    head: int
    activation: type[nn.Module] = nn.ReLU
    eps: float = 1e-5

    @property
    def places(self) -> tuple[Place, ...]:
        """The layers that are searched."""
        places: list[Place] = []
        C_in = self.first or self.stem
        for C, layers, stride in self.stages:
            places += [Place(C_in, C, stride), *[Place(C, C, 1)] * (layers - 1)]
            C_in = C
        return tuple(places)

    def scaled(self, channels: int, divisor: int) -> Skeleton:
        """Returns the skeleton whose stem has so many channels, and all else in proportion; the head never narrows.

        Args:
            channels: of the stem.
            divisor: what channels are multiples of, rounded as MobileNetV2's are: to the nearest, unless that is less
                than nine tenths.
        """
        factor = channels / self.stem

        def width(C: int) -> int:
            exact = C * factor
            rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
            return rounded if rounded >= 0.9 * exact else rounded + divisor

        return replace(
            self,
            stem=width(self.stem),
            first=width(self.first) if self.first else 0,
            stages=tuple((width(C), layers, stride) for C, layers, stride in self.stages),
            head=max(self.head, width(self.head)),
        )


class _Chain(nn.Module):
    """Stem, the searched layers, 1x1 convolution, global average pooling and a linear classifier.

    Modules are named as in the published code of NAS-Bench-Macro.
    """

    def __init__(
        self, skeleton: Skeleton, num_classes: int, in_channels: int, layer: Callable[[int, Place], nn.Module]
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        stem, activation = skeleton.stem, skeleton.activation
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, skeleton.stem_stride, 1, bias=False), nn.BatchNorm2d(stem), activation()
        )
        if skeleton.first:
            self.stem.append(InvertedResidual(stem, skeleton.first, 3, 1, 1, activation=activation))
        self.features = nn.ModuleList(layer(i, place) for i, place in enumerate(skeleton.places))
        C = skeleton.places[-1].C_out
        self.out = nn.Sequential(
            nn.Conv2d(C, skeleton.head, 1, bias=False),
            nn.BatchNorm2d(skeleton.head),
            activation(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(skeleton.head, num_classes)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = skeleton.eps

    def _logits(self, x: Tensor, run: Callable[[int, nn.Module, Tensor], Tensor], between: Between | None) -> Tensor:
        """Returns the logits; ``run`` is given the number of each layer, the layer, and what it reads."""
        x = self.stem(x)
        for i, layer in enumerate(self.features):
            x = run(i, layer, x)
            x = x if between is None else between((x,))[0]
        logits: Tensor = self.classifier(self.out(x).flatten(1))
        return logits


class ChainNetwork(_Chain):
    """The network that a genotype stands for, with affine batch norms.

    Args:
        genotype: the blocks.
        skeleton: everything else.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: where a size is below 1, a block is not known, or there are not as many as layers.
    """

    def __init__(
        self, genotype: ChainGenotype, skeleton: Skeleton, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        genotype.validate(BLOCKS)
        if len(genotype.ops) != len(skeleton.places):
            raise ValueError(
                f"genotype has {len(genotype.ops)} blocks: expected one for each of {len(skeleton.places)}"
            )
        super().__init__(*(skeleton, num_classes, in_channels), lambda i, place: BLOCKS[genotype.ops[i]](*place, True))
        self.genotype = genotype

    def forward(self, x: Tensor, *, between: Between | None = None) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images.
            between: as that of :class:`ChainSupernet`.
        """
        return self._logits(x, lambda i, layer, state: layer(state), between)


class ChainSupernet(_Chain):
    """The same with a MixedOp of all choices as each layer.

    Its one table of weights, ``"chain"``, is no part of the module: ``forward`` is given it. The batch norms of the
    choices have no weights and biases, as those of the other supernets here, so that no choice can change its scale but
    by its weight; those of stem and head do.

    Args:
        skeleton: everything but the choices.
        primitives: the choices of a layer, the columns of the table.
        num_classes: number of logits.
        in_channels: channels of the images.
        allowed: which of them each layer has, rows of one truth a primitive; the others are nothing. All where None.
        affine: whether the batch norms of the choices have weights and biases after all.
        checkpoint_cells: keep for the backward only what layers read, and run each once more there: less memory, more
            time. May be set at any time.

    Raises:
        ValueError: where a size is below 1, or a block is not known.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        primitives: Sequence[str],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        allowed: Sequence[Sequence[bool]] | None = None,
        affine: bool = False,
        checkpoint_cells: bool = False,
    ) -> None:
        def layer(i: int, place: Place) -> MixedOp:
            has = [True] * len(primitives) if allowed is None else allowed[i]
            builders = [BLOCKS.find(p) for p in primitives]
            return MixedOp(
                [
                    build(*place, affine) if here else Zero(place.stride)
                    for build, here in zip(builders, has, strict=True)
                ],
                place.stride,
            )

        super().__init__(skeleton, num_classes, in_channels, layer)
        self.checkpoint_cells = checkpoint_cells

    def forward(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        edge_weights: Mapping[str, Tensor] | None = None,
        *,
        path: Mapping[str, Sequence[int]] | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images.
            weights: what a relaxation makes of the alphas, (L, O) as ``"chain"``, one row a layer.
            edge_weights: factors of the layers' outputs, (L,) as ``"chain"``; all 1 where None.
            path: indices of choices, L as ``"chain"``: of each layer only that one is computed, times its weight, the
                only one that gets a gradient. All are computed where None.
            between: called after every layer with ``(x,)``, what the next one reads; returns what it reads instead.

        Raises:
            TypeError, ValueError: where a table is missing or has not one row a layer, or the path names no choice.
        """
        for name, tables in (("weights", weights), ("edge_weights", edge_weights), ("path", path)):
            if tables is not None and ("chain" not in tables or len(tables["chain"]) != len(self.features)):
                got = f"{len(tables['chain'])} rows" if "chain" in tables else "nothing"
                raise ValueError(
                    f"{name}['chain'] must have one row for each of {len(self.features)} layers, got {got}"
                )
        table = as_table(weights["chain"], x.device)
        if path is not None:
            for (_, i, op), choice in zip(self.mixed_ops(), path["chain"], strict=True):
                check_choice(f"path[{i}]", choice, table.shape[1])
                if type(op._ops[choice]) is Zero:
                    raise ValueError(f"path[{i}]={choice}: layer {i} does not have that choice, or has lost it")

        def run(i: int, layer: nn.Module, state: Tensor) -> Tensor:
            choice = None if path is None else path["chain"][i]
            y = run_cell(layer, state, table[i], choice, again=self.checkpoint_cells)
            return y if edge_weights is None else edge_weights["chain"][i] * y

        return self._logits(x, run, between)

    def mixed_ops(self) -> Iterator[tuple[str, int, MixedOp]]:
        """Yields ``"chain"``, the layer and its module."""
        for i, op in enumerate(self.features):
            assert isinstance(op, MixedOp)
            yield "chain", i, op
