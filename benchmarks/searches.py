"""What searches found, in one table: ``python -m benchmarks.searches TABLE RUN [RUN ...]``.

RUN is a folder that ``fastnas search --table TABLE`` left. Runs that differ in nothing but the seed are one row. In
front are two rows without a search: what untrained alphas stand for, and random cells.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fastnas._files import read_table
from fastnas.genotype import AnyGenotype
from fastnas.search.run import RunFolder
from fastnas.spaces import get_space
from fastnas.tabular import open_table

COLUMNS = ("c10_test_e200", "c100_test_e200", "in16_test_e200")
BASELINE = 1000  # architectures
IGNORED = {"seed", "device", "threads", "table", "root"}
CURVES = ("epoch", "valid_accuracy", "alpha_spread", "discrete/", "table/", "sampled/", "hessian/")


def baselines(space_name: str, table_path: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of architectures that nothing was searched for."""
    space, table = get_space(space_name), open_table(table_path, space_name)

    def row(architectures: Iterable[AnyGenotype]) -> dict[str, Any]:
        found = [table.find(a) for a in architectures if a in table]
        return {"seeds": len(found), **{name: spread([f[name] for f in found]) for name in COLUMNS}}

    generators = [torch.Generator().manual_seed(seed) for seed in range(BASELINE)]
    return {
        "untrained alphas": row(space.derive(space.init_alphas(g)) for g in generators),
        "random": row(space.sample(g) for g in generators),
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean and the standard deviation (n - 1), which one value has not."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def text(value: Mapping[str, Any]) -> str:
    """Returns what a table shows of a mean and a standard deviation."""
    return f"{value['mean']:,.2f}" + ("" if value["std"] is None else f" ± {value['std']:,.2f}")


def rows(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Returns a row for each set of runs that differ in the seed alone, under a name that tells the sets apart."""
    runs = [(RunFolder(folder).config().to_dict(), metrics(folder)) for folder in folders]
    sets: dict[str, list[tuple[dict[str, Any], list[dict[str, str]]]]] = {}
    for options, epochs in runs:
        key = json.dumps(alike(options), sort_keys=True)
        sets.setdefault(key, []).append((options, epochs))
    keys = [json.loads(key) for key in sets]
    result = {}
    for own, members in zip(keys, sets.values(), strict=True):
        last = [epochs[-1] for _, epochs in members]
        result[label(own, keys)] = {
            "seeds": len(members),
            **{name: spread([float(r[f"table/{name}"]) for r in last]) for name in COLUMNS},
            "genotypes": [r["genotype"] for r in last],
            "skips": spread([float(r["discrete/skips"]) for r in last]),
            "supernet accuracy": spread([100 * float(r["valid_accuracy"]) for r in last]),
            "discrete accuracy": spread([100 * float(r["discrete/accuracy"]) for r in last]),
            "minutes": float(np.mean([sum(float(r["seconds"]) for r in epochs) / 60 for _, epochs in members])),
            "peak MiB": max(float(r["peak_memory"]) for r in last) / 2**20,
        }
    return result


def alike(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that are the same in runs of one row."""
    return {name: value for name, value in options.items() if name not in IGNORED}


def curves(folders: Sequence[Path]) -> dict[str, list[dict[str, str]]]:
    """Returns what was measured after the epochs of each run, under its row's name and its seed."""
    runs = {folder: RunFolder(folder).config().to_dict() for folder in folders}
    keys = [alike(options) for options in runs.values()]
    return {
        f"{label(key, keys)}, seed {options['seed']}": [
            {name: value for name, value in row.items() if name.startswith(CURVES)} for row in metrics(folder)
        ]
        for (folder, options), key in zip(runs.items(), keys, strict=True)
    }


def label(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Returns the method's name, and the options in which runs of the same method differ."""
    same = [o for o in others if o["method"] == own["method"]]
    differ = [name for name in own if any(o.get(name) != own[name] for o in same)]
    return own["method"] + "".join(f", {name} {own[name]}" for name in differ)


def metrics(folder: Path) -> list[dict[str, str]]:
    """Returns the epochs of a run."""
    return read_table(folder / "metrics.csv")


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| search | seeds | CIFAR-10 | CIFAR-100 | ImageNet16-120 | skips | minutes |", "| --- " * 7 + "|"]
    for name, row in results.items():
        cells = [text(row[name]) for name in COLUMNS]
        skips = f"{row['skips']['mean']:.0%}" if "skips" in row else ""
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
        lines.append("| " + " | ".join([name, str(row["seeds"]), *cells, skips, minutes]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searches", description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="also write the numbers here, beside those of other searches")
    options = parser.parse_args(arguments)
    space = yaml.safe_load((options.runs[0] / "config.yaml").read_text())["space"]
    results = dict(itertools.chain(baselines(space, options.table).items(), rows(options.runs).items()))
    print(markdown(results))
    if options.json:
        content = json.loads(options.json.read_text()) if options.json.exists() else {"results": {}, "curves": {}}
        content["results"].update(results)
        content["curves"].update(curves(options.runs))
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
