"""Weights of the mixed operations that are disturbed while the supernet trains: SmoothDARTS (arXiv:2002.05283)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fastnas.search.architect import frozen

Tables = Mapping[str, Tensor]
"""Name -> (E, O): weights of the mixed operations, rows on the simplex."""


def radius(epoch: int, epochs: int, first: float = 0.03, last: float = 0.3) -> float:
    """Returns ε of an epoch, counted from 0: it grows in a line from ``first`` towards ``last``."""
    return first + (last - first) * epoch / epochs


def random(weights: Tables, epsilon: float, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Returns the weights plus noise from U(−ε, ε), clipped to [0, 1], rows normalised (SDARTS-RS, Eq. 6).

    Args:
        weights: What is disturbed; nothing flows back to it.
        epsilon: ε.
        generator: Of the noise, on the weights' device; torch's own where None.
    """
    return {name: _disturbed(w.detach(), _noise(w, epsilon, generator)) for name, w in weights.items()}


def adversarial(
    weights: Tables,
    epsilon: float,
    loss: Callable[[dict[str, Tensor]], Tensor],
    parameters: Iterable[Tensor] = (),
    generator: torch.Generator | None = None,
    steps: int = 7,
) -> dict[str, Tensor]:
    """Returns weights within ε that raise the loss, clipped to [0, 1], rows normalised (SDARTS-ADV, Eq. 7).

    The disturbance starts at random and climbs by projected gradient ascent: ``steps`` steps of 2ε/7 along the sign of
    its gradient (through clip and normalisation), kept within ±ε each. Where the loss is then no higher than that of
    the weights themselves, those are returned; nothing is read back from the device.

    Args:
        weights: What is disturbed; nothing flows back to it.
        epsilon: ε, the largest change of an entry before its row is normalised.
        loss: From weights to the loss, 0-d. It should neither draw anything nor change the network: put batch norms in
            eval mode, as the published search does, or restore their statistics.
        parameters: Of the network; they are frozen meanwhile, so that their gradients are not computed.
        generator: Of the random start, on the weights' device; torch's own where None.
        steps: Gradients that are taken.
    """
    originals = {name: w.detach() for name, w in weights.items()}
    shifts = {name: _noise(w, epsilon, generator) for name, w in originals.items()}
    with frozen(parameters):
        for _ in range(steps):
            leaves = [shift.requires_grad_() for shift in shifts.values()]
            with torch.enable_grad():
                value = loss({name: _disturbed(w, shifts[name]) for name, w in originals.items()})
            slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            for shift, slope in zip(leaves, slopes, strict=True):
                shift.detach_().add_(slope.sign(), alpha=2 * epsilon / 7).clamp_(-epsilon, epsilon)
        found = {name: _disturbed(w, shifts[name]) for name, w in originals.items()}
        with torch.no_grad():
            higher = loss(found) > loss(originals)
    return {name: torch.where(higher, found[name], w) for name, w in originals.items()}


def _noise(weights: Tensor, epsilon: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(weights, requires_grad=False).uniform_(-epsilon, epsilon, generator=generator)


def _disturbed(weights: Tensor, shift: Tensor) -> Tensor:
    moved = (weights + shift).clamp(0, 1)
    total = moved.sum(-1, keepdim=True)
    # a row of small weights may vanish altogether: it stays as it was
    return torch.where(total > 0, moved / total.clamp(min=torch.finfo(total.dtype).tiny), weights)
