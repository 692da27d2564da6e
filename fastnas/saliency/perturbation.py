"""Zero-Cost-PT: candidates judged by what a supernet's score loses without them (Xiang et al., arXiv:2106.06799)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas.genotype import AnyGenotype
from fastnas.saliency._registry import Batch, Score, get_score
from fastnas.spaces import DartsSpace, Space
from fastnas.spaces._registry import allowed

_Tables = dict[str, Tensor]


@dataclass(frozen=True)
class Perturbation:
    """What :func:`perturb` found.

    Attributes:
        genotype: The architecture whose part of the supernet scores best.
        score: That score, the mean over the batches.
        candidates: The architecture of every order of the edges, and its score.
    """

    genotype: AnyGenotype
    score: float
    candidates: tuple[tuple[AnyGenotype, float], ...]


def perturb(
    space: Space,
    supernet: nn.Module,
    batches: Sequence[Batch],
    score: str | Score = "naswot",
    *,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    on_choice: Callable[[int, int], None] | None = None,
) -> Perturbation:
    """Returns the architecture that operation perturbation finds in an untrained supernet.

    All candidates weigh 1; there is no softmax. One edge after another, in random order, is decided: each of its
    candidates is dropped in turn, and the one without which the supernet's score is lowest is kept, alone. ``none`` is
    never kept: without it the supernet is the same. In the DARTS space, each node then keeps the two inputs without
    which the score is lowest. This is done for several orders of the edges, and the architectures that come out are
    compared by the score of what is left of the supernet.

    A dropped candidate has the weight 0 and is still a part of the network: scores that look at modules (params, flops,
    and of naswot the codes of the candidate's own ReLUs) see it.

    Args:
        space: nb201, darts, or another with a table (E, O) of ``space.edges`` for each cell type.
        supernet: one of the space; left as it was.
        batches: the edges are decided on the first, the architectures compared on all.
        score: a score of networks, or its name.
        iterations: how many orders of the edges are tried.
        generator: of the orders.
        on_choice: called with (decisions made, decisions in all).

    Raises:
        ValueError: where there is nothing to do, or every score on an edge is NaN.
    """
    score = get_score(score) if isinstance(score, str) else score
    if iterations < 1 or not batches:
        raise ValueError(f"iterations={iterations} and the number of batches, {len(batches)}, must be at least 1")
    shape = (len(space.edges), len(space.primitives))
    for cell_type, alpha in space.init_alphas().items():
        if tuple(alpha.shape) != shape:
            raise ValueError(
                f"space {space.name!r} has a table {tuple(alpha.shape)} as {cell_type!r}: perturbation needs one row "
                f"an edge and one column a primitive, {shape}"
            )
    search = _Search(space, supernet, batches, score, generator, on_choice, iterations)
    candidates = tuple(search.candidate() for _ in range(iterations))
    ranked = [(math.inf if math.isnan(value) else -value) for _, value in candidates]
    best = min(range(iterations), key=ranked.__getitem__)
    return Perturbation(*candidates[best], candidates)


class _Weighted(nn.Module):
    """A supernet with given weights, as a network of images alone."""

    def __init__(self, supernet: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.supernet = supernet
        self._weights = weights

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.supernet(x, self._weights)
        return logits


class _Search:
    def __init__(
        self,
        space: Space,
        supernet: nn.Module,
        batches: Sequence[Batch],
        score: Score,
        generator: torch.Generator | None,
        on_choice: Callable[[int, int], None] | None,
        iterations: int,
    ) -> None:
        self._space = space
        self._supernet = supernet
        self._batches = batches
        self._score = score
        self._generator = generator
        self._on_choice = on_choice
        self._kept = [o for o, p in enumerate(space.primitives) if p != "none"]
        self._allowed = allowed(space)
        # The nodes that have to give up inputs, in each cell type.
        self._nodes: dict[int, list[int]] = {}
        if isinstance(space, DartsSpace):
            for e, (i, _) in enumerate(space.edges):
                self._nodes.setdefault(i, []).append(e)
        self._nodes = {i: edges for i, edges in self._nodes.items() if len(edges) > 2}
        self._made = 0
        self._all = iterations * len(space.cell_types) * (len(space.edges) + len(self._nodes))

    def candidate(self) -> tuple[AnyGenotype, float]:
        """Returns the architecture of one random order, and the score of its part of the supernet."""
        first = self._batches[0]
        shape = (len(self._space.edges), len(self._space.primitives))
        weights = {t: first.images.new_ones(shape) for t in self._space.cell_types}
        # What derive() is given: larger is better, and what is dropped has −inf.
        scores = {t: torch.full(shape, -torch.inf, dtype=torch.float64) for t in self._space.cell_types}
        for cell_type, e in self._shuffled([(t, e) for t in self._space.cell_types for e in range(shape[0])]):
            there = [o for o in self._kept if cell_type not in self._allowed or self._allowed[cell_type][e, o]]
            losses = [self._without(weights, cell_type, (e, o)) for o in there]
            keep = there[_lowest(losses, f"edge {self._space.edges[e]} of {cell_type!r}")]
            weights[cell_type][e] = 0
            weights[cell_type][e, keep] = 1
            scores[cell_type][e, keep] = 0
            self._decided()
        for cell_type, node in self._shuffled([(t, i) for t in self._space.cell_types for i in self._nodes]):
            edges = list(self._nodes[node])
            losses = [self._without(weights, cell_type, (e,)) for e in edges]
            for place in range(len(edges)):
                e = edges.pop(lowest := _lowest(losses, f"node {node} of {cell_type!r}"))
                losses.pop(lowest)
                if place < 2:
                    scores[cell_type][e] += 2 - place
                else:
                    weights[cell_type][e] = 0
            self._decided()
        genotype = self._space.derive(scores)
        values = [float(self._score(_Weighted(self._supernet, weights), batch)) for batch in self._batches]
        return genotype, sum(values) / len(values)

    def _without(self, weights: _Tables, cell_type: str, place: tuple[int, ...]) -> float:
        perturbed = {t: table.clone() for t, table in weights.items()}
        perturbed[cell_type][place] = 0
        return float(self._score(_Weighted(self._supernet, perturbed), self._batches[0]))

    def _shuffled(self, items: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return [items[i] for i in torch.randperm(len(items), generator=self._generator).tolist()]

    def _decided(self) -> None:
        self._made += 1
        if self._on_choice is not None:
            self._on_choice(self._made, self._all)


def _lowest(values: Sequence[float], where: str) -> int:
    """Returns the first lowest value's index; NaN is above all."""
    if all(math.isnan(v) for v in values):
        raise ValueError(f"score: it is NaN for all candidates on {where}: take another score or scale the images")
    return min(range(len(values)), key=lambda n: math.inf if math.isnan(values[n]) else values[n])
