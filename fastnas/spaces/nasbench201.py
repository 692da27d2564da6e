"""The space of NAS-Bench-201 (arXiv:2001.00326, section 2.1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.genotype import AnyGenotype, NASBench201Genotype
from fastnas.nn.nasbench201 import NASBENCH201_PRIMITIVES, NASBench201Network, NASBench201Supernet
from fastnas.nn.operations import OPS
from fastnas.spaces._registry import register
from fastnas.spaces._tables import checked, choose, draw


@dataclass(frozen=True)
class NASBench201Space:
    """One cell of densely connected nodes, repeated; every edge has one operation, ``none`` among them.

    Attributes:
        name: What ``get_space`` finds it by.
        primitives: The candidates of an edge: the columns of alphas.
        nodes: Nodes of a cell, its input included.
    """

    name: str = "nb201"
    primitives: tuple[str, ...] = NASBENCH201_PRIMITIVES
    nodes: int = 4

    def __post_init__(self) -> None:
        unknown = [p for p in self.primitives if p not in OPS]
        if unknown:
            raise ValueError(f"primitives: {', '.join(unknown)} unknown: register them with fastnas.nn.primitive")
        if not self.primitives or len(set(self.primitives)) != len(self.primitives):
            raise ValueError(f"primitives must be different names, at least one, got {self.primitives}")
        if self.nodes < 2:
            raise ValueError(f"nodes={self.nodes} must be at least 2: the input and the output")

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The one key of alphas, weights and scores."""
        return ("cell",)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges ``(i, j)`` of a cell, from node j to node i, j < i, ordered by (i, j): the rows of alphas."""
        return tuple((i, j) for i in range(1, self.nodes) for j in range(i))

    def init_alphas(
        self,
        generator: torch.Generator | None = None,
        scale: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Returns normal alphas of standard deviation ``scale``, (E, O) as ``"cell"``, that require grad.

        They are drawn on the generator's device (the CPU where there is none) and then moved, so that a seed gives the
        same alphas on every device.
        """
        return draw({"cell": (len(self.edges), len(self.primitives))}, generator, scale, device)

    def supernet(
        self, channels: int = 16, layers: int = 5, num_classes: int = 10, in_channels: int = 3, k: int = 1
    ) -> NASBench201Supernet:
        """Returns the over-parameterised network.

        Args:
            channels: channels of the first stage.
            layers: cells of a stage; there are three.
            num_classes: number of logits.
            in_channels: channels of the images.
            k: partial channels: the candidates see 1/k of the channels (PC-DARTS, arXiv:1907.05737).

        Raises:
            ValueError: where k does not divide the channels, or a size is below 1.
        """
        return NASBench201Supernet(
            *(channels, layers, num_classes, in_channels), nodes=self.nodes, primitives=self.primitives, k=k
        )

    def derive(self, scores: Mapping[str, Tensor]) -> NASBench201Genotype:
        """Returns the cell that keeps the best operation of every edge; ``none`` counts as any other.

        Ties go to the lower index.

        Args:
            scores: (E, O) as ``"cell"``; the weights that a relaxation gives.

        Raises:
            ValueError: where the table is missing, has another shape, or has NaN scores.
        """
        table = checked(scores, "cell", (len(self.edges), len(self.primitives)), self.edges)
        # max() keeps the first of equals
        best = (max(range(len(row)), key=row.__getitem__) for row in table)
        return NASBench201Genotype(tuple(self.primitives[o] for o in best))

    def network(
        self,
        genotype: AnyGenotype,
        channels: int = 16,
        layers: int = 5,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> NASBench201Network:
        """Returns the network that a genotype stands for, as the benchmark trained it.

        Raises:
            ValueError: where the genotype is none of this space, or a size is below 1.
        """
        if not isinstance(genotype, NASBench201Genotype) or len(genotype.ops) != len(self.edges):
            raise ValueError(f"genotype is no cell of {self.nodes} nodes of the space {self.name!r}: got {genotype!r}")
        genotype.validate(self.primitives)
        return NASBench201Network(genotype, channels, layers, num_classes, in_channels)

    def sample(self, generator: torch.Generator | None = None) -> NASBench201Genotype:
        """Returns a random cell; all are equally likely."""
        return NASBench201Genotype(tuple(self.primitives[choose(len(self.primitives), generator)] for _ in self.edges))

    def all(self) -> Iterator[NASBench201Genotype]:
        """Yields every cell of the space once; the last edge changes fastest."""
        return (NASBench201Genotype(ops) for ops in itertools.product(self.primitives, repeat=len(self.edges)))


NASBENCH201 = register(NASBench201Space())
