"""What studies of supernets came to: ``python -m benchmarks.studies NAME=RUN,RUN,... [NAME=...]``.

RUN is a folder that ``fastnas study`` left, NAME what several are called that differ in nothing but the seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.searches import spread, text
from fastnas._files import read_table
from fastnas.saliency.statistics import correlate
from fastnas.study.statistics import bottom_k

Rows = list[dict[str, str]]

SAME = ("space", "column", "sample", "channels", "layers", "epochs", "batch_size", "train_portion", "images", "bn")
SHOWN = (
    "supernet_mean",
    "spearman",
    "kendall",
    "top1",
    "top10",
    "bottom_recall",
    "top_recall",
    "stability",
    "agreement",
)
PRUNED = (
    "count",
    "top10",
    "random10_pruned",
    "random10_whole",
    "spearman",
    "supernet_mean",
    "supernet_best",
    "truth_mean",
)
KEYS = ("epoch", "bn", "by", "place", "group", "size", "mean", "count")


def figures(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns mean and standard deviation over the folders' studies."""
    options = [json.loads((folder / "study.json").read_text()) for folder in folders]
    result: dict[str, Any] = {"seeds": [o["seed"] for o in options]}
    result |= {name: options[0][name] for name in SAME if all(o[name] == options[0][name] for o in options)}
    subnets, summaries = ([read_table(f / f"{name}.csv") for f in folders] for name in ("subnets", "summary"))
    result["snapshots"] = [snapshot(rows, subnets) for rows in zip(*summaries, strict=True)]
    result["top10 of each"] = [float(rows[-1]["top10"]) for rows in summaries]
    truth = sorted((float(row["truth"]) for row in subnets[0]), reverse=True)
    result["truth"] = {
        "best": truth[0],
        "best hundredth from": truth[max(0, len(truth) // 100 - 1)],
        "best tenth from": truth[max(0, len(truth) // 10 - 1)],
        "with 10 %, chance": sum(value == 10 for value in truth),
    }
    tables = [read_table(folder / "operators.csv") for folder in folders]
    groups = {row["group"] for row in tables[0]}
    ends = {min(groups, key=int): "best tenth", max(groups, key=int): "worst tenth"}
    result["operators"] = [
        {**{k: rows[0][k] for k in ("by", "epoch", "bn")}, "part": ends[rows[0]["group"]], **means(rows)}
        for rows in zip(*tables, strict=True)
        if rows[0]["place"] == "all" and rows[0]["group"] in ends
    ]
    if (folders[0] / "pruning.csv").exists():
        result["pruning"] = [
            {"prune": rows[0]["prune"], "keep": rows[0]["keep"], **{name: number(rows, name) for name in PRUNED}}
            for rows in zip(*(read_table(folder / "pruning.csv") for folder in folders), strict=True)
        ]
    return result


def snapshot(rows: Sequence[Mapping[str, str]], subnets: Sequence[Rows]) -> dict[str, Any]:
    """Returns what the supernets of all seeds say after an epoch.

    ``top_recall`` is ``bottom_recall`` of the best tenth; ``agreement`` Spearman's ρ between each two seeds.
    """
    epoch, bn = rows[0]["epoch"], rows[0]["bn"]
    accuracies = [[float(row[f"epoch{epoch}_{bn}"]) for row in table] for table in subnets]
    truth = np.array([float(row["truth"]) for row in subnets[0]])
    best = [bottom_k(-np.array(values), -truth).recall for values in accuracies]
    agreement = [correlate(a, b, resamples=0).spearman.value for a, b in itertools.combinations(accuracies, 2)]
    return {
        "epoch": int(epoch),
        "bn": bn,
        **{name: number(rows, name) for name in rows[0] if name not in KEYS},
        "top_recall": spread(best),
        "agreement": spread(agreement) if agreement else None,
    }


def number(rows: Iterable[Mapping[str, str]], name: str) -> dict[str, float | None] | None:
    """Returns the spread of a column; None where it is empty."""
    values = [float(row[name]) for row in rows if row[name]]
    return spread(values) if values else None


def means(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Returns the mean share of each operator."""
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0] if name not in KEYS}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def shown(value: object) -> str:
    if isinstance(value, dict):
        return text(value)
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("studies", nargs="+", metavar="NAME=RUN,RUN,...")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    results = {}
    for argument in options.studies:
        name, _, folders = argument.partition("=")
        results[name] = found = figures([Path(folder) for folder in folders.split(",")])
        for title, rows, columns in (
            ("snapshots", found["snapshots"], ("epoch", "bn", *SHOWN)),
            ("operators", found["operators"], list(found["operators"][0])),
            ("pruning", found.get("pruning", []), ("prune", "keep", *PRUNED)),
        ):
            if rows:
                print(f"\n{name}, {title}\n\n" + table(columns, [[shown(row[c]) for c in columns] for row in rows]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
