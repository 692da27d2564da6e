"""What a ranking of architectures is worth, beside its correlation (after arXiv:2010.08219).

Scores and ground truths are (N,), one number an architecture, the larger the better. Where several architectures share
a score, their order is a matter of chance, and what comes out is its expectation. A size is a score as well: ranking by
parameters or multiply-adds is :func:`ranking` of that column of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastnas.saliency.statistics import Correlations, correlate

Floats = npt.NDArray[np.float64]
_BLOCK = 64  # numbers of draws that are computed together


@dataclass(frozen=True)
class RandomTop:
    """The best of k architectures that are drawn at random.

    Attributes:
        k: (K,) how many are drawn.
        mean: (K,) the expectation of the best one's ground truth.
        quantiles: (Q, K) its quantiles.
    """

    k: npt.NDArray[np.int64]
    mean: Floats
    quantiles: Floats


@dataclass(frozen=True)
class Bottom:
    """How many of the worst architectures are among those that a score ranks last.

    Attributes:
        k: How many are ranked last.
        worst: How many are the worst.
        recall: Share of the worst that is ranked last.
        precision: Share of those ranked last that is of the worst.
        chance_recall: What a random order has for the first, k / N.
        chance_precision: And for the second, worst / N.
    """

    k: int
    worst: int
    recall: float
    precision: float
    chance_recall: float
    chance_precision: float


@dataclass(frozen=True)
class Stability:
    """How far two scores order the same architectures alike.

    Attributes:
        correlations: Rank correlations, with their intervals.
        k: (K,) sizes of the top.
        overlap: (K,) share of one's top k that is in the other's.
        chance: (K,) what two random orders have, k / N.
    """

    correlations: Correlations
    k: npt.NDArray[np.int64]
    overlap: Floats
    chance: Floats


@dataclass(frozen=True)
class OperatorShares:
    """What architectures are made of, by their place in a ranking.

    Attributes:
        primitives: O names.
        sizes: (G,) architectures of each group, the best group first.
        values: (G,) mean value of each group.
        shares: (G, O) the mean share of each operator among the places of an architecture.
        by_place: (G, L, O) the share of each operator at each place: an edge or a layer.
    """

    primitives: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    values: Floats
    shares: Floats
    by_place: Floats


@dataclass(frozen=True)
class Ranking:
    """What a score says of the ground truth.

    Attributes:
        correlations: Rank correlations, with their intervals.
        k: (K,) sizes of the top.
        top: (K,) the best ground truth in the score's top k.
        random: The same of k architectures drawn at random.
        bottom: Whether it finds the bad ones.
    """

    correlations: Correlations
    k: npt.NDArray[np.int64]
    top: Floats
    random: RandomTop
    bottom: Bottom


def top_k(score: npt.ArrayLike, truth: npt.ArrayLike, k: int | Sequence[int] | None = None) -> Floats:
    """Returns the best ground truth among the k architectures that a score ranks first, (K,).

    Args:
        score: (N,).
        truth: (N,).
        k: one or several, each from 1 to N; None is 1, 2, ..., N: the whole curve.

    Raises:
        ValueError: for other shapes, NaN, or a k out of range.
    """
    s, t = _pair("score", score, "truth", truth)
    ks = _sizes(k, len(s))
    order = np.argsort(-s, kind="stable")
    s, t = s[order], t[order]
    best = np.maximum.accumulate(t)
    starts = np.searchsorted(-s, -s, side="left")  # of the architectures of equal score
    ends = np.searchsorted(-s, -s, side="right")
    result: Floats = best[ks - 1]
    for start in np.unique(starts[ks - 1][ends[ks - 1] > ks]):
        # j of the equal ones count, at random; the best before them is there in any case
        end = ends[start]
        before = best[start - 1] if start else -np.inf
        inside = (ks > start) & (ks < end)
        result[inside] = random_top_k(np.maximum(t[start:end], before), ks[inside] - start, ()).mean
    return result


def random_top_k(
    truth: npt.ArrayLike,
    k: int | Sequence[int] | npt.NDArray[np.int64] | None = None,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
) -> RandomTop:
    """Returns what the best of k architectures is worth that are drawn at random without replacement, exactly.

    With the ground truths in ascending order, the best is at most the i-th with probability C(i, k) / C(N, k), and it
    is the i-th with probability C(i - 1, k - 1) / C(N, k). A quantile q is the lowest value that the best exceeds with
    probability at most 1 - q.

    Args:
        truth: (N,).
        k: one or several, each from 1 to N; None is 1, 2, ..., N.
        quantiles: Q numbers from 0 to 1.

    Raises:
        ValueError: for another shape, a ground truth that is not finite, or a number out of range.
    """
    t = np.sort(_vector("truth", truth))
    n, ks = len(t), _sizes(k, len(t))
    if not np.isfinite(t).all():
        raise ValueError("truth must be finite, or the best of some architectures has no mean: leave others out")
    qs = np.asarray(quantiles, np.float64)
    if qs.ndim != 1 or not ((qs >= 0) & (qs <= 1)).all():
        raise ValueError(f"quantiles={quantiles} must be numbers from 0 to 1")
    mean, found = np.empty(len(ks)), np.empty((len(qs), len(ks)))
    order = np.argsort(ks, kind="stable")
    for block in np.split(order, range(_BLOCK, len(ks), _BLOCK)):
        c = ks[block][:, None]
        # C(i, k) / C(n, k) is at most (i / n)^k: what is below 1e-18 can be left out
        width = min(n, math.ceil(-n * math.expm1(-42 / int(c[0, 0]))) + 1)
        i = np.arange(n - width + 1, n + 1)
        # and it is the product of (m - k) / m over m from i + 1 to n
        logs = np.log1p(-np.where(i > c, c / i, 0.0))[:, ::-1].cumsum(axis=1)[:, ::-1]
        cumulative = np.where(i >= c, np.exp(np.append(logs[:, 1:], np.zeros_like(logs[:, :1]), axis=1)), 0.0)
        mean[block] = np.diff(cumulative, axis=1, prepend=0.0) @ t[-width:]
        for q, row in zip(qs, found, strict=True):
            row[block] = t[n - width + (cumulative >= q - 1e-12).argmax(axis=1)] if q else t[c[:, 0] - 1]
    return RandomTop(ks, mean, found)


def bottom_k(score: npt.ArrayLike, truth: npt.ArrayLike, k: int | None = None, worst: float = 0.1) -> Bottom:
    """Returns how many of the worst architectures are among the k that a score ranks last.

    Args:
        score: (N,).
        truth: (N,).
        k: how many are ranked last, 1 to N; as many as the worst where None.
        worst: the share of all architectures that counts as the worst, above 0 and at most 1; at least one.

    Raises:
        ValueError: for other shapes, NaN, or a number out of range.
    """
    s, t = _pair("score", score, "truth", truth)
    n = len(s)
    if not 0 < worst <= 1:
        raise ValueError(f"worst={worst} must be above 0 and at most 1, a share of the architectures")
    bad = max(1, round(worst * n))
    (last,) = _sizes(bad if k is None else k, n).tolist()
    common = float((_top(-s, last) * _top(-t, bad)).sum())
    return Bottom(last, bad, common / bad, common / last, last / n, bad / n)


def stability(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    k: int | Sequence[int] = (1, 10),
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Stability:
    """Returns how far two scores of the same architectures agree on their order.

    Args:
        first: (N,), N at least 3.
        second: (N,).
        k: sizes of the top, one or several, each from 1 to N.
        resamples: of the correlations' intervals; 0 for none.
        seed: of those.

    Raises:
        ValueError: for other shapes, NaN, or a k out of range.
    """
    a, b = _pair("first", first, "second", second)
    ks = _sizes(k, len(a))
    overlap = np.array([(_top(a, size) * _top(b, size)).sum() / size for size in ks.tolist()])
    return Stability(correlate(a, b, resamples=resamples, seed=seed), ks, overlap, ks / len(a))


def operator_shares(
    values: npt.ArrayLike,
    ops: Sequence[Sequence[str]],
    primitives: Sequence[str],
    groups: int | Sequence[int] = 10,
) -> OperatorShares:
    """Returns the share of each operator in groups of architectures, from the best to the worst.

    Args:
        values: (N,) what they are ranked by, a score or the ground truth.
        ops: N times the operators at an architecture's L places, such as the ``ops`` of its genotype.
        primitives: O names; the operators are among them.
        groups: how many groups, as equal in size as can be; or the sizes of the first groups: (10, 90) are the ten best
            and the ninety that follow.

    Raises:
        ValueError: where the arguments do not fit together.
    """
    v = _vector("values", values)
    names = tuple(primitives)
    number = {name: o for o, name in enumerate(names)}
    try:
        table = np.array([[number[op] for op in row] for row in ops])
    except KeyError as error:
        raise ValueError(f"ops: {error.args[0]!r} is none of the primitives {', '.join(names)}") from None
    except ValueError:
        raise ValueError("ops: every architecture must have as many places") from None
    if len(table) != len(v) or table.ndim != 2 or not table.shape[1]:
        raise ValueError(f"ops must have one row of operators for each of {len(v)} values, got {table.shape}")
    if isinstance(groups, int):
        sizes = np.array([len(part) for part in np.array_split(v, max(groups, 1))]) if groups else np.array([0])
    else:
        sizes = np.asarray(groups, np.int64)
    if sizes.ndim != 1 or not len(sizes) or sizes.min() < 1 or sizes.sum() > len(v):
        raise ValueError(f"groups={groups} must be groups of 1 or more of the {len(v)} architectures")
    order = np.argsort(-v, kind="stable")
    v, chosen = v[order], np.eye(len(names))[table[order]]  # (N, L, O)
    equal = np.flatnonzero(np.append(True, v[1:] != v[:-1]))  # where those of another value begin
    counts = np.diff(np.append(equal, len(v)))
    expected = np.repeat(np.add.reduceat(chosen, equal) / counts[:, None, None], counts, axis=0)[: sizes.sum()]
    starts = np.cumsum(sizes) - sizes
    by_place = np.add.reduceat(expected, starts) / sizes[:, None, None]
    values_of = np.add.reduceat(v[: sizes.sum()], starts) / sizes
    return OperatorShares(names, sizes, values_of, by_place.mean(axis=1), by_place)


def ranking(
    score: npt.ArrayLike,
    truth: npt.ArrayLike,
    k: int | Sequence[int] | None = (1, 10),
    worst: float = 0.1,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Ranking:
    """Returns what a score says of the ground truth.

    Args:
        score: (N,), N at least 3; of architectures, the numbers of their parameters, ...
        truth: (N,).
        k: as :func:`top_k`.
        worst: as :func:`bottom_k`.
        resamples: of the correlations' intervals; 0 for none.
        seed: of those.

    Raises:
        ValueError: for other shapes, NaN, or a number out of range.
    """
    correlations = correlate(score, truth, resamples=resamples, seed=seed)
    random = random_top_k(truth, k)
    return Ranking(correlations, random.k, top_k(score, truth, k), random, bottom_k(score, truth, worst=worst))


def _top(values: Floats, k: int) -> Floats:
    """Returns for each value the probability that it is among the k largest, (N,): 0 or 1 but for equal ones."""
    edge = np.partition(values, len(values) - k)[len(values) - k]
    above, equal = values > edge, values == edge
    share: Floats = above + equal * ((k - above.sum()) / equal.sum())
    return share


def _sizes(k: int | Sequence[int] | npt.NDArray[np.int64] | None, n: int) -> npt.NDArray[np.int64]:
    sizes = np.arange(1, n + 1) if k is None else np.atleast_1d(np.asarray(k))
    if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer) or not ((sizes >= 1) & (sizes <= n)).all():
        raise ValueError(f"k={k} must be whole numbers from 1 to {n}, the number of architectures")
    return sizes.astype(np.int64)


def _vector(name: str, values: npt.ArrayLike) -> Floats:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be (N,), one number an architecture, got {vector.shape}")
    if np.isnan(vector).any():
        raise ValueError(f"{name} must not be NaN: leave those architectures out")
    return vector


def _pair(first: str, x: npt.ArrayLike, second: str, y: npt.ArrayLike) -> tuple[Floats, Floats]:
    a, b = _vector(first, x), _vector(second, y)
    if a.shape != b.shape:
        raise ValueError(f"{first} and {second} must be of the same architectures, got {len(a)} and {len(b)} numbers")
    return a, b
