from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastnas.saliency.statistics import correlate


def pairs_kendall(x: list[float], y: list[float]) -> float:
    """Returns τ-b from its definition, pair by pair."""
    agree = ties_x = ties_y = 0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree += a * b
        ties_x += a == 0
        ties_y += b == 0
    return agree / math.sqrt((len(pairs) - ties_x) * (len(pairs) - ties_y))


def ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def test_the_definitions_with_ties() -> None:
    x, y = [3.0, 1, 4, 1, 5, 9, 2, 6], [2.0, 7, 1, 8, 2, 8, 1, 8]
    found = correlate(x, y, resamples=0)
    assert found.count == 8
    assert found.kendall.value == pytest.approx(pairs_kendall(x, y))
    assert found.spearman.value == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert math.isnan(found.spearman.low)
    assert math.isnan(found.kendall.high)


def test_only_the_order_matters() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=40), random.normal(size=40)
    assert correlate(x, y) == correlate(np.exp(50 * x), y)
    low = x.copy()
    low[x.argmin()] = -math.inf
    low[x.argmax()] = math.inf
    assert correlate(low, y) == correlate(x, y)


def test_the_intervals() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=200)
    y = x + random.normal(size=200)
    found = correlate(x, y, seed=5)
    assert found == correlate(x, y, seed=5)
    assert found != correlate(x, y, seed=6)
    for estimate, error in ((found.spearman, 0.04), (found.kendall, 0.03)):
        assert estimate.low < estimate.value < estimate.high
        # the standard errors of both statistics at this correlation and size, within a factor of two
        assert error < (estimate.high - estimate.low) / 2 / 1.96 * 2 < 4 * error
    narrow = correlate(x, y, seed=5, confidence=0.5)
    assert found.spearman.low < narrow.spearman.low < narrow.spearman.high < found.spearman.high


def test_resamples_are_those_of_the_definition() -> None:
    """The interval of Spearman's ρ is that of ρ computed anew on the same draws."""
    random = np.random.default_rng(2)
    x, y = random.normal(size=30), random.normal(size=30)
    rows = np.random.default_rng(7).integers(30, size=(50, 30))
    rhos = [np.corrcoef(ranks(list(x[r])), ranks(list(y[r])))[0, 1] for r in rows]
    found = correlate(x, y, resamples=50, seed=7).spearman
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(rhos, [0.025, 0.975])))


def test_many_pairs_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=25), random.normal(size=25)
    whole = correlate(x, y, resamples=40)
    monkeypatch.setattr("fastnas.saliency.statistics._NUMBERS", 100)
    assert correlate(x, y, resamples=40) == whole


def test_constant_quantities_have_no_order() -> None:
    found = correlate([1, 1, 1, 1], [1, 2, 3, 4])
    assert math.isnan(found.spearman.value)
    assert math.isnan(found.kendall.value)
    assert math.isnan(found.kendall.low)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1, 2]), "at least 3"),
        (([1, 2, 3], [1, 2]), r"got \(3,\) and \(2,\)"),
        (([1, 2, math.nan], [1, 2, 3]), "must not be NaN"),
    ],
)
def test_errors(arguments: tuple[list[float], list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlate(*arguments)
    with pytest.raises(ValueError, match="confidence=1"):
        correlate([1, 2, 3], [1, 2, 3], confidence=1)
