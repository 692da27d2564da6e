"""What a study writes: the numbers of every subnet, of every snapshot, of operators and of pruned spaces."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnas._files import write_table, write_text
from fastnas.saliency.statistics import correlate
from fastnas.spaces import Space
from fastnas.study.architectures import Known, operators, places
from fastnas.study.config import StudyOptions
from fastnas.study.statistics import Floats, bottom_k, operator_shares, random_top_k, ranking, stability, top_k

Row = dict[str, object]
_TOP = (1, 10)
_WORST = 0.1
_GROUPS = 10
_PRUNED = (  # what pruning.csv has of a summary
    *("epoch", "bn", "count", "top10", "spearman", "spearman_low", "spearman_high", "kendall"),
    *("supernet_mean", "supernet_best", "truth_mean", "bottom_recall"),
)


@dataclass(frozen=True)
class Snapshot:
    """What a supernet made of the architectures at some time of its training.

    Attributes:
        epoch: Epochs that it had been trained for.
        bn: The mode: whose statistics normalised the subnets, and what they were fine-tuned by.
        accuracies: One an architecture, 0 to 1.
    """

    epoch: int
    bn: str
    accuracies: list[float]


@dataclass(frozen=True)
class Studied:
    """What a supernet says of architectures.

    Attributes:
        of: The architectures, and what they are worth.
        sizes: ``params`` and ``flops`` of their own networks.
        snapshots: By epoch, and within one by batch norm mode.
    """

    of: Known
    sizes: dict[str, list[float]]
    snapshots: list[Snapshot]

    @property
    def verdict(self) -> Snapshot:
        """The last snapshot, in the first mode."""
        last = self.snapshots[-1].epoch
        return next(s for s in self.snapshots if s.epoch == last)


def write_results(folder: Path, space: Space, options: StudyOptions, studied: Studied) -> list[Row]:
    """Returns the rows of ``summary.csv``, which it writes, and beside it ``summary.json`` and the other tables."""
    _write_csv(folder / "subnets.csv", _subnets(studied))
    rows = summary(studied, options.seed)
    _write_csv(folder / "summary.csv", rows)
    truth = np.asarray(studied.of.truth)
    content = {
        "space": options.space,
        "column": options.column,
        "architectures": len(truth),
        "truth_mean": float(truth.mean()),
        "truth_best": float(truth.max()),
        "size_truth_spearman": {
            name: correlate(values, truth, resamples=0).spearman.value for name, values in studied.sizes.items()
        },
        "snapshots": rows,
    }
    write_text(folder / "summary.json", json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")
    _write_csv(folder / "top.csv", _top_curves(studied))
    _write_csv(folder / "bottom.csv", _bottom_curves(studied))
    _write_csv(folder / "operators.csv", _operators(space, studied))
    return rows


def summary(studied: Studied, seed: int = 0) -> list[Row]:
    """Returns a row for each snapshot and mode: what ``docs/study.md`` lists."""
    truth = np.asarray(studied.of.truth)
    k = [min(k, len(truth)) for k in _TOP]
    rows, before = [], dict[str, Snapshot]()
    for snapshot in studied.snapshots:
        accuracies = np.asarray(snapshot.accuracies)
        found = ranking(accuracies, truth, k, _WORST, seed=seed)
        c, b = found.correlations, found.bottom
        row: Row = {
            "epoch": snapshot.epoch,
            "bn": snapshot.bn,
            "count": len(truth),
            "supernet_mean": float(accuracies.mean()),
            "supernet_best": float(accuracies.max()),
            "truth_mean": float(truth.mean()),
        }
        for name, e in (("spearman", c.spearman), ("kendall", c.kendall)):
            row |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
        for size, top, chance in zip(_TOP, found.top, found.random.mean, strict=True):
            row |= {f"top{size}": float(top), f"random{size}": float(chance)}
        row |= {"bottom_recall": b.recall, "bottom_chance": b.chance_recall}
        previous = before.get(snapshot.bn)
        if previous is not None:
            same = stability(previous.accuracies, accuracies, k, resamples=0)
            row |= {"stability": same.correlations.spearman.value, "stability_top10": float(same.overlap[-1])}
        else:
            row |= {"stability": math.nan, "stability_top10": math.nan}
        for name, values in studied.sizes.items():
            row[f"{name}_supernet_spearman"] = correlate(values, accuracies, resamples=0).spearman.value
            row[f"{name}_truth_spearman"] = correlate(values, truth, resamples=0).spearman.value
        before[snapshot.bn] = snapshot
        rows.append(row)
    return rows


def pruning_row(kind: str, part: float, rows: Sequence[Row], truth: Sequence[float], whole: Sequence[Row]) -> Row:
    """Returns what the last snapshot of a supernet says of a pruned space.

    Args:
        kind: what it was pruned by.
        part: the part of the architectures that it keeps.
        rows: the summary of its supernet.
        truth: what its architectures are worth.
        whole: the summary of the supernet of the whole space, of all studied architectures.
    """
    row = next(row for row in rows if row["epoch"] == rows[-1]["epoch"])  # the first mode
    return {
        "prune": kind,
        "keep": part,
        **{name: row[name] for name in _PRUNED},
        "random10_pruned": row["random10"],
        "random10_whole": whole[-1]["random10"],
        "truth_best": max(truth),
    }


def write_pruning(folder: Path, rows: Sequence[Row]) -> None:
    """Writes ``pruning.csv``."""
    _write_csv(folder / "pruning.csv", rows)


def _subnets(studied: Studied) -> list[Row]:
    rows = []
    for n, (genotype, truth) in enumerate(zip(studied.of.genotypes, studied.of.truth, strict=True)):
        row: Row = {"architecture": genotype.to_text(), "truth": truth}
        row |= {name: int(values[n]) for name, values in studied.sizes.items()}
        row |= {f"epoch{s.epoch}_{s.bn}": s.accuracies[n] for s in studied.snapshots}
        rows.append(row)
    return rows


def _top_curves(studied: Studied) -> list[Row]:
    """Returns the best ground truth of the first k by each snapshot, and of k at random, k = 1, 2, 5, 10, 20, ..."""
    truth = np.asarray(studied.of.truth)
    k = _curve(len(truth))
    chance = random_top_k(truth, k)
    rows: list[Row] = [
        {"by": "random", "epoch": "", "bn": "", "k": size, "best": float(mean), "low": float(low), "high": float(high)}
        for size, mean, low, high in zip(k, chance.mean, chance.quantiles[0], chance.quantiles[-1], strict=True)
    ]
    for by, values in _rankings(studied):
        rows += [{**by, "k": size, "best": float(top)} for size, top in zip(k, top_k(values, truth, k), strict=True)]
    return rows


def _bottom_curves(studied: Studied) -> list[Row]:
    """Returns which of the worst tenth are among the last k by each snapshot, and at random, for the same k."""
    rows: list[Row] = []
    chance: tuple[Row, Floats] = ({"by": "random", "epoch": "", "bn": ""}, np.zeros(len(studied.of.truth)))
    for by, values in [chance, *_rankings(studied)]:
        for size in _curve(len(values)):
            found = bottom_k(values, studied.of.truth, size, _WORST)
            rows.append({**by, "k": size, "recall": found.recall, "precision": found.precision})
    return rows


def _curve(count: int) -> list[int]:
    return sorted({min(count, step * 10**power) for power in range(5) for step in (1, 2, 5)})


def _rankings(studied: Studied) -> Iterator[tuple[Row, Floats]]:
    """Yields what architectures are ranked by: each snapshot, and sizes."""
    for s in studied.snapshots:
        yield {"by": "supernet", "epoch": s.epoch, "bn": s.bn}, np.asarray(s.accuracies)
    for name, values in studied.sizes.items():
        yield {"by": name, "epoch": "", "bn": ""}, np.asarray(values)


def _operators(space: Space, studied: Studied) -> list[Row]:
    """Returns the share of each operator in tenths of the architectures, over all places and at each."""
    ops = [operators(genotype) for genotype in studied.of.genotypes]
    names = places(space, studied.of.genotypes[0])
    primitives = tuple(dict.fromkeys([*space.primitives, *(op for row in ops for op in row)]))
    rows: list[Row] = []
    truth: tuple[Row, Floats] = ({"by": "truth", "epoch": "", "bn": ""}, np.asarray(studied.of.truth))
    for by, values in [truth, *_rankings(studied)]:
        found = operator_shares(values, ops, primitives, min(_GROUPS, len(values)))
        for group in range(len(found.sizes)):
            head: Row = {**by, "group": group + 1, "size": int(found.sizes[group]), "mean": float(found.values[group])}
            tables = [("all", found.shares[group]), *zip(names, found.by_place[group], strict=True)]
            for place, shares in tables:
                rows.append({**head, "place": place, **dict(zip(primitives, map(float, shares), strict=True))})
    return rows


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    blank = ({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows)
    write_table(path, columns, blank)


def _plain(value: object) -> object:
    """Returns the value without NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
