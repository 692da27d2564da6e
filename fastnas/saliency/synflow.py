"""SynFlow on the architecture parameters (FreeDARTS, arXiv:2106.11542) and on the weights (arXiv:2006.05467)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnas.ops.absolute import group_products
from fastnas.saliency._registry import Batch, saliency, score
from fastnas.saliency.linearised import Rescale, in_range, linearised, rescalable


class Flow(NamedTuple):
    """R_SF = 1ᵀ Π |W(θ, α)| 1 and what each candidate carries of it."""

    shares: dict[str, Tensor]  # (E, O) for each cell type: |α ∂R/∂α| / R, float64
    log: Tensor  # ln R, 0-d, float64


def flow(supernet: nn.Module, alphas: Mapping[str, Tensor], image: Tensor) -> Flow:
    """Returns R for an input of ones and the share of every candidate, for a supernet that :func:`linearised` holds.

    α multiplies the candidates' outputs as it is, in absolute value. The shares of the candidates on all edges into
    a one-cell network's output add up to 1, since R is linear in them (Euler). A network whose ``forward`` has
    an argument ``between`` is rescaled between its cells, so that R may leave the range of its floats.

    Args:
        supernet: ``supernet(x, weights)`` gives logits.
        alphas: (E, O) for each cell type.
        image: (1, C, H, W), of which shape, dtype and device count.

    Raises:
        ValueError: where nothing flows from the input to the output, or R is not finite.
    """
    weights = {t: a.detach().to(image.dtype).abs().requires_grad_() for t, a in alphas.items()}
    rescale = Rescale()
    between = {"between": rescale} if rescalable(supernet) else {}
    with torch.enable_grad():
        r = supernet(torch.ones_like(image), weights, **between).sum()
        gradients = torch.autograd.grad(r, list(weights.values()), allow_unused=True)
    r = r.detach().double()
    if not torch.isfinite(r) or r <= 0:
        raise ValueError(
            f"alphas: R is {float(r)}: "
            + (
                "no path of non-zero alphas and weights leads to the output"
                if r == 0
                else "the weights are not finite, or a single cell leaves the range of its floats"
            )
        )
    shares = {
        t: torch.zeros_like(w, dtype=torch.float64) if g is None else w.detach().double() * g.double() / r
        for (t, w), g in zip(weights.items(), gradients, strict=True)
    }
    return Flow(shares, r.log() + rescale.log)


@saliency("synflow")
def synflow(supernet: nn.Module, alphas: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns |∂R_SF/∂α ⊙ α| / R_SF of every candidate, float64 (FreeDARTS, arXiv:2106.11542).

    R_SF = 1ᵀ Π |W(θ, α)| 1 needs neither data nor labels: of the batch, the images' shape counts alone. Batch norm is
    bypassed, biases are left out. Gradients are summed over all cells that share an α.

    Raises:
        ValueError: as :func:`flow`.
    """
    network = in_range(supernet)
    image = batch.images[:1].to(next(network.parameters()).dtype)
    with linearised(network):
        return flow(network, alphas, image).shares


@score("synflow")
def network_synflow(network: nn.Module, batch: Batch) -> Tensor:
    """Returns ln Σ_θ |θ ∂R/∂θ| with R = 1ᵀ Π |θ| 1, 0-d, float64 (arXiv:2006.05467, Eq. 2; NAS: arXiv:2101.08134).

    Batch norm is bypassed and biases are left out; the sum itself leaves the range of float32, so its logarithm is
    given. -inf where nothing flows to the output.
    """
    sums, log = _weight_flow(network, [network], batch.images[:1])
    return sums[0].log() + log


def operation_flow(network: nn.Module, operations: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """Returns Σ_θ |θ ∂R/∂θ| of each operation's weights as a part of that of the whole network, 0-d, float64.

    For networks whose operations no α weighs: an operation's sum is what flows through it, counted once for each of its
    layers that has weights.

    Args:
        network: What is evaluated, ``network(x)``.
        operations: Modules in it, by any names; those without weights get 0.
        batch: Of which the images' shape counts.

    Raises:
        ValueError: where nothing flows from the input to the output.
    """
    sums, _ = _weight_flow(network, [network, *operations.values()], batch.images[:1])
    if not sums[0] > 0:
        raise ValueError("network: nothing flows from the input to the output: some cell has no path")
    return dict(zip(operations, (sums[1:] / sums[0]).unbind(), strict=True))


def _weight_flow(network: nn.Module, parts: list[nn.Module], image: Tensor) -> tuple[Tensor, Tensor | float]:
    """Returns Σ_θ |θ ∂R/∂θ| of each part's weights, up to the factor whose logarithm comes with it."""
    running = in_range(network)
    parameters = list(running.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    places = {p: i for i, p in enumerate(network.parameters())}  # the same in a copy
    rescale = Rescale()
    between = {"between": rescale} if rescalable(running) else {}
    with linearised(running), torch.enable_grad():
        try:
            for p in frozen:
                p.requires_grad_(True)
            r = running(torch.ones_like(image, dtype=parameters[0].dtype), **between).sum()
            gradients = torch.autograd.grad(r, parameters, allow_unused=True)
        finally:
            for p in frozen:
                p.requires_grad_(False)
        each = group_products(parameters, gradients, range(len(parameters)))
    sums = [each[[places[p] for p in part.parameters()]].sum() for part in parts]
    return torch.stack(sums), rescale.log
