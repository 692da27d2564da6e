"""A study: supernets trained, subnets evaluated, and a folder with what came out (after arXiv:2010.08219)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnas import __version__
from fastnas._files import write_text
from fastnas.data import ImageData, load, normalize
from fastnas.genotype import AnyGenotype
from fastnas.saliency.batches import BatchSource
from fastnas.saliency.rank import Networks, Scored, digest, rank, score_all
from fastnas.search.loop import EpochRecord, Search
from fastnas.search.run import RunFolder
from fastnas.spaces import get_space
from fastnas.study.architectures import Known, best, known
from fastnas.study.config import StudyOptions
from fastnas.study.evaluation import SubnetJob, save_snapshot
from fastnas.study.results import Snapshot, Studied, pruning_row, write_pruning, write_results
from fastnas.tabular import open_table

_FORMAT = 1

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``(what, total)`` -> a context that yields what is told how much is done."""


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """The progress of a study that tells nobody."""
    yield lambda done: None


@dataclass(frozen=True)
class _Parts:
    """The images of a study, normalised, as numpy: what subnets are evaluated on, and what they may be trained on."""

    images: tuple[object, object]
    training: tuple[object, object]
    hash: str


def study(
    options: StudyOptions,
    folder: str | os.PathLike[str],
    *,
    data: ImageData | None = None,
    progress: Progress = silent,
    on_epoch: Callable[[Search, EpochRecord], object] | None = None,
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
    of = known(space, table, options.column, count, options.seed, errors=options.errors)
    data = load(options.data, options.root) if data is None else data
    runner = _Runner(options, data, progress, on_epoch)
    sizes = {name: runner.scores(name, of.genotypes, folder) for name in ("params", "flops")}
    whole = runner.supernet(folder, of, sizes)
    _write_options(folder, options)
    write_results(folder, space, options, whole)
    rows = [pruning_row("none", 1.0, whole, whole)]
    for kind in options.prunings:
        verdict = _verdict(kind, whole, runner, folder, options.seed)
        for part in options.parts_kept:
            inside = folder / "pruned" / f"{kind}-{part:g}"
            kept = set(best(verdict, part))
            chosen = [n for n, genotype in enumerate(of.genotypes) if genotype.to_text() in kept]
            fewer = Known([of.genotypes[n] for n in chosen], [of.truth[n] for n in chosen])
            _check_kept(inside, fewer)
            pruned = runner.supernet(inside, fewer, {k: [v[n] for n in chosen] for k, v in sizes.items()}, fewer)
            write_results(inside, space, options, pruned)
            rows.append(pruning_row(kind, part, pruned, whole))
    if options.prunings:
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
    ) -> None:
        self._options, self._data, self._progress, self._on_epoch = options, data, progress, on_epoch
        self._parts: _Parts | None = None
        self._sizes = (options.channels, options.layers, len(data.classes), data.images.shape[1])

    def supernet(
        self, folder: Path, of: Known, sizes: Mapping[str, Sequence[float]], only: Known | None = None
    ) -> Studied:
        """Returns what a supernet says of architectures.

        Args:
            folder: where it is kept.
            of: the architectures.
            sizes: of their networks.
            only: the architectures that it is trained on, and then only the last snapshot's first mode is looked at;
                all of the space where None.
        """
        o = self._options
        epochs, modes = (o.epochs_studied, o.modes) if only is None else (o.epochs_studied[-1:], o.modes[:1])
        self._train(folder, only, epochs)
        snapshots = [
            Snapshot(epoch, bn, [row.score for row in self._evaluate(folder, epoch, bn, of)])
            for epoch in epochs
            for bn in modes
        ]
        return Studied(of, {name: list(values) for name, values in sizes.items()}, snapshots)

    def scores(self, name: str, genotypes: Sequence[AnyGenotype], folder: Path) -> list[float]:
        """Returns a training-free score of the architectures' own networks, of the supernet's size."""
        o = self._options
        batch = BatchSource.open(o.data, o.root, min(64, len(self._data.images))).draw(o.seed)
        if name in ("params", "flops"):  # which look at one image's shape
            shape = self._data.images.shape[1:]
            batch = batch._replace(images=torch.zeros(1, *shape), labels=torch.zeros(1, dtype=torch.int64))
        channels, layers, classes, _ = self._sizes
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

    def _train(self, folder: Path, only: Known | None, epochs: Sequence[int]) -> None:
        """Trains the supernet, from where it stopped, and leaves its snapshots after some epochs."""
        o = self._options
        if all(_snapshot(folder, epoch).is_file() for epoch in epochs) and self._parts is not None:
            return
        search = Search(o.search(), data=self._data, draw_architecture=None if only is None else _drawn_from(only))
        self._parts = self._parts or self._take_parts(search)
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
            if self._on_epoch is not None:
                self._on_epoch(search, record)

        steps = search.steps_per_epoch
        with run, self._progress(f"training {folder.name}", o.epochs * steps) as tell:
            search.run(on_step=lambda s: tell(s.epoch * steps + s.step), on_epoch=on_epoch)
        missing = [epoch for epoch in epochs if not _snapshot(folder, epoch).is_file()]
        if missing:
            raise ValueError(
                f"checkpoints={o.checkpoints!r}: {folder} was trained without keeping epoch {missing[0]}: leave "
                "it out, or choose another folder"
            )

    def _take_parts(self, search: Search) -> _Parts:
        o, (train, valid) = self._options, search.parts
        images = self._take(valid[: o.images])
        training = self._take(train[: max(o.calibration, o.finetune) * o.batch_size])
        return _Parts(images, training, digest(*images, *training))

    def _take(self, indices: Tensor) -> tuple[object, object]:
        data = self._data
        return normalize(data.images[indices], data.mean, data.std).numpy(), data.labels[indices].numpy()

    def _evaluate(self, folder: Path, epoch: int, bn: str, of: Known) -> list[Scored]:
        o = self._options
        assert self._parts is not None
        training = self._parts.training if bn == "recalibrated" or o.finetune else _nothing(self._parts.training)
        job = SubnetJob(
            get_space(o.space),
            _snapshot(folder, epoch),
            self._sizes,
            self._parts.images,
            training,
            (o.image_batch, o.batch_size),
            bn,
            o.finetuning,
            o.device,
            o.amp,
        )
        settings = {"format": _FORMAT, "space": o.space, "epoch": epoch, "bn": bn, "amp": o.amp}
        settings |= {"image_batch": o.image_batch, "batch_size": o.batch_size, **asdict(o.finetuning)}
        settings |= {"threads": o.threads, "images": self._parts.hash}
        with self._progress(f"subnets after epoch {epoch}, bn {bn}", len(of.genotypes)) as tell:
            return score_all(
                job,
                of.genotypes,
                settings,
                folder=folder / "evaluations" / f"epoch-{epoch}-{bn}",
                jobs=o.jobs,
                threads=o.threads,
                on_score=lambda row: tell(row.index + 1),
            )


def _snapshot(folder: Path, epoch: int) -> Path:
    return folder / "snapshots" / f"epoch-{epoch}.pt"


def _nothing(arrays: tuple[object, object]) -> tuple[object, object]:
    x, y = (np.asarray(a)[:0] for a in arrays)
    return x, y


def _drawn_from(only: Known) -> Callable[[torch.Generator | None], AnyGenotype]:
    def draw(generator: torch.Generator | None) -> AnyGenotype:
        return only.genotypes[int(torch.randint(len(only.genotypes), (), generator=generator))]

    return draw


def _verdict(kind: str, whole: Studied, runner: _Runner, folder: Path, seed: int) -> dict[str, float]:
    """Returns what each architecture is kept for, the larger the longer."""
    texts = [genotype.to_text() for genotype in whole.of.genotypes]
    if kind == "optimistic":
        values: Sequence[float] = whole.of.truth
    elif kind == "random":
        values = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    elif kind == "supernet":
        last = max(snapshot.epoch for snapshot in whole.snapshots)
        values = next(s for s in whole.snapshots if s.epoch == last).accuracies
    elif kind in whole.sizes:
        values = whole.sizes[kind]
    else:
        values = runner.scores(kind, whole.of.genotypes, folder)
    return dict(zip(texts, map(float, values), strict=True))


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
