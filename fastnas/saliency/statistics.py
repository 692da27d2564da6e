"""How well one ranking predicts another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_NUMBERS = 2**22  # that a block of resamples may hold at the same time


@dataclass(frozen=True)
class Estimate:
    """A statistic and the interval that its resamples fall into; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of two quantities.

    Attributes:
        count: Pairs that they are of.
        spearman: Spearman's ρ: the correlation of the ranks.
        kendall: Kendall's τ-b: pairs in the same order less pairs in opposite order, as a part of all, ties allowed
            for.
    """

    count: int
    spearman: Estimate
    kendall: Estimate


def correlate(
    x: npt.ArrayLike, y: npt.ArrayLike, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Correlations:
    """Returns the rank correlations of two quantities, with percentile bootstrap intervals.

    Pairs are drawn with replacement. Equal values share their mean rank; −inf and inf are the lowest and the highest
    values. The same seed gives the same intervals. Where one quantity is constant nothing is defined.

    Args:
        x: (N,), N at least 3.
        y: (N,).
        resamples: how many; 0 for no intervals (NaN).
        confidence: part of the resamples that is inside the interval.
        seed: of the draws.

    Raises:
        ValueError: for other shapes, fewer than three pairs, or NaN.
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 3:
        raise ValueError(f"x and y must be (N,) with N at least 3, got {first.shape} and {second.shape}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("x and y must not be NaN: leave those pairs out")
    if resamples < 0 or not 0 < confidence < 1:
        raise ValueError(f"resamples={resamples} must be at least 0, confidence={confidence} between 0 and 1")
    # Whole ranks are all that either statistic looks at, and compare faster than the values.
    a, b = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (first, second))
    n = len(a)
    random = np.random.default_rng(seed)
    rhos: list[npt.NDArray[np.float64]] = []
    taus: list[float] = []
    while len(taus) < resamples:
        rows = random.integers(n, size=(min(resamples - len(taus), max(1, _NUMBERS // n)), n))
        rhos.append(_spearman(a[rows], b[rows]))
        taus += [_kendall(a[row], b[row]) for row in rows]
    return Correlations(
        n,
        _estimate(float(_spearman(a[None], b[None])[0]), np.concatenate([np.empty(0), *rhos]), confidence),
        _estimate(_kendall(a, b), np.array(taus), confidence),
    )


def _spearman(x: npt.NDArray[np.signedinteger[Any]], y: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.float64]:
    """Returns Spearman's ρ of each row, (R,) from (R, N); NaN where a row is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (x, y)]
    a, b = ranks
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    rho: npt.NDArray[np.float64] = np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)
    return rho


def _kendall(x: npt.NDArray[np.signedinteger[Any]], y: npt.NDArray[np.signedinteger[Any]]) -> float:
    from scipy.stats import kendalltau

    if x.min() == x.max() or y.min() == y.max():
        return math.nan
    return float(kendalltau(x, y, method="asymptotic").statistic)  # the p-value is not looked at, this one is cheap


def _estimate(value: float, resampled: npt.NDArray[np.float64], confidence: float) -> Estimate:
    resampled = resampled[~np.isnan(resampled)]
    if math.isnan(value) or len(resampled) == 0:
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))
