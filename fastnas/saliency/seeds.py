"""One training-free search after another, a seed each, and what a table says of the results."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnas._device import as_device
from fastnas._files import write_text
from fastnas.nn.stems import STEMS
from fastnas.saliency.batches import SOURCES, BatchSource
from fastnas.saliency.freedarts import PRUNING, FreeDarts
from fastnas.spaces import SPACES, Space, get_space
from fastnas.tabular import Table, nasbench1shot1, nasbench201, nasbench301, nasbench_macro


@dataclass(frozen=True)
class ScoreOptions:
    """A training-free search, and the seeds that it is repeated with.

    Attributes:
        space: The search space.
        saliency: What the candidates are scored by; of several, separated by commas, the ranks are added up.
        seeds: Seeds of weights, alphas and batch: 0..99 is from 0 to 99, commas separate several.
        scale: Standard deviation of the alphas, which multiply the candidates without a softmax.
        draws: Draws of the alphas whose scores are averaged; 0 takes them at their expectation instead.
        pruning: once scores once; candidates and edges score again after each cut.
        channels: Channels of the first cell.
        layers: Cells of the supernet; of a stage in nb201. 0 is the space's own number, the only one of a chain.
        stem: What comes before the cells of darts: cifar, or imagenet for images of 224 pixels.
        data: Where the batch comes from; noise needs no files. synflow looks at the images' shape alone.
        root: Where the data set lies.
        batch_size: Images in the batch.
        image_size: Height and width of noise.
        table: A CSV file with the accuracies of architectures (.gz is fine), for what was found. In darts, a table of
            some cells, from which those of others are predicted.
        device: Where to run: cpu, cuda, cuda:1 ..., or auto for the GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves them to torch.
    """

    space: str = "nb201"
    saliency: str = "synflow"
    seeds: str = "0..9"
    scale: float = 1e-3
    draws: int = 1
    pruning: str = "once"
    channels: int = 16
    layers: int = 0
    stem: str = "cifar"
    data: str = "noise"
    root: str | None = None
    batch_size: int = 64
    image_size: int = 32
    table: str | None = None
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for name, names in (("space", sorted(SPACES)), ("data", SOURCES), ("pruning", PRUNING), ("stem", STEMS)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(names)}")
        for name in ("channels", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least 1")
        for name in ("layers", "draws", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least 0")
        if self.stem != "cifar" and self.space != "darts":
            raise ValueError(f"stem={self.stem!r}: the space {self.space!r} has but one; leave it out")
        object.__setattr__(self, "device", str(as_device(self.device)))


@dataclass(frozen=True)
class Found:
    """What one seed led to."""

    seed: int
    genotype: Any
    seconds: float
    numbers: dict[str, float]  # of the table
    scores: dict[str, Tensor]


def parse_seeds(text: str) -> list[int]:
    """Returns the seeds that ``"0..99"``, ``"3"`` or ``"0..4,10"`` stand for.

    Raises:
        ValueError: where the text is no such list.
    """
    seeds: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part)
        if match is None or len(part) > 32 or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"seeds={text!r}: expected numbers or ranges such as 0..99, separated by commas")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={text!r}: a seed occurs twice")
    return seeds


class SeedRun:
    """The searches of options; iterate over it.

    Raises:
        ValueError, OSError: for options that make no sense, or files that can't be read.
    """

    def __init__(self, options: ScoreOptions) -> None:
        self.options = options
        self.seeds = parse_seeds(options.seeds)
        self.space: Space = get_space(options.space)
        self._lookup = None if options.table is None else _lookup(self.space.name, options.table)
        self._source = BatchSource.open(
            options.data, options.root, options.batch_size, image_size=options.image_size, classes=10
        )
        if options.threads:
            torch.set_num_threads(options.threads)
        sizes: dict[str, Any] = {"channels": options.channels}
        if options.layers:
            sizes["layers"] = options.layers
        if options.stem != "cifar":
            sizes["stem"] = options.stem
        self._search = FreeDarts(
            *(self.space, [name.strip() for name in options.saliency.split(",")]),
            scale=options.scale,
            draws=options.draws,
            pruning=options.pruning,
            device=options.device,
            num_classes=self._source.classes,
            in_channels=self._source.shape[0],
            **sizes,
        )

    def __iter__(self) -> Iterator[Found]:
        """Yields what each seed led to."""
        for seed in self.seeds:
            result = self._search.search(seed, self._source.draw(seed))
            numbers = {} if self._lookup is None else self._lookup(result.genotype)
            yield Found(seed, result.genotype, result.seconds, numbers, result.scores)


def _lookup(space: str, path: str) -> Callable[[Any], dict[str, float]]:
    """Returns what tells an architecture's numbers from a table; the larger, the better."""
    if space.startswith("darts"):  # too large for a table: predicted from some of its cells
        surrogate = nasbench301.Surrogate.fit(path)
        return lambda genotype: {"predicted": float(surrogate.predict([genotype])[0])}
    if space.startswith("nb1shot1"):
        cells = nasbench1shot1.load(path)
        nothing = dict.fromkeys(cells.columns, math.nan)
        # published tables lack cells
        return lambda genotype: (
            {name: 100 * (1 - error) for name, error in cells.find(genotype).items()} if genotype in cells else nothing
        )
    if space == "nb-macro":
        return nasbench_macro.load(path).select({"cifar10-test": "cifar10-test"}).find
    table = Table.load(path)
    if space == "nb201" and set(nasbench201.COLUMNS.values()) <= set(table.columns):
        table = table.select(nasbench201.COLUMNS)
    return table.find


def summary(found: Sequence[Found]) -> dict[str, Any]:
    """Returns the table's numbers over the seeds, the seconds, and how often each architecture was found.

    Standard deviations have n - 1 in the denominator and are None for a single seed. Architectures that the table lacks
    are left out, ``count`` says how many there were. The most frequent architectures come first.
    """
    columns = {name: [f.numbers[name] for f in found if not math.isnan(f.numbers[name])] for name in found[0].numbers}
    genotypes = [_text(f.genotype) for f in found]
    seconds = [f.seconds for f in found]
    return {
        "searches": len(found),
        "seconds": {"first": seconds[0], "median": statistics.median(seconds)},
        "numbers": {
            name: {
                "count": len(values),
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "best": max(values),
                "worst": min(values),
            }
            for name, values in columns.items()
            if values
        },
        "genotypes": dict(sorted(((g, genotypes.count(g)) for g in set(genotypes)), key=lambda e: (-e[1], e[0]))),
    }


def mean_shares(found: Sequence[Found]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Returns the scores as parts of the sum of their row's absolute values, averaged over the seeds."""
    shares: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
    for t in found[0].scores:
        rows = [torch.nan_to_num(f.scores[t].cpu().double(), neginf=0.0) for f in found]
        each = [s / s.abs().sum(1, keepdim=True).clamp_min(1e-300) for s in rows]
        shares[t] = torch.stack(each).mean(0).numpy()
    return shares


def write(folder: str | os.PathLike[str], run: SeedRun, found: Sequence[Found]) -> list[Path]:
    """Returns the files written: scores.csv, summary.json, scores.png and the genotype of every seed.

    Each file appears whole or not at all.
    """
    from fastnas.report import plot_scores

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for stale in path.glob("genotype-*.json"):
        stale.unlink()
    numbers = list(found[0].numbers)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["seed", "genotype", *numbers, "seconds"])
    for f in found:
        row = [f.seed, _text(f.genotype), *(f.numbers[n] for n in numbers), f"{f.seconds:.6f}"]
        writer.writerow(row)
    files = {
        "scores.csv": buffer.getvalue(),
        "summary.json": json.dumps({**asdict(run.options), **summary(found)}, indent=2) + "\n",
    }
    for name, text in files.items():
        write_text(path / name, text)
    written = [path / name for name in files]
    for f in found:
        file = path / f"genotype-{f.seed}.json"
        f.genotype.save(file)
        written.append(file)
    shares = mean_shares(found)
    shape = (len(run.space.edges), len(run.space.primitives))
    if all(s.shape == shape for s in shares.values()):
        written.append(
            plot_scores(
                shares,
                run.space.primitives,
                [f"{i} ← {j}" for i, j in run.space.edges],
                path / "scores.png",
                title=f"{run.options.saliency} on {run.space.name}, mean of {len(found)} seeds",
            )
        )
    return written


def _text(genotype: Any) -> str:
    return str(genotype.to_text())
