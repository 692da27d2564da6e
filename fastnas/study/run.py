"""A study: supernets trained, subnets evaluated, and a folder with what came out (after arXiv:2010.08219)."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastnas import __version__
from fastnas._files import write_text
from fastnas.data import ImageData, load, normalize
from fastnas.genotype import AnyGenotype
from fastnas.saliency import Batch
from fastnas.saliency.batches import BatchSource
from fastnas.saliency.rank import Networks, digest, rank, score_all
from fastnas.search.loop import EpochRecord, Search
from fastnas.search.run import RunFolder
from fastnas.spaces import Space, get_space
from fastnas.study.architectures import Known, best, known
from fastnas.study.config import StudyOptions
from fastnas.study.evaluation import SubnetJob, save_snapshot
from fastnas.study.results import Snapshot, Studied, pruning_row, write_pruning, write_results
from fastnas.tabular import open_table

_FORMAT = 2

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``(what, total)`` -> a context that yields what is told how much is done."""


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """The progress of a study that tells nobody."""
    yield lambda done: None


def study(
    options: StudyOptions,
    folder: str | os.PathLike[str],
    *,
    data: ImageData | None = None,
    progress: Progress = silent,
    on_epoch: Callable[[Search, EpochRecord], object] | None = None,
    training: Callable[[Search], AbstractContextManager[object]] = nullcontext,
) -> Studied:
    """Returns what a supernet says of architectures, beside what they are worth; all is written to the folder.

    A study that was stopped or killed goes on where the same call is made again, and ends with the same numbers. What
    is in the folder, ``docs/study.md`` says.

    Args:
        options: what is studied.
        folder: where everything is kept; made where it is not there.
        data: images instead of those that the options name.
        progress: shows how far it is.
        on_epoch: called after each epoch of each supernet's training.
        training: called before each training, which runs inside; after a stop within, what it was at is saved.

    Raises:
        ValueError: where the table does not fit, or the folder has a study of anything else.
        CheckpointError: where the folder has a supernet of other options.
        DivergenceError: where a training diverges.
        ChildProcessError: where a process was killed.
        OSError: where files cannot be read or written.
    """
    if options.table is None:
        raise ValueError("table: a study needs a file of what architectures are worth; give --table FILE")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    space = get_space(options.space)
    count = None if options.sample == "all" else int(options.sample)
    table = open_table(options.table, options.space, options.key)
    of = known(space, table, options.column, count, options.sample_seed, errors=options.errors)
    if options.prunings and round(options.parts_kept[-1] * len(of.genotypes)) < 3:
        raise ValueError(
            f"keep={options.keep!r}: {options.parts_kept[-1]:g} of {len(of.genotypes)} architectures are fewer than 3: "
            "keep more, or study more"
        )
    data = load(options.data, options.root) if data is None else data
    runner = _Runner(options, data, progress, on_epoch, training)
    sizes = {name: runner.scores(name, of.genotypes, folder) for name in ("params", "flops")}
    verdicts = {"optimistic": of.truth, "random": [0.0] * len(of.genotypes), **sizes}
    for kind in options.prunings:  # before the supernet: networks that cannot be scored are found out at once
        if kind not in verdicts and kind != "supernet":
            verdicts[kind] = runner.scores(kind, of.genotypes, folder)
    whole = runner.supernet(folder, of, sizes)
    _write_options(folder, options)
    summary = write_results(folder, space, options, whole)
    if not options.prunings:
        return whole
    verdicts["supernet"] = whole.verdict.accuracies
    kept = {
        (kind, part): best(verdicts[kind], part, options.sample_seed)
        for kind in options.prunings
        for part in options.parts_kept
    }
    rows = []
    if options.sample == "all" and _lists(space) == len(of.genotypes):
        rows.append(pruning_row("none", 1.0, summary, of.truth, summary))
    else:  # pruned spaces are parts of what is studied, which is a smaller space than the whole
        rows.append(pruning_row("space", math.nan, summary, of.truth, summary))
        kept = {("none", 1.0): list(range(len(of.genotypes))), **kept}
    for (kind, part), chosen in kept.items():
        inside = folder / "pruned" / f"{kind}-{part:g}"
        fewer = Known([of.genotypes[n] for n in chosen], [of.truth[n] for n in chosen])
        _check_kept(inside, fewer)
        pruned = runner.supernet(inside, fewer, {k: [v[n] for n in chosen] for k, v in sizes.items()}, pruned=True)
        rows.append(pruning_row(kind, part, write_results(inside, space, options, pruned), fewer.truth, summary))
    write_pruning(folder, rows)
    return whole


class _Runner:
    """Trains supernets and evaluates their subnets."""

    def __init__(
        self,
        options: StudyOptions,
        data: ImageData,
        progress: Progress,
        on_epoch: Callable[[Search, EpochRecord], object] | None,
        training: Callable[[Search], AbstractContextManager[object]],
    ) -> None:
        self._options, self._data, self._progress = options, data, progress
        self._on_epoch, self._training = on_epoch, training
        self._sizes = (options.channels, options.layers, len(data.classes), data.images.shape[1])

    def supernet(
        self, folder: Path, of: Known, sizes: Mapping[str, Sequence[float]], *, pruned: bool = False
    ) -> Studied:
        """Returns what a supernet says of architectures.

        Args:
            folder: where it is kept.
            of: the architectures.
            sizes: of their networks.
            pruned: it is trained on those alone, and only its verdict is looked at; else on all of the space.
        """
        o = self._options
        epochs, modes = (o.epochs_studied[-1:], list(o.modes)[:1]) if pruned else (o.epochs_studied, list(o.modes))
        parts = self._train(folder, _drawn_from(of) if pruned else None, epochs)
        snapshots = [
            Snapshot(epoch, mode, self._evaluate(folder, epoch, mode, of, parts)) for epoch in epochs for mode in modes
        ]
        return Studied(of, {name: list(values) for name, values in sizes.items()}, snapshots)

    def scores(self, name: str, genotypes: Sequence[AnyGenotype], folder: Path) -> list[float]:
        """Returns a training-free score of the architectures' own networks, of the supernet's size."""
        o = self._options
        channels, layers, classes, _ = self._sizes
        _, *shape = self._data.images.shape
        if name in ("params", "flops"):  # which look at one image's shape
            batch = Batch(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))
        else:
            size = min(64, len(self._data.images))
            batch = BatchSource(size, False, self._data, (shape[0], shape[1], shape[2]), classes).draw(o.seed)
        networks = Networks(channels, layers, classes, o.seed, o.device)
        with self._progress(f"{name} of the architectures", len(genotypes)) as tell:
            rows = rank(
                *(o.space, name, genotypes, batch, networks),
                folder=folder / "evaluations" / name,
                jobs=o.jobs,
                threads=o.threads,
                on_score=lambda row: tell(row.index + 1),
            )
        return [row.score for row in rows]

    def _train(
        self, folder: Path, draw: Callable[[torch.Generator | None], AnyGenotype] | None, epochs: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Trains the supernet, from where it stopped to the last of some epochs, and leaves snapshots after each.

        Returns:
            The indices of the images that train, and of those that evaluate.
        """
        search = Search(self._options.search(), data=self._data, draw_architecture=draw)
        run = RunFolder(folder / "supernet")
        if (run.path / "checkpoint.pt").is_file():
            run.resume(search)
        else:
            run.start(search.config, overwrite=True)
            (folder / "snapshots").mkdir(exist_ok=True)
            if 0 in epochs:
                save_snapshot(_snapshot(folder, 0), search.supernet, 0)

        def on_epoch(search: Search, record: EpochRecord) -> None:
            if record.epoch in epochs:  # before the checkpoint, which is resumed from
                save_snapshot(_snapshot(folder, record.epoch), search.supernet, record.epoch)
            run.record(search, record)
            if record.epoch == epochs[-1]:
                search.stop()
            if self._on_epoch is not None:
                self._on_epoch(search, record)

        steps = search.steps_per_epoch
        if search.epoch < epochs[-1]:
            with run, self._progress(f"training {folder.name}", epochs[-1] * steps) as tell, self._training(search):
                search.run(on_step=lambda s: tell(s.epoch * steps + s.step), on_epoch=on_epoch)
                if search.step:  # stopped within an epoch
                    run.save(search)
        missing = [epoch for epoch in epochs if not _snapshot(folder, epoch).is_file()]
        if missing:
            raise ValueError(
                f"checkpoints={self._options.checkpoints!r}: {folder} was trained to epoch {search.epoch} without "
                f"keeping epoch {missing[0]}: leave it out, or choose another folder"
            )
        return search.parts

    def _evaluate(self, folder: Path, epoch: int, mode: str, of: Known, parts: tuple[Tensor, Tensor]) -> list[float]:
        o = self._options
        bn, finetuning = o.modes[mode]
        calibration = o.calibration if bn == "recalibrated" else 0
        training = self._take(parts[0][: max(calibration, finetuning.batches) * o.batch_size])
        images = self._take(parts[1][: o.images])
        snapshot = _snapshot(folder, epoch)
        sizes = (o.image_batch, o.batch_size)
        job = SubnetJob(
            *(get_space(o.space), snapshot, self._sizes, images, training, sizes),
            *(bn, calibration, finetuning, o.device, o.amp),
        )
        settings = {"format": _FORMAT, "space": o.space, "epoch": epoch, "bn": bn, "amp": o.amp, "threads": o.threads}
        settings |= {"images": len(images[1]), "image_batch": o.image_batch, "batch_size": o.batch_size}
        settings |= {"calibration": calibration, "finetuning": asdict(finetuning)}
        settings |= {"data": digest(*images, *training), "snapshot": digest(memoryview(snapshot.read_bytes()))}
        done = itertools.count(1)
        with self._progress(f"subnets after epoch {epoch}, bn {mode}", len(of.genotypes)) as tell:
            rows = score_all(
                *(job, of.genotypes, settings),
                folder=folder / "evaluations" / f"epoch-{epoch}-{mode}",
                jobs=o.jobs,
                threads=o.threads,
                on_score=lambda row: tell(next(done)),
                first=lambda genotype: genotype.to_text(),  # chains with the same beginning one after another
            )
        return [row.score for row in rows]

    def _take(self, indices: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Returns images, normalised, and their labels."""
        data = self._data
        return normalize(data.images[indices], data.mean, data.std).numpy(), data.labels[indices].numpy()


def _snapshot(folder: Path, epoch: int) -> Path:
    return folder / "snapshots" / f"epoch-{epoch}.pt"


def _drawn_from(only: Known) -> Callable[[torch.Generator | None], AnyGenotype]:
    def draw(generator: torch.Generator | None) -> AnyGenotype:
        return only.genotypes[int(torch.randint(len(only.genotypes), (), generator=generator))]

    return draw


def _lists(space: Space) -> int:
    """Returns how many architectures a space can list."""
    return sum(1 for _ in getattr(space, "all", tuple)())


def _check_kept(folder: Path, kept: Known) -> None:
    """Writes what a pruned space keeps, or checks that it is what the folder's supernet was trained on.

    Raises:
        ValueError: where it is not.
    """
    text = "".join(f"{genotype.to_text()}\n" for genotype in kept.genotypes)
    path = folder / "kept.txt"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder} has a supernet of other architectures: remove it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _write_options(folder: Path, options: StudyOptions) -> None:
    content = {"made_by": f"A study of fastnas {__version__} with torch {torch.__version__}", **asdict(options)}
    write_text(folder / "study.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
