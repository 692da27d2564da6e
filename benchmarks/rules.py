"""The five rules of docs/training_free.md, compared: ``python -m benchmarks.rules FOLDER TABLE``.

FOLDER holds ``rank-<score>/scores.csv`` of the same 1,000 cells for synflow, naswot, jacob_cov and ntk, and
``rank-synflow-all``, all as ``fastnas rank`` leaves them. Rules whose scores are not there are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr

from fastnas.genotype import NASBench201Genotype
from fastnas.tabular import Table, nasbench201

Scores = npt.NDArray[np.float64]
CHOOSE_BY = "cifar10-valid"
FIRST = 10  # cells whose mean validation accuracy decides
RULES: dict[str, Callable[[dict[str, Scores], npt.NDArray[np.bool_]], Scores]] = {
    "synflow": lambda s, identity: s["synflow"],
    "naswot": lambda s, identity: s["naswot"],
    "synflow + naswot + jacob_cov": lambda s, identity: sum(
        (rankdata(s[name]) for name in ("synflow", "naswot", "jacob_cov")), np.zeros(len(identity))
    ),
    "residual synflow": lambda s, identity: np.where(identity, s["synflow"], -np.inf),
    "synflow + ntk": lambda s, identity: rankdata(s["synflow"]) + rankdata(s["ntk"]),
}


def read(path: Path) -> tuple[list[str], Scores]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [r["architecture"] for r in rows], np.nan_to_num([float(r["score"]) for r in rows], nan=-np.inf)


def has_identity_path(text: str) -> bool:
    """Tells whether a chain of ``skip_connect`` leads from the cell's input to its output."""
    genotype = NASBench201Genotype.from_text(text)
    reached = {0}
    for (node, source), op in zip(genotype.edges, genotype.ops, strict=True):
        if op == "skip_connect" and source in reached:
            reached.add(node)
    return genotype.nodes - 1 in reached


def compare(folder: Path, table: Table) -> dict[str, dict[str, object]]:
    """Returns, for every rule, how it does on the sample, and of the best by the full space's scores what they are."""
    scores: dict[str, Scores] = {}
    cells: list[str] = []
    for name in ("synflow", "naswot", "jacob_cov", "ntk"):
        path = folder / f"rank-{name}" / "scores.csv"
        found, values = read(path) if path.exists() else ([], np.empty(0))
        if cells and found and found[: len(cells)] != cells[: len(found)]:
            raise ValueError(f"rank-{name} is of other cells")
        if not cells:
            cells = found
        if len(found) == len(cells):
            scores[name] = values
    identity = np.array([has_identity_path(cell) for cell in cells])
    accuracy = np.array([table.find(cell)[CHOOSE_BY] for cell in cells])
    every, of_all = read(folder / "rank-synflow-all" / "scores.csv")
    everywhere = {"synflow": of_all}
    identities = np.array([has_identity_path(cell) for cell in every])
    results: dict[str, dict[str, object]] = {}
    for name, rule in RULES.items():
        try:
            values = rule(scores, identity)
        except KeyError:
            continue
        order = np.argsort(-values, kind="stable")
        ranked = np.isfinite(values)
        results[name] = {
            "ranked": int(ranked.sum()),
            "spearman": float(spearmanr(values[ranked], accuracy[ranked]).statistic),
            "first ten, valid": float(accuracy[order[:FIRST]].mean()),
            "first of the sample": numbers(table, cells[order[0]]),
        }
        if name in ("synflow", "residual synflow"):  # the others take hours on two cores
            best = every[int(np.argmax(rule(everywhere, identities)))]
            results[name]["first of all"] = {"cell": best, **numbers(table, best)}
    return results


def numbers(table: Table, cell: str) -> dict[str, float]:
    return {name: value for name, value in table.find(cell).items() if name.endswith("test")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("table", type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(compare(options.folder, nasbench201.load(options.table)), indent=2))


if __name__ == "__main__":
    main()
