"""What trainings from scratch came to: ``python -m benchmarks.trainings NAME=RUN,RUN,... [NAME=...]``.

RUN is a folder that ``fastnas train`` left, NAME what the row of several is called. With ``--table``, what it says of
the architectures stands beside what was trained here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.searches import spread, text
from fastnas._files import read_table
from fastnas.genotype import load_genotype
from fastnas.inference import load_model
from fastnas.inference.networks import space_of
from fastnas.nn.counting import count
from fastnas.tabular import open_table
from fastnas.train import TrainFolder

MEANS = ("test error", "train error", "parameters", "minutes")
SAME = ("recipe", "data", "channels", "layers", "epochs", "batch_size")


def row(folders: Sequence[Path], table_path: Path | None, column: str) -> dict[str, Any]:
    """Returns mean and standard deviation over the folders' trainings, and each one's own."""
    runs = [training(folder, table_path, column) for folder in folders]
    result = {
        "trainings": len(runs),
        **{name: runs[0][name] for name in SAME if all(run[name] == runs[0][name] for run in runs)},
        **{name: spread([run[name] for run in runs]) for name in MEANS},
        "runs": runs,
    }
    if table_path is not None:
        result[column] = spread([run[column] for run in runs])
    return result


def training(folder: Path, table_path: Path | None, column: str) -> dict[str, Any]:
    """Returns the figures of one."""
    config, epochs = TrainFolder(folder).config(), read_table(folder / "metrics.csv")
    genotype, last = load_genotype(folder / "genotype.json"), epochs[-1]
    model = load_model(folder / "model.pt")
    size = count(model.network, (len(model.mean), model.image_size, model.image_size))
    found = {} if table_path is None else open_table(table_path, space_of(genotype)).find(genotype)
    return {
        "genotype": genotype.to_text(),
        "seed": config.seed,
        **{name: getattr(config, name) for name in SAME},
        "test error": 100 * (1 - float(last["top1"])),
        "train error": 100 * (1 - float(last["train_accuracy"])),
        "parameters": size.parameters,
        "multiply_adds": size.multiply_adds,
        "minutes": sum(float(r["seconds"]) for r in epochs) / 60,
        **{name: value for name, value in found.items() if name == column},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainings", description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="NAME=RUN,RUN,...")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--column", default="c10_test_e200")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    results = {}
    for argument in options.rows:
        name, _, folders = argument.partition("=")
        results[name] = row([Path(folder) for folder in folders.split(",")], options.table, options.column)
    named = [*MEANS, *([options.column] if options.table else [])]
    print("| | trainings | " + " | ".join(named) + " |\n" + "| --- " * (len(named) + 2) + "|")
    for name, found in results.items():
        print("| " + " | ".join([name, str(found["trainings"]), *(text(found[n]) for n in named)]) + " |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
