from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from fastnas.study import bottom_k, operator_shares, random_top_k, ranking, stability, top_k

N = 7


def draws(seed: int = 0, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    score = random.normal(size=N) if levels is None else random.integers(levels, size=N).astype(float)
    return score, random.normal(size=N)


def orders(score: np.ndarray) -> list[tuple[int, ...]]:
    """Every order, best first, in which equal scores may come; all are equally likely."""
    return [p for p in itertools.permutations(range(N)) if all(score[a] >= score[b] for a, b in itertools.pairwise(p))]


@pytest.mark.parametrize("levels", [None, 3, 2, 1])
def test_top_k_is_the_mean_over_every_order(levels: int | None) -> None:
    score, truth = draws(1, levels)
    ways = orders(score)
    expected = [np.mean([max(truth[list(way[:k])]) for way in ways]) for k in range(1, N + 1)]
    assert top_k(score, truth) == pytest.approx(expected)
    assert top_k(score, truth, [5, 1]) == pytest.approx([expected[4], expected[0]])
    assert top_k(score, truth, 2) == pytest.approx([expected[1]])


def test_top_k_by_hand() -> None:
    score, truth = [3, 9, 1, 5, -math.inf], [10, 20, 50, 40, 60]
    assert top_k(score, truth).tolist() == [20, 40, 40, 50, 60]
    assert top_k([1, 2, 2, 0], [0, 10, 30, 99], [1, 2, 4]).tolist() == [20, 30, 99]


@pytest.mark.parametrize("ties", [False, True])
def test_random_top_k_against_every_subset(ties: bool) -> None:
    _, truth = draws(2)
    if ties:
        truth = np.round(truth)
    found = random_top_k(truth, None, (0, 0.05, 0.3, 0.5, 1))
    assert found.k.tolist() == list(range(1, N + 1))
    for k in range(1, N + 1):
        best = sorted(max(subset) for subset in itertools.combinations(truth, k))
        assert found.mean[k - 1] == pytest.approx(np.mean(best))
        expected = np.quantile(best, (0, 0.05, 0.3, 0.5, 1), method="inverted_cdf")
        assert found.quantiles[:, k - 1] == pytest.approx(expected)


def test_random_top_k_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.arange(1, 15_626, dtype=float)
    k = np.array([1, 10, 100, 15_625])
    found = random_top_k(truth, k, ())
    # the largest of k of the numbers 1 to n is k (n + 1) / (k + 1) on average
    assert found.mean == pytest.approx(k * 15_626 / (k + 1), rel=1e-12)
    assert found.quantiles.shape == (0, 4)
    curve = random_top_k(truth[:3000])
    assert curve.mean == pytest.approx(curve.k * 3001 / (curve.k + 1), rel=1e-12)
    median = np.ceil(3000 * 0.5 ** (1 / curve.k[:50]))  # of so few draws, as good as with replacement
    assert np.abs(curve.quantiles[1, :50] - median).max() < 10
    monkeypatch.setattr("fastnas.study.statistics._BLOCK", 1)
    assert random_top_k(truth, k, ()).mean == pytest.approx(found.mean, rel=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_bottom_k_is_the_mean_over_every_order(levels: int | None) -> None:
    score, truth = draws(3, levels)
    ways = orders(score)
    worst = set(np.argsort(truth)[:3])
    for k in (1, 4, N):
        common = np.mean([len(worst & set(way[N - k :])) for way in ways])
        found = bottom_k(score, truth, k, worst=3 / N)
        assert (found.k, found.worst) == (k, 3)
        assert (found.recall, found.precision) == pytest.approx((common / 3, common / k))
        assert (found.chance_recall, found.chance_precision) == pytest.approx((k / N, 3 / N))


def test_bottom_k_by_hand() -> None:
    truth = np.arange(20.0)
    perfect = bottom_k(truth, truth)
    assert (perfect.k, perfect.worst, perfect.recall, perfect.precision) == (2, 2, 1.0, 1.0)
    assert bottom_k(-truth, truth).recall == 0.0
    constant = bottom_k(np.zeros(20), truth, 5)
    assert constant.recall == pytest.approx(constant.chance_recall)
    assert constant.precision == pytest.approx(constant.chance_precision)
    # two of the three worst are equal: one of them counts, at random
    assert bottom_k([0, 1, 2, 3], [5, 5, 5, 9], 1, worst=0.5).recall == pytest.approx((2 / 3) / 2)


def test_stability() -> None:
    random = np.random.default_rng(4)
    a = random.normal(size=60)
    b = a + random.normal(size=60)
    found = stability(a, b, (1, 5, 60), resamples=20)
    assert found.correlations.spearman.value == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert found.correlations.kendall.value == pytest.approx(scipy.stats.kendalltau(a, b).statistic)
    assert found.correlations.spearman.low < found.correlations.spearman.value < found.correlations.spearman.high
    common = len(set(np.argsort(a)[-5:]) & set(np.argsort(b)[-5:])) / 5
    assert found.overlap.tolist() == [float(a.argmax() == b.argmax()), common, 1.0]
    assert found.chance == pytest.approx([1 / 60, 5 / 60, 1])
    # a score that knows nothing agrees as chance does
    assert stability(np.zeros(60), b, (1, 5), resamples=0).overlap == pytest.approx([1 / 60, 5 / 60])


def test_operator_shares_by_hand() -> None:
    ops = [("a", "a"), ("b", "a"), ("b", "b"), ("a", "b"), ("b", "b")]
    found = operator_shares([5, 1, 4, 3, 2], ops, ("a", "b", "c"), 2)
    assert found.sizes.tolist() == [3, 2]  # architectures 0, 2, 3 and 4, 1
    assert found.values.tolist() == [4, 1.5]
    assert found.by_place[0] == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 0]]))
    assert found.by_place[1] == pytest.approx(np.array([[0, 1, 0], [0.5, 0.5, 0]]))
    assert found.shares == pytest.approx(np.array([[0.5, 0.5, 0], [0.25, 0.75, 0]]))
    top = operator_shares([5, 1, 4, 3, 2], ops, ("a", "b", "c"), (1, 2))
    assert top.sizes.tolist() == [1, 2]
    assert top.shares == pytest.approx(np.array([[1, 0, 0], [0.25, 0.75, 0]]))


@pytest.mark.parametrize("levels", [3, 1])
def test_operator_shares_are_the_mean_over_every_order(levels: int) -> None:
    values, _ = draws(6, levels)
    ops = np.random.default_rng(6).choice(["x", "y", "z"], size=(N, 2))
    found = operator_shares(values, ops.tolist(), "xyz", (2, 3))
    for group, chosen in enumerate((slice(2), slice(2, 5))):
        expected = [np.mean([(ops[list(way[chosen])] == op).mean(0) for way in orders(values)], axis=0) for op in "xyz"]
        assert found.by_place[group] == pytest.approx(np.stack(expected, axis=1))


def test_operator_shares_add_up() -> None:
    random = np.random.default_rng(5)
    ops = random.choice(["x", "y", "z"], size=(103, 4)).tolist()
    found = operator_shares(random.normal(size=103), ops, ["x", "y", "z"])
    assert found.sizes.tolist() == [11] * 3 + [10] * 7
    assert found.shares.sum(1) == pytest.approx(np.ones(10))
    everywhere = (found.sizes[:, None] * found.shares).sum(0) / 103
    assert everywhere == pytest.approx([np.mean([row.count(p) / 4 for row in ops]) for p in "xyz"])


def test_ranking_puts_all_together() -> None:
    score, truth = np.arange(30.0), np.arange(30.0) ** 2
    found = ranking(score, truth, (1, 10), resamples=10)
    assert found.correlations.spearman.value == pytest.approx(1)
    assert found.top.tolist() == [29.0**2, 29.0**2]
    assert found.k.tolist() == [1, 10]
    assert found.random.mean[0] == pytest.approx(truth.mean())
    assert found.bottom.recall == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k([1, 2], [1, 2, 3]), "score and truth must be of the same architectures, got 2 and 3"),
        (lambda: top_k([1, math.nan], [1, 2]), "score must not be NaN"),
        (lambda: top_k([[1, 2]], [1, 2]), r"score must be \(N,\)"),
        (lambda: top_k([1, 2], [1, 2], 3), "k=3 must be whole numbers from 1 to 2"),
        (lambda: random_top_k([1, 2], 1.5), "k=1.5 must be whole numbers"),  # type: ignore[arg-type]
        (lambda: random_top_k([1, -math.inf], 1), "truth must be finite"),
        (lambda: random_top_k([1, 2], 1, [2]), r"quantiles=\[2\] must be numbers from 0 to 1"),
        (lambda: bottom_k([1, 2], [1, 2], worst=0), "worst=0 must be above 0"),
        (lambda: operator_shares([1], [["d"]], "abc"), "'d' is none of the primitives a, b, c"),
        (lambda: operator_shares([1, 2], [["a"], ["a", "b"]], "ab", 1), "must have as many places"),
        (lambda: operator_shares([1, 2], [["a"]], "ab", 1), r"for each of 2 values, got \(1, 1\)"),
        (lambda: operator_shares([1], [["a"]], "a", 2), "groups=2 must be groups of 1 or more of the 1"),
        (lambda: operator_shares([1], [["a"]], "a", 0), "groups=0 must be groups"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
