from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastnas._registry import Registry
from fastnas.genotype import AnyGenotype


class Space(Protocol):
    """What a search asks of a space.

    A space may also have ``all()``, which yields every architecture once; ``layers``, the one number of them that it
    has; and ``allowed``, for each cell type bool (E, O): the candidates that an edge has, where not all edges have all.
    The others weigh nothing, and are never derived.
    """

    @property
    def name(self) -> str:
        """What ``get_space`` finds it by."""

    @property
    def primitives(self) -> tuple[str, ...]:
        """The candidates of an edge: the columns of alphas."""

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The keys of alphas, weights and scores."""

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges ``(i, j)`` of a cell, from state j to state i, j < i: the rows of alphas."""

    def init_alphas(
        self,
        generator: torch.Generator | None = None,
        scale: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Returns fresh alphas, (E, O) for each cell type, that require grad."""

    def supernet(
        self, channels: int = 16, layers: int = 8, num_classes: int = 10, in_channels: int = 3, k: int = 1
    ) -> nn.Module:
        """Returns a network whose ``forward(x, weights)`` gives logits.

        ``forward(x, weights, between=f)`` replaces, after every cell, the states that the next cell reads by
        ``f(states)``, as many tensors.

        Where edges are independent of each other, ``forward(x, weights, edge_weights, path=path)`` also takes, for each
        cell type, E factors of the edges' outputs and the only candidate that is computed of each edge, and
        ``mixed_ops()`` yields (cell type, edge, :class:`fastnas.nn.MixedOp`).
        """

    def derive(self, scores: Mapping[str, Tensor]) -> AnyGenotype:
        """Returns the architecture that scores (E, O) for each cell type select."""

    def encode(self, genotype: AnyGenotype) -> dict[str, Tensor]:
        """Returns the scores (E, O) that :meth:`derive` makes the architecture of: 1 for what it has, 0 elsewhere.

        They are the weights with which the supernet computes what it does.
        """

    def network(
        self,
        genotype: AnyGenotype,
        channels: int = 16,
        layers: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> nn.Module:
        """Returns the network that a genotype stands for, whose ``forward(x)`` gives logits, ready to be trained."""

    def sample(self, generator: torch.Generator | None = None) -> AnyGenotype:
        """Returns a random architecture; all are equally likely."""


SPACES: Registry[Space] = Registry("space")


def allowed(space: Space) -> dict[str, Tensor]:
    """Returns which candidates edges have, bool (E, O), for each cell type some of whose edges lack one."""
    tables: Mapping[str, Tensor] = getattr(space, "allowed", {})
    return {name: table for name, table in tables.items() if not table.all()}


_S = TypeVar("_S", bound=Space)


def register(space: _S) -> _S:
    """Returns ``space`` after adding it to ``SPACES`` under its name.

    Raises:
        ValueError: where the name is taken by another space.
    """
    return SPACES.add(space.name, space)


def get_space(name: str) -> Space:
    """Returns the space registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return SPACES.find(name)
