"""Spaces of chains: one block after another, each layer with a choice of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.genotype import AnyGenotype, ChainGenotype
from fastnas.nn.chain import ChainNetwork, ChainSupernet, Skeleton
from fastnas.nn.mbconv import BLOCKS
from fastnas.spaces._tables import checked, choose, draw, one_hot, only_all_channels


@dataclass(frozen=True)
class ChainSpace:
    """A skeleton and the blocks that each of its layers chooses among.

    Layer i is the edge (i + 1, i). Where a layer changes the shape of its input, ``skip_connect`` is a projection, or
    not allowed.

    Attributes:
        name: What ``get_space`` finds it by.
        primitives: The choices of a layer: the columns of alphas.
        skeleton: Everything else, in its published sizes.
        projections: Whether layers that change the shape may skip.
        divisor: What channels of other sizes are multiples of.
    """

    name: str
    primitives: tuple[str, ...]
    skeleton: Skeleton
    projections: bool = True
    divisor: int = 1

    def __post_init__(self) -> None:
        unknown = [p for p in self.primitives if p not in BLOCKS]
        if unknown:
            raise ValueError(f"primitives: {', '.join(unknown)} unknown: register them with fastnas.nn.block")
        if len(set(self.primitives)) != len(self.primitives) or not all(map(any, self._rows())):
            raise ValueError(f"primitives must be different names, one of them for every layer, got {self.primitives}")

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The one key of alphas, weights and scores."""
        return ("chain",)

    @property
    def layers(self) -> int:
        """Number of layers with a choice: the rows of alphas."""
        return len(self.skeleton.places)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The layers as edges (1, 0), (2, 1), ...: the rows of alphas."""
        return tuple((i + 1, i) for i in range(self.layers))

    @property
    def allowed(self) -> dict[str, Tensor]:
        """Which choices each layer has, bool (L, O) as ``"chain"``."""
        return {"chain": torch.tensor(self._rows())}

    def init_alphas(
        self,
        generator: torch.Generator | None = None,
        scale: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Returns normal alphas of standard deviation ``scale``, (L, O) as ``"chain"``, that require grad.

        They are drawn on the generator's device (the CPU where there is none) and then moved, so that a seed gives the
        same alphas on every device. Those of choices that are not allowed mean nothing.
        """
        return draw({"chain": (self.layers, len(self.primitives))}, generator, scale, device)

    def supernet(
        self,
        channels: int | None = None,
        layers: int | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
        k: int = 1,
    ) -> ChainSupernet:
        """Returns the over-parameterised network.

        Args:
            channels: channels of the stem, all others in proportion; the published ones where None.
            layers: there is but one number of them.
            num_classes: number of logits.
            in_channels: channels of the images.
            k: there are no partial channels: 1.

        Raises:
            ValueError: where k is not 1, the layers are others, or a size is below 1.
        """
        only_all_channels(self.name, k)
        skeleton = self._scaled(channels, layers)
        return ChainSupernet(skeleton, self.primitives, num_classes, in_channels, allowed=self._rows())

    def derive(self, scores: Mapping[str, Tensor]) -> ChainGenotype:
        """Returns the chain that keeps the best choice of every layer, of those allowed there.

        Ties go to the lower index.

        Args:
            scores: (L, O) as ``"chain"``; the weights that a relaxation gives.

        Raises:
            ValueError: where the table is missing, has another shape, or has NaN scores.
        """
        shape = (self.layers, len(self.primitives))
        table = checked(scores, "chain", shape, range(self.layers), row="layer", column="choice")
        # max() keeps the first of equals
        best = [
            max((o for o in range(len(row)) if has[o]), key=row.__getitem__)
            for row, has in zip(table, self._rows(), strict=True)
        ]
        return ChainGenotype(tuple(self.primitives[o] for o in best))

    def encode(self, genotype: AnyGenotype) -> dict[str, Tensor]:
        """Returns the scores (L, O) as ``"chain"`` that :meth:`derive` makes the chain of: 1 and 0.

        Raises:
            ValueError: where the genotype is none of this space.
        """
        ops = self._own(genotype).ops
        return {"chain": one_hot([self.primitives.index(op) for op in ops], len(self.primitives))}

    def network(
        self,
        genotype: AnyGenotype,
        channels: int | None = None,
        layers: int | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> ChainNetwork:
        """Returns the network that a genotype stands for; the other arguments are those of :meth:`supernet`.

        Raises:
            ValueError: where the genotype is none of this space, the layers are others, or a size is below 1.
        """
        return ChainNetwork(self._own(genotype), self._scaled(channels, layers), num_classes, in_channels)

    def sample(self, generator: torch.Generator | None = None) -> ChainGenotype:
        """Returns a random chain; all are equally likely."""
        ops = [[p for p, here in zip(self.primitives, row, strict=True) if here] for row in self._rows()]
        return ChainGenotype(tuple(names[choose(len(names), generator)] for names in ops))

    def _rows(self) -> list[list[bool]]:
        return [
            [self.projections or place.same or p != "skip_connect" for p in self.primitives]
            for place in self.skeleton.places
        ]

    def _scaled(self, channels: int | None, layers: int | None) -> Skeleton:
        if layers not in (None, self.layers):
            raise ValueError(f"layers={layers}: the space {self.name!r} has {self.layers}, set layers to that")
        if channels is None:
            return self.skeleton
        if channels < 1:
            raise ValueError(f"channels={channels} must be at least 1")
        return self.skeleton.scaled(channels, self.divisor)

    def _own(self, genotype: AnyGenotype) -> ChainGenotype:
        if not isinstance(genotype, ChainGenotype) or len(genotype.ops) != self.layers:
            raise ValueError(
                f"genotype is no chain of {self.layers} blocks of the space {self.name!r}: got {genotype!r}"
            )
        genotype.validate(self.primitives)
        for i, (op, row) in enumerate(zip(genotype.ops, self._rows(), strict=True)):
            if not row[self.primitives.index(op)]:
                raise ValueError(
                    f"genotype: ops[{i}] is {op}, but layer {i} of the space {self.name!r} changes the shape of its "
                    "input: choose a block"
                )
        return genotype
