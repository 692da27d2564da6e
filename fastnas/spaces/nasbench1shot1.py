"""The three spaces of NAS-Bench-1Shot1 (arXiv:2001.10422, section 3.1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.genotype import AnyGenotype, OneShotGenotype
from fastnas.nn.nasbench1shot1 import NASBENCH1SHOT1_PRIMITIVES, NASBench101Network, OneShotSupernet
from fastnas.spaces._registry import register
from fastnas.spaces._tables import checked, choose, draw, one_hot, only_all_channels


@dataclass(frozen=True)
class OneShotSpace:
    """Cells of NAS-Bench-101 in which every node reads a given number of the nodes before it.

    Its tables are not all of one shape. ``"ops"`` is (steps, 3), one row a node; for every node i that does not read
    all before it there is ``"inputs-<i>"``, (1, i), with one column for each of those; ``"output"`` is (1, steps + 1),
    likewise. Node 0 is the cell's input.

    Attributes:
        name: What ``get_space`` finds it by.
        parents: How many nodes each of the nodes 1, 2, ... and, last, the output reads.
        primitives: The candidates of a node: the columns of ``"ops"``.
    """

    name: str
    parents: tuple[int, ...]
    primitives: tuple[str, ...] = NASBENCH1SHOT1_PRIMITIVES

    def __post_init__(self) -> None:
        wrong = [i for i, parents in enumerate(self.parents, start=1) if not 1 <= parents <= i]
        if wrong or len(self.parents) < 2:
            raise ValueError(f"parents={self.parents}: node i can read 1 to i nodes, and the output is the last")

    @property
    def steps(self) -> int:
        """Number of nodes with an operation."""
        return len(self.parents) - 1

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The keys of alphas, weights and scores."""
        return tuple(self._shapes())

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges ``(i, j)`` that there can be, from node j to node i; the output is node steps + 1.

        They are no rows of a table: the class says what those are.
        """
        return tuple((i, j) for i in range(1, self.steps + 2) for j in range(i))

    def init_alphas(
        self,
        generator: torch.Generator | None = None,
        scale: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Returns normal alphas of standard deviation ``scale``, a table for each cell type, that require grad.

        They are drawn on the generator's device (the CPU where there is none) and then moved, so that a seed gives the
        same alphas on every device.
        """
        return draw(self._shapes(), generator, scale, device)

    def supernet(
        self, channels: int = 16, layers: int = 9, num_classes: int = 10, in_channels: int = 3, k: int = 1
    ) -> OneShotSupernet:
        """Returns the over-parameterised network; its arguments are those of ``OneShotSupernet``.

        Raises:
            ValueError: where k, partial channels, is not 1, or a size is below 1.
        """
        only_all_channels(self.name, k)
        choices = [self._chooses(i) for i in range(1, self.steps + 2)]
        return OneShotSupernet(choices, channels, layers, num_classes, in_channels, primitives=self.primitives)

    def derive(self, scores: Mapping[str, Tensor]) -> OneShotGenotype:
        """Returns the cell whose nodes have their best operation and read the best of the nodes before them.

        Ties go to the lower index. A node that nothing reads in the end is kept: :meth:`OneShotGenotype.pruned`.

        Args:
            scores: a table for each cell type; the weights that a relaxation gives.

        Raises:
            ValueError: where a table is missing, has another shape, or has NaN scores.
        """
        shapes = self._shapes()
        table = checked(scores, "ops", shapes["ops"], range(1, self.steps + 1), row="node")
        # max() and sorted() keep the first of equals
        best = [max(range(len(row)), key=row.__getitem__) for row in table]
        inputs = []
        for i, parents in enumerate(self.parents, start=1):
            nodes = list(range(i))
            if self._chooses(i):
                name = self._table(i)
                (row,) = checked(scores, name, shapes[name], [i], row="node", column="input")
                nodes = sorted(sorted(nodes, key=lambda j: -row[j])[:parents])
            inputs.append(tuple(nodes))
        return OneShotGenotype(tuple(self.primitives[o] for o in best), tuple(inputs))

    def encode(self, genotype: AnyGenotype) -> dict[str, Tensor]:
        """Returns the scores, a table for each cell type, that :meth:`derive` makes the cell of: 1 and 0.

        Raises:
            ValueError: where the genotype is none of this space, such as one that has lost a node that nothing reads.
        """
        fits = isinstance(genotype, OneShotGenotype) and tuple(map(len, genotype.inputs)) == self.parents
        if not isinstance(genotype, OneShotGenotype) or not fits:
            raise ValueError(
                f"genotype is none of the space {self.name!r}, nodes that read {self.parents} others: got {genotype!r}"
            )
        genotype.validate(self.primitives)
        tables = {"ops": one_hot([self.primitives.index(op) for op in genotype.ops], len(self.primitives))}
        for i, nodes in enumerate(genotype.inputs, start=1):
            if self._chooses(i):
                tables[self._table(i)] = one_hot(nodes, i).sum(dim=0, keepdim=True)
        return tables

    def network(
        self,
        genotype: AnyGenotype,
        channels: int = 128,
        layers: int = 9,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> NASBench101Network:
        """Returns the network that a genotype stands for, as NAS-Bench-101 trained it.

        Any cell of NAS-Bench-101 will do, as those in the tables have lost the nodes that nothing reads.

        Raises:
            ValueError: where the genotype is no such cell, or a size is below 1.
        """
        if not isinstance(genotype, OneShotGenotype):
            raise ValueError(f"genotype is none of the space {self.name!r}, operations on nodes: got {genotype!r}")
        return NASBench101Network(genotype.validate(self.primitives), channels, layers, num_classes, in_channels)

    def sample(self, generator: torch.Generator | None = None) -> OneShotGenotype:
        """Returns a random choice of operations and inputs; all are equally likely."""
        ops = [self.primitives[choose(len(self.primitives), generator)] for _ in range(self.steps)]
        return OneShotGenotype(
            tuple(ops), tuple(choices[choose(len(choices), generator)] for choices in self._choices())
        )

    def all(self) -> Iterator[OneShotGenotype]:
        """Yields every choice of operations and inputs once; different ones may be the same graph."""
        for inputs in itertools.product(*self._choices()):
            for ops in itertools.product(self.primitives, repeat=self.steps):
                yield OneShotGenotype(ops, inputs)

    def _choices(self) -> list[list[tuple[int, ...]]]:
        """Returns what each node and the output can read."""
        return [list(itertools.combinations(range(i), parents)) for i, parents in enumerate(self.parents, start=1)]

    def _chooses(self, i: int) -> bool:
        return self.parents[i - 1] < i

    def _table(self, i: int) -> str:
        return f"inputs-{i}" if i <= self.steps else "output"

    def _shapes(self) -> dict[str, tuple[int, int]]:
        tables = {self._table(i): (1, i) for i in range(1, self.steps + 2) if self._chooses(i)}
        return {"ops": (self.steps, len(self.primitives)), **tables}


NB1SHOT1_S1 = register(OneShotSpace("nb1shot1-s1", (1, 2, 2, 2, 2)))
NB1SHOT1_S2 = register(OneShotSpace("nb1shot1-s2", (1, 1, 2, 2, 3)))
NB1SHOT1_S3 = register(OneShotSpace("nb1shot1-s3", (1, 1, 1, 2, 2, 2)))
