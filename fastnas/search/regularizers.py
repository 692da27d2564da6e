"""Penalties on the architecture parameters, which keep them near to where nothing is preferred yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas._registry import Registry
from fastnas.relaxations import concentration


@dataclass(frozen=True)
class Regularizer:
    """What is added to the loss of the alphas.

    Attributes:
        name: What an option calls it.
        penalty: From the tables of alphas, (E, O) each, to a 0-d tensor, without its factor λ; None where nothing is
            added to the loss.
        relaxation: The relaxation whose parameters it is a penalty of; None where any will do.
        weight_decay: Whether λ is the weight decay of the alphas' optimizer instead.
    """

    name: str
    penalty: Callable[[list[Tensor]], Tensor] | None = None
    relaxation: str | None = None
    weight_decay: bool = False

    def __call__(self, alphas: Mapping[str, Tensor], scale: float) -> Tensor:
        """Returns λ times the penalty, a 0-d tensor to add to the loss.

        Args:
            alphas: Name -> (E, O). Logits of edges, (E,), are no parameters of a distribution and stay out of it.
            scale: λ.
        """
        tables = [alpha for alpha in alphas.values() if alpha.dim() == 2]
        if self.penalty is None:
            return tables[0].new_zeros(())
        return scale * self.penalty(tables).to(tables[0].dtype)

    def check(self, relaxation: str) -> None:
        """Raises ValueError where the penalty is of another relaxation's parameters."""
        if self.relaxation not in (None, relaxation):
            raise ValueError(
                f"regularizer {self.name!r} is of the relaxation {self.relaxation!r}, not {relaxation!r}: use that, or "
                "the regularizer l2"
            )


REGULARIZERS: Registry[Regularizer] = Registry("regularizer")


def get_regularizer(name: str) -> Regularizer:
    """Returns the regularizer registered under ``name``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return REGULARIZERS.find(name)


none = REGULARIZERS.add("none", Regularizer("none"))
"""Nothing."""

l2 = REGULARIZERS.add("l2", Regularizer("l2", weight_decay=True))
"""Weight decay λ, which pulls alphas to 0: for DARTS (arXiv:1806.09055) to equal weights, for DrNAS to β = 1."""


def _concentrations(tables: Iterable[Tensor]) -> Tensor:
    return torch.cat([concentration(table).flatten() for table in tables])


def _distance(tables: list[Tensor]) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(_concentrations(tables) - 1)
    return distance


l2_beta = REGULARIZERS.add("l2_beta", Regularizer("l2_beta", _distance, "dirichlet"))
"""‖β − 1‖₂ over the concentrations of all edges (DrNAS, arXiv:2006.10355, Eq. 2)."""


def _divergence(tables: list[Tensor]) -> Tensor:
    return torch.stack([dirichlet_divergence(concentration(table)).sum() for table in tables]).sum()


def dirichlet_divergence(concentrations: Tensor) -> Tensor:
    """Returns KL(Dir(β) ‖ Dir(1)) of every row, (E,) from (E, O).

    lgamma(Σ β) − Σ lgamma(β) − lgamma(O) + Σ (β − 1) (digamma(β) − digamma(Σ β)).
    """
    total = concentrations.sum(-1)
    normalisers = total.lgamma() - concentrations.lgamma().sum(-1) - math.lgamma(concentrations.shape[-1])
    expected = concentrations.digamma() - total.digamma()[..., None]
    return normalisers + ((concentrations - 1) * expected).sum(-1)


kl = REGULARIZERS.add("kl", Regularizer("kl", _divergence, "dirichlet"))
"""Σ KL(Dir(β) ‖ Dir(1)) over the edges (DrNAS, arXiv:2006.10355)."""
