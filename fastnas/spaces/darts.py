"""The convolutional space of DARTS (arXiv:1806.09055, section 3.1)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.genotype import AnyGenotype, Genotype
from fastnas.nn.derived import Network
from fastnas.nn.operations import OPS, PRIMITIVES
from fastnas.nn.stems import Stem
from fastnas.nn.supernet import Supernet
from fastnas.spaces._registry import register
from fastnas.spaces._tables import checked, choose, draw, one_hot


@dataclass(frozen=True)
class DartsSpace:
    """Normal and reduction cells of ``steps`` nodes, each fed by all states before it.

    Attributes:
        name: What ``get_space`` finds it by.
        primitives: The candidates of an edge: the columns of alphas.
        steps: Nodes of a cell.
        multiplier: Nodes, counted from the last, that are concatenated to a cell's output.
    """

    name: str = "darts"
    primitives: tuple[str, ...] = PRIMITIVES
    steps: int = 4
    multiplier: int = 4

    def __post_init__(self) -> None:
        unknown = [p for p in self.primitives if p not in OPS]
        if unknown:
            raise ValueError(f"primitives: {', '.join(unknown)} unknown: register them with fastnas.nn.primitive")
        if not any(p != "none" for p in self.primitives) or len(set(self.primitives)) != len(self.primitives):
            raise ValueError(f"primitives must be different names, one of them not 'none', got {self.primitives}")
        if not 1 <= self.multiplier <= self.steps:
            raise ValueError(f"multiplier={self.multiplier} must be from 1 to steps={self.steps}")

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The keys of alphas, weights and scores."""
        return ("normal", "reduce")

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges ``(i, j)`` of a cell, from state j to state i, j < i, ordered by (i, j): the rows of alphas."""
        return tuple((i, j) for i in range(2, self.steps + 2) for j in range(i))

    def init_alphas(
        self,
        generator: torch.Generator | None = None,
        scale: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Returns normal alphas of standard deviation ``scale``, (E, O) for each cell type, that require grad.

        They are drawn on the generator's device (the CPU where there is none) and then moved, so that a seed gives the
        same alphas on every device.
        """
        shape = (len(self.edges), len(self.primitives))
        return draw(dict.fromkeys(self.cell_types, shape), generator, scale, device)

    def supernet(
        self,
        channels: int = 16,
        layers: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
        k: int = 1,
        stem: Stem = "cifar",
    ) -> Supernet:
        """Returns the over-parameterised network; its arguments are those of :class:`fastnas.nn.Supernet`.

        Raises:
            ValueError: where the layers leave no room for cells of both types, or an argument does not fit.
        """
        if layers < 3:
            raise ValueError(f"layers={layers} must be at least 3: fewer leave no room for both cell types")
        return Supernet(
            channels,
            layers,
            num_classes,
            in_channels,
            primitives=self.primitives,
            steps=self.steps,
            multiplier=self.multiplier,
            k=k,
            stem=stem,
        )

    def derive(self, scores: Mapping[str, Tensor]) -> Genotype:
        """Returns the architecture that keeps, for every node, the two inputs with the largest best score.

        A kept edge gets its best operation, and an edge is as good as that one; ``none`` never counts (section 2.4 of
        the paper). A node's inputs are listed best first, as in the published code. Ties go to the lower index.

        Args:
            scores: (E, O) for each cell type; the weights that a relaxation gives.

        Raises:
            ValueError: where a cell type is missing, has another shape, or has NaN scores.
        """
        concat = range(2 + self.steps - self.multiplier, 2 + self.steps)
        return Genotype(
            normal=self._derive_cell("normal", scores),
            normal_concat=concat,
            reduce=self._derive_cell("reduce", scores),
            reduce_concat=concat,
        )

    def encode(self, genotype: AnyGenotype) -> dict[str, Tensor]:
        """Returns the scores, (E, O) for each cell type, that :meth:`derive` makes the architecture of: 1 and 0.

        Raises:
            ValueError: where the genotype is none of this space, or has a node with twice the same input.
        """
        cells = self._own(genotype)
        tables = {}
        for name, kept in (("normal", cells.normal), ("reduce", cells.reduce)):
            chosen: dict[tuple[int, int], int | None] = dict.fromkeys(self.edges)
            for n, (op, j) in enumerate(kept):
                edge = (n // 2 + 2, j)
                if chosen[edge] is not None:
                    raise ValueError(
                        f"genotype: node {n // 2 + 2} of {name} has input {j} twice, which scores cannot say"
                    )
                chosen[edge] = self.primitives.index(op)
            tables[name] = one_hot(list(chosen.values()), len(self.primitives))
        return tables

    def network(
        self,
        genotype: AnyGenotype,
        channels: int = 36,
        layers: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        stem: Stem = "cifar",
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> Network:
        """Returns the network that a genotype stands for; its other arguments are those of :class:`fastnas.nn.Network`.

        Raises:
            ValueError: where the genotype is none of this space, or an argument does not fit.
        """
        return Network(
            *(self._own(genotype), channels, layers, num_classes, in_channels),
            stem=stem,
            auxiliary=auxiliary,
            drop_path=drop_path,
        )

    def sample(self, generator: torch.Generator | None = None) -> Genotype:
        """Returns a random architecture; all are equally likely.

        Every node has two different inputs, in ascending order, with an operation each that is not ``none``.
        """
        concat = range(2 + self.steps - self.multiplier, 2 + self.steps)
        operations = [p for p in self.primitives if p != "none"]

        def cell() -> list[tuple[str, int]]:
            pairs = [list(itertools.combinations(range(node), 2)) for node in range(2, self.steps + 2)]
            inputs = [j for choices in pairs for j in choices[choose(len(choices), generator)]]
            return [(operations[choose(len(operations), generator)], j) for j in inputs]

        return Genotype(normal=cell(), normal_concat=concat, reduce=cell(), reduce_concat=concat)

    def _own(self, genotype: AnyGenotype) -> Genotype:
        if not isinstance(genotype, Genotype):
            raise ValueError(
                f"genotype is none of the space {self.name!r}, normal and reduction cell: got {genotype!r}"
            )
        genotype = genotype.validate(self.primitives)
        for name, edges in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            if len(edges) != 2 * self.steps:
                raise ValueError(
                    f"genotype: {name} has {len(edges) // 2} nodes, the space {self.name!r} has {self.steps}"
                )
        return genotype

    def _derive_cell(self, cell_type: str, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        table = checked(scores, cell_type, (len(self.edges), len(self.primitives)), self.edges)
        # max() and sorted() keep the first of equals, so ties go to the lower index
        candidates = [o for o, p in enumerate(self.primitives) if p != "none"]
        best = [max(candidates, key=row.__getitem__) for row in table]
        kept: list[tuple[str, int]] = []
        for node in range(2, self.steps + 2):
            first = (node - 2) * (node + 1) // 2  # edges of the nodes before: 2 + 3 + ... + (node - 1)
            inputs = sorted(range(node), key=lambda j: -table[first + j][best[first + j]])[:2]
            kept += [(self.primitives[best[first + j]], j) for j in inputs]
        return kept


DARTS = register(DartsSpace())
DARTS_7 = register(DartsSpace("darts-7", tuple(p for p in PRIMITIVES if p != "none")))
"""Without ``none``, which never counts in the end: where DrNAS searches (arXiv:2006.10355)."""
