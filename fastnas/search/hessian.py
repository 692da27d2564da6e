"""The curvature of the validation loss over the architecture (arXiv:1909.09656, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastnas import twice_differentiable
from fastnas.nn.preserved import preserved
from fastnas.relaxations import Relaxation, concentration, exponentiated, softmax
from fastnas.search.architect import frozen

Loss = Callable[[dict[str, Tensor]], Tensor]
"""From the weights of the mixed operations, name -> (E, O), to the loss on validation images, 0-d."""


@dataclass(frozen=True)
class Curvature:
    """What the Hessian of the validation loss comes to.

    Attributes:
        eigenvalue: The one that is largest in absolute value, with its sign.
        norm: The Frobenius norm.
        trace: The trace.
        trace_term: ½ tr(H Cov[Dir(β)]), by which the expected loss exceeds that at the mean, to second order, where
            weights are drawn from Dirichlet distributions. DrNAS bounds this term by a multiple of the trace
            (arXiv:2006.10355, Eq. 6), with a normal distribution in the place of the Dirichlet; here the covariance is
            the exact one. None for other relaxations, and over the alphas.
    """

    eigenvalue: float
    norm: float
    trace: float
    trace_term: float | None


def curvature(
    supernet: nn.Module,
    loss: Loss,
    alphas: Mapping[str, Tensor],
    relaxation: Relaxation,
    over: Literal["weights", "alphas"] = "weights",
    *,
    exact: int = 32,
    iterations: int = 32,
    vectors: int = 16,
    generator: torch.Generator | None = None,
) -> Curvature:
    """Returns the curvature of the loss at the mean of the relaxation, never at a sample.

    Up to ``exact`` numbers, the whole Hessian is computed, column by column. Beyond, a Lanczos iteration with full
    reorthogonalisation finds the dominant eigenvalue; norm and trace are exact on the space it spans, and estimated on
    what is orthogonal to that, with random signs (Hutchinson's estimator, deflated as in arXiv:2010.09649).

    Hessian-vector products are exact: double backward passes over one graph, which the reference backend builds and
    keeps. Batch norms use the statistics of the batch; the running ones, the parameters and their gradients are
    untouched.

    Args:
        supernet: What ``loss`` runs; put into training mode meanwhile.
        loss: The loss at given weights; without chance, the same at every call.
        alphas: Name -> (E, O); edges' logits, (E,), are left out: ``loss`` is given none.
        relaxation: Its mean is where the weights are.
        over: Whether derivatives are with respect to the weights of the mixed operations or to the alphas.
        exact: The most numbers, all tables together, whose Hessian is computed whole.
        iterations: The most steps of Lanczos; each costs one product.
        vectors: Random vectors for what Lanczos has not seen; each costs one product.
        generator: Of the start and the random vectors, on the CPU; torch's own where None.

    Raises:
        ValueError: where there are no tables of alphas, or ``over`` is neither.
    """
    tables = {name: alpha.detach() for name, alpha in alphas.items() if alpha.dim() == 2}
    if not tables:
        raise ValueError("alphas has no table (E, O): expected the architecture parameters of a supernet")
    if over not in ("weights", "alphas"):
        raise ValueError(f"over={over!r}: expected 'weights' or 'alphas'")
    # the backward of exponentiated gradients is no derivative; their weights are those of softmax
    mean = softmax.mean if relaxation is exponentiated else relaxation.mean
    if over == "weights":
        leaves = {name: mean(table).detach().requires_grad_() for name, table in tables.items()}
        at = loss
    else:
        leaves = {name: table.clone().requires_grad_() for name, table in tables.items()}

        def at(weights: dict[str, Tensor]) -> Tensor:
            return loss({name: mean(table) for name, table in weights.items()})

    size = sum(leaf.numel() for leaf in leaves.values())
    with preserved(supernet, training=True), frozen(supernet.parameters()), _Products(at, leaves) as product:
        if size <= exact:
            basis = torch.eye(size, dtype=torch.float64)
            images = torch.stack([product(column) for column in basis], dim=1)
        else:
            basis, images = lanczos(product, size, iterations, generator)
        # outside the space of the basis; nothing is left there where that is everything
        rest = torch.zeros(size, 0, dtype=torch.float64)
        if basis.shape[1] < size:
            signs = torch.randint(2, (size, vectors), generator=generator, dtype=torch.float64) * 2 - 1
            rest = signs - basis @ (basis.T @ signs)
        rest_images = torch.stack([product(v) for v in rest.T], dim=1) if rest.shape[1] else rest

    def trace_of(left: Tensor, left_rest: Tensor) -> float:
        known = (left * images).sum()
        return float(known + (left_rest * rest_images).sum() / max(rest.shape[1], 1))

    term = None
    if over == "weights" and relaxation.name == "dirichlet":
        term = trace_of(_covariance(tables, basis), _covariance(tables, rest)) / 2
    return Curvature(
        eigenvalue=float(_ritz(basis, images)[0]),
        norm=float((images.square().sum() + rest_images.square().sum() / max(rest.shape[1], 1)).sqrt()),
        trace=trace_of(basis, rest),
        trace_term=term,
    )


def lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    iterations: int,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Returns an orthonormal basis Q (size, m) of a Krylov space of the symmetric H, and H Q (size, m).

    It stops at an invariant space, or where the residual of the dominant pair is within ``tolerance`` of its value.

    Args:
        product: v -> H v, (size,) in float64.
        size: Rows of H.
        iterations: The most products.
        generator: Of the start, on the CPU.
        tolerance: Relative to the eigenvalue.
    """
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    columns: list[Tensor] = []
    images: list[Tensor] = []
    for _ in range(min(iterations, size)):
        columns.append(v / torch.linalg.vector_norm(v))
        images.append(product(columns[-1]))
        basis, mapped = torch.stack(columns, dim=1), torch.stack(images, dim=1)
        value, vector = _ritz(basis, mapped)
        if torch.linalg.vector_norm(mapped @ vector - value * (basis @ vector)) <= tolerance * value.abs():
            break
        v = images[-1]
        for _ in range(2):  # once is not enough where it cancels most of v
            v = v - basis @ (basis.T @ v)
        if torch.linalg.vector_norm(v) <= 1e-12 * torch.linalg.vector_norm(mapped):
            break
    return basis, mapped


def _ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the dominant eigenvalue of Qᵀ H Q, and its vector in the basis."""
    matrix = basis.T @ images
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    dominant = values.abs().argmax()
    return values[dominant], vectors[:, dominant]


def _covariance(tables: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    """Returns Cov[Dir(β)] times each column: (diag μ − μ μᵀ) / (Σ β + 1) on each edge's entries."""
    parts = []
    sizes = [table.numel() for table in tables.values()]
    for table, part in zip(tables.values(), torch.split(columns, sizes), strict=True):
        c = concentration(table).cpu()
        total = c.sum(-1)[:, None, None]
        mean = c[:, :, None] / total  # (E, O, 1)
        x = part.reshape(*c.shape, -1) if part.shape[1] else part.new_zeros(*c.shape, 0)
        parts.append((mean * (x - (mean * x).sum(1, keepdim=True)) / (total + 1)).flatten(0, 1))
    return torch.cat(parts)


class _Products:
    """Hessian-vector products: a context that holds the graph of the gradient."""

    def __init__(self, loss: Loss, leaves: dict[str, Tensor]) -> None:
        self._leaves = list(leaves.values())
        with torch.enable_grad(), twice_differentiable():
            gradients = torch.autograd.grad(
                loss(leaves), self._leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
        # a gradient without a graph is constant
        self._gradients = [(i, g) for i, g in enumerate(gradients) if g.requires_grad]

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        return self._product

    def __exit__(self, *error: object) -> None:
        self._gradients.clear()

    def _product(self, v: Tensor) -> Tensor:
        if not self._gradients:
            return torch.zeros_like(v)
        parts = torch.split(v, [leaf.numel() for leaf in self._leaves])
        outputs = [
            part.to(leaf.device, leaf.dtype).view_as(leaf) for part, leaf in zip(parts, self._leaves, strict=True)
        ]
        products = torch.autograd.grad(
            [g for _, g in self._gradients],
            self._leaves,
            [outputs[i] for i, _ in self._gradients],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([p.flatten() for p in products]).to("cpu", torch.float64)
