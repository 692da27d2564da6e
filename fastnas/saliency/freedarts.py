"""FreeDARTS: an architecture from the saliency of random α, without training (arXiv:2106.11542, Algorithm 1)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastnas.saliency._registry import Batch, Saliency, get_saliency
from fastnas.spaces import Space
from fastnas.spaces._registry import allowed

PRUNING = ("once", "candidates", "edges")


@dataclass(frozen=True)
class TrainingFreeResult:
    """What one search found."""

    genotype: Any  # of the space's own kind
    scores: dict[str, Tensor]  # (E, O) for each cell type, float64; -inf for what was cut before
    alphas: dict[str, Tensor]  # (E, O) for each cell type, the (last) draw
    seconds: float  # weights drawn, α drawn, scored and derived


class FreeDarts:
    """Searches a space without training: random weights, random α, one score, the best kept.

    The supernet is built once; each search draws its weights anew, as a fresh supernet would.

    Args:
        space: The search space.
        saliency: A name in :data:`fastnas.saliency.SALIENCIES`; of several, the ranks among an edge's candidates are
            added up.
        scale: a: α is drawn from a · N(0, 1) and multiplies the candidates' outputs without a softmax.
        draws: Draws of α per search, whose scores are averaged; 0 takes every α at its expectation
            E|α| = a · √(2/π) instead. R is linear in each |α| of a one-cell network, where that gives the expected
            α ∂R/∂α exactly.
        pruning: ``"once"`` scores once and keeps the best (Algorithm 1); ``"candidates"`` cuts the worst candidate of
            every edge, ``none`` first, and scores again until one is left; ``"edges"`` decides one edge after the
            other, from the input on, and not for ``none``. The paper's later version prunes iteratively too, but its
            details are not public.
        device: Where to run.
        supernet: Arguments of ``space.supernet``.

    Raises:
        ValueError: for an unknown saliency or way of pruning, or a number that makes no sense.
    """

    def __init__(
        self,
        space: Space,
        saliency: str | Sequence[str] = "synflow",
        *,
        scale: float = 1e-3,
        draws: int = 1,
        pruning: str = "once",
        device: torch.device | str = "cpu",
        **supernet: Any,
    ) -> None:
        names = [saliency] if isinstance(saliency, str) else list(saliency)
        if not names:
            raise ValueError("saliency must name at least one")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale={scale} must be positive: it is the standard deviation of α")
        if draws < 0:
            raise ValueError(f"draws={draws} must be at least 0, which takes α at its expectation")
        if pruning not in PRUNING:
            raise ValueError(f"pruning={pruning!r}: expected one of {', '.join(PRUNING)}")
        self.space = space
        self.scale, self.draws, self.pruning = scale, draws, pruning
        self.supernet = space.supernet(**supernet).to(device).eval()
        self._device = torch.device(device)
        self._saliencies: list[Saliency] = [get_saliency(name) for name in names]
        # Nothing that a saliency does to a batch norm lasts.
        modules = (m for m in self.supernet.modules() if not isinstance(m, _BatchNorm))
        self._resets: list[Callable[[], object]] = [reset for m in modules for reset in _resets(m)]

    def search(self, seed: int, batch: Batch) -> TrainingFreeResult:
        """Returns the architecture that ``seed`` leads to.

        Args:
            seed: Of the weights and of α.
            batch: One mini-batch; SynFlow looks at the images' shape alone.

        Raises:
            ValueError: where the saliency cannot be taken; the message says why.
        """
        start = time.perf_counter()
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(seed)
            for reset in self._resets:
                reset()
        generator = torch.Generator().manual_seed(seed)
        batch = Batch(batch.images.to(self._device), batch.labels.to(self._device))
        alphas = [
            {t: a.detach() for t, a in self.space.init_alphas(generator, self.scale, self._device).items()}
            for _ in range(max(self.draws, 1))
        ]
        if self.draws == 0:
            expected = self.scale * math.sqrt(2 / math.pi)
            alphas = [{t: torch.full_like(a, expected) for t, a in alphas[0].items()}]
        scores = self._prune(alphas, batch)
        return TrainingFreeResult(self.space.derive(scores), scores, alphas[-1], time.perf_counter() - start)

    def _prune(self, alphas: list[dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        scores = self._score(self.supernet, alphas, batch)
        if self.pruning == "once":
            return scores
        alive = {t: torch.ones_like(s, dtype=torch.bool) for t, s in scores.items()}
        alive |= {t: table.to(self._device) for t, table in allowed(self.space).items()}
        if "none" in self.space.primitives:
            column = self.space.primitives.index("none")
            for mask in alive.values():
                if mask.shape[1] == len(self.space.primitives) > 1:
                    mask[:, column] = False
        edges = max(len(s) for s in scores.values())
        rounds = edges if self.pruning == "edges" else max(s.shape[1] for s in scores.values()) - 1
        for r in range(rounds):
            if r:
                kept = [{t: a * alive[t] for t, a in draw.items()} for draw in alphas]
                scores = self._score(self.supernet, kept, batch)
            scores = {t: s.masked_fill(~alive[t], -math.inf) for t, s in scores.items()}
            for t, s in scores.items():
                if self.pruning == "edges" and r < len(s):
                    alive[t][r] = torch.arange(s.shape[1], device=s.device) == s[r].argmax()
                elif self.pruning == "candidates" and bool((alive[t].sum(1) > 1).all()):
                    worst = s.masked_fill(~alive[t], math.inf).argmin(1, keepdim=True)
                    alive[t].scatter_(1, worst, False)
        return {t: s.masked_fill(~alive[t], -math.inf) for t, s in scores.items()}

    def _score(self, network: nn.Module, alphas: Sequence[Mapping[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        votes = []
        for saliency in self._saliencies:
            drawn = [saliency(network, draw, batch) for draw in alphas]
            votes.append({t: torch.stack([d[t].double() for d in drawn]).mean(0) for t in drawn[0]})
        if len(votes) == 1:
            return votes[0]
        return {t: torch.stack([_ranks(v[t]) for v in votes]).sum(0) for t in votes[0]}


def _resets(m: nn.Module) -> list[Callable[[], object]]:
    """Returns what draws a module's weights anew as its constructor did; of torch's layers without its arithmetic."""
    if type(m) in (nn.Conv2d, nn.Linear):
        weight, bias = m._parameters["weight"], m._parameters["bias"]
        assert weight is not None
        fan_in = weight[0].numel()
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
        drawn = [partial(weight.detach().uniform_, -bound, bound)]
        if bias is not None:
            drawn.append(partial(bias.detach().uniform_, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)))
        return [*drawn]
    reset = getattr(m, "reset_parameters", None)
    return [reset] if callable(reset) else []


def _ranks(scores: Tensor) -> Tensor:
    """Of each score in its row, how many it beats, ties counted half; float64."""
    below = scores[:, None, :] < scores[:, :, None]
    equal = scores[:, None, :] == scores[:, :, None]
    return below.sum(2).double() + 0.5 * (equal.sum(2) - 1)
