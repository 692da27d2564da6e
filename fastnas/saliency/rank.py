"""Architectures of a space, scored one after another and compared with what they are worth after training."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastnas._device import as_device
from fastnas._files import write_text
from fastnas.genotype import AnyGenotype, parse_genotype
from fastnas.saliency._registry import SCORES, Batch, Score, get_score
from fastnas.saliency.batches import SOURCES
from fastnas.saliency.statistics import Correlations, correlate
from fastnas.spaces import SPACES, Space, get_space
from fastnas.tabular import Table

_FORMAT = 1
_DUPLICATES = 200_000  # drawn one after another, until the space counts as exhausted


@dataclass(frozen=True)
class Scored:
    """A row of ``scores.csv``.

    Attributes:
        index: The architecture's place in the order that it was given in.
        architecture: Its written form.
        score: NaN where it is not defined.
        seconds: What it took to build and to score the network.
    """

    index: int
    architecture: str
    score: float
    seconds: float


_COLUMNS = tuple(field.name for field in fields(Scored))

Scorer = Callable[[int, AnyGenotype], Scored]
"""Scores an architecture, given its index."""


@dataclass(frozen=True)
class RankOptions:
    """What is scored, on what, and compared with what.

    Attributes:
        space: The search space.
        score: What the networks are scored by.
        sample: How many architectures, drawn at random and all different; or all, for every one of the space.
        table: A CSV file, gzipped or not, with what the architectures are worth, one a row.
        key: The table's column of architectures.
        column: The table's column that the scores are compared with.
        channels: Channels of the first cells. linear_regions wants 1.
        layers: Cells of a stage in nb201 (linear_regions wants 1); cells of the network in the other spaces. 0 is all
            of a chain, and 5 elsewhere.
        data: Where the images are from. noise is normally distributed pixels under random labels.
        root: Where the data set lies; for npz, the file.
        batch_size: Images that every network is scored on. linear_regions wants thousands.
        per_class: Equally many images of each class, as GraSP takes 10 of each.
        image_size: Height and width of noise; a data set has its own. linear_regions wants small images.
        seed: Fixes the architectures, the images and the weights.
        device: Where to score: cpu, cuda, cuda:1 ..., or auto for the GPU where there is one.
        jobs: Processes that score at the same time. They do not change the scores.
        threads: CPU threads of torch in each process. They may change a score's last bits.
    """

    space: str = "nb201"
    score: str = "naswot"
    sample: str = "1000"
    table: str | None = None
    key: str = "arch"
    column: str = "c10_test_e200"
    channels: int = 16
    layers: int = 0
    data: str = "noise"
    root: str | None = None
    batch_size: int = 64
    per_class: bool = False
    image_size: int = 32
    seed: int = 0
    device: str = "auto"
    jobs: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name, names in (("space", sorted(SPACES)), ("score", sorted(SCORES)), ("data", SOURCES)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(names)}")
        if self.sample != "all" and not (self.sample.isdecimal() and int(self.sample) >= 1):
            raise ValueError(f"sample={self.sample!r}: expected a whole number of at least 1, or all")
        if self.layers == 0:
            object.__setattr__(self, "layers", getattr(get_space(self.space), "layers", 5))
        for name in ("channels", "layers", "batch_size", "image_size", "jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed={self.seed}: expected a whole number from 0 to 2**62 - 1")
        object.__setattr__(self, "device", str(as_device(self.device)))


@dataclass(frozen=True)
class Networks:
    """How an architecture becomes a network.

    Attributes:
        channels: Channels of the first cells.
        layers: Cells, as the space counts them.
        classes: Number of logits.
        seed: Architecture i gets the weights of seed + i.
        device: Where it is scored; the weights are the same everywhere.
    """

    channels: int = 16
    layers: int = 5
    classes: int = 10
    seed: int = 0
    device: str = "cpu"


def rank(
    space: Space | str,
    score: str,
    genotypes: Sequence[AnyGenotype],
    batch: Batch,
    networks: Networks | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    threads: int = 1,
    on_score: Callable[[Scored], None] | None = None,
) -> list[Scored]:
    """Returns the score of every architecture, in their order.

    Scores depend on ``threads`` (in their last bits), but not on ``jobs``. With a folder, every score is written to its
    ``scores.csv`` as soon as all before it are there, and scores that are there are not computed again: a run that was
    stopped or killed is continued, and ends with the same scores, by the same call. More architectures may follow
    those of an earlier run.

    Args:
        space: the space, or its name.
        score: the name of a score.
        genotypes: the architectures.
        batch: what they are scored on.
        networks: how they become networks.
        folder: where ``scores.csv`` is kept, beside ``settings.json``, which says what the scores are of.
        jobs: processes that score at the same time; with 1 it is this one.
        threads: CPU threads of torch in each.
        on_score: called with every row, those of an earlier run included.

    Raises:
        ValueError: for an unknown name, a network that cannot be scored, or a folder with scores of anything else.
        ChildProcessError: where a process was killed.
    """
    space = get_space(space) if isinstance(space, str) else space
    networks = networks or Networks()
    job = _Job(space, get_score(score), networks, batch.images.cpu().contiguous().numpy(), batch.labels.cpu().numpy())
    settings = {"format": _FORMAT, "space": space.name, "score": score, **asdict(networks)}
    settings |= {"threads": threads, "images": list(batch.images.shape), "batch": digest(job.images, job.labels)}
    return score_all(job, genotypes, settings, folder=folder, jobs=jobs, threads=threads, on_score=on_score)


def score_all(
    make: Callable[[], Scorer],
    genotypes: Sequence[AnyGenotype],
    settings: Mapping[str, Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    threads: int = 1,
    on_score: Callable[[Scored], None] | None = None,
    first: Callable[[AnyGenotype], str] | None = None,
) -> list[Scored]:
    """Returns what a scorer makes of every architecture, in their order; :func:`rank` says the rest.

    Args:
        make: returns the scorer, once in each process; picklable.
        genotypes: the architectures.
        settings: what the scores depend on beside the architectures; plain values.
        folder: as :func:`rank`.
        jobs: as :func:`rank`.
        threads: as :func:`rank`.
        on_score: as :func:`rank`.
        first: what the work is sorted by; in the architectures' order where None.

    Raises:
        ValueError: as :func:`rank`, and what the scorer raises.
        ChildProcessError: where a process was killed.
    """
    if jobs < 1 or threads < 1:
        raise ValueError(f"jobs={jobs} and threads={threads} must be at least 1")
    with ScoreLog(folder, settings, [g.to_text() for g in genotypes]) as log:
        rows = list(log.rows)
        for row in rows:
            if on_score is not None:
                on_score(row)
        done = {row.index for row in rows}
        work = [(i, genotype) for i, genotype in enumerate(genotypes) if i not in done]
        if first is not None:
            work.sort(key=lambda item: first(item[1]))
        jobs = min(jobs, len(work) or 1)
        for row in _serial(make, threads, work) if jobs == 1 else _parallel(make, threads, work, jobs):
            log.append(row)
            rows.append(row)
            if on_score is not None:
                on_score(row)
    return sorted(rows, key=lambda row: row.index)


def sample(space: Space, count: int | None, seed: int = 0) -> list[AnyGenotype]:
    """Returns different random architectures, or all of the space.

    A larger count begins with the architectures of a smaller one of the same seed.

    Args:
        space: where they are from.
        count: how many; None for all.
        seed: of the draws.

    Raises:
        ValueError: where the space has fewer, or cannot list them.
    """
    if count is None:
        list_all = getattr(space, "all", None)
        if list_all is None:
            raise ValueError(f"sample=all: the space {space.name!r} is too large to be listed; give a number")
        return list(list_all())
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, AnyGenotype] = {}
    failures = 0
    while len(chosen) < count:
        genotype = space.sample(generator)
        failures = failures + 1 if chosen.setdefault(genotype.to_text(), genotype) is not genotype else 0
        if failures > _DUPLICATES:
            raise ValueError(f"sample={count}: the space {space.name!r} has but {len(chosen)} architectures; try all")
    return list(chosen.values())


def compare(rows: Sequence[Scored], table: Table, column: str, *, seed: int = 0) -> tuple[Correlations, list[float]]:
    """Returns the rank correlations of scores with a column of a table, and the column's value for each row.

    Rows that the table lacks have the value NaN; those whose score or value is NaN are left out of the correlations.

    Raises:
        ValueError: where the table lacks the column, or fewer than three pairs are left.
    """
    table.column(column)
    values = [_value(table, row.architecture, column) for row in rows]
    pairs = [(r.score, v) for r, v in zip(rows, values, strict=True) if not (math.isnan(r.score) or math.isnan(v))]
    if len(pairs) < 3:
        raise ValueError(
            f"column={column!r}: {len(pairs)} architectures have a score and a value; 3 or more are needed"
        )
    scores, known = zip(*pairs, strict=True)
    return correlate(scores, known, seed=seed), values


def _value(table: Table, architecture: str, column: str) -> float:
    """Returns what the table says of an architecture in its written form; NaN where it lacks it."""
    if architecture in table:
        return table.find(architecture)[column]
    genotype = parse_genotype(architecture)  # some tables know an architecture in other written forms
    return table.find(genotype)[column] if genotype in table else math.nan


class ScoreLog:
    """The scores in a folder, appended one by one; use it as a context manager.

    Args:
        folder: the folder; None to keep nothing.
        settings: what the scores are of; plain values.
        texts: the architectures, in the order of the rows.

    Raises:
        ValueError: where the folder has scores under other settings or of other architectures, or a damaged file.
        OSError: where it cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], texts: Sequence[str]
    ) -> None:
        self.rows: list[Scored] = []
        self._file: io.RawIOBase | None = None
        if folder is None:
            return
        path, sidecar = Path(folder) / "scores.csv", Path(folder) / "settings.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file, path)
            content = path.read_bytes()
            # What follows the last line's end was being written when a process was killed.
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                self._file.truncate(len(whole))
            if whole not in (b"", ",".join(_COLUMNS).encode() + b"\n"):
                _check_settings(sidecar, settings)
                self.rows = _read_rows(path, whole, texts)
            else:  # nothing that another setting could have given
                self._file.truncate(0)
                write_text(sidecar, json.dumps(settings, indent=2) + "\n")
                self._write(_COLUMNS)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ScoreLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, row: Scored) -> None:
        """Writes a row, in one piece."""
        self._write((row.index, row.architecture, repr(row.score), f"{row.seconds:.4f}"))

    def _write(self, fields: Sequence[object]) -> None:
        if self._file is not None:
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(fields)
            self._file.write(line.getvalue().encode())


def _lock(file: io.RawIOBase, path: Path) -> None:
    """Keeps other processes from appending to the file while it is open."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is being written by another process: wait for it, or take another folder"
            ) from None


def _check_settings(sidecar: Path, settings: Mapping[str, Any]) -> None:
    try:
        stored = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{sidecar} is missing beside scores.csv: choose another folder") from None
    except ValueError as error:
        raise ValueError(f"{sidecar} is damaged ({error}): choose another folder, or remove this one") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{sidecar} holds no settings: choose another folder, or remove this one")
    for name in {**stored, **settings}:
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"{sidecar.parent} has scores with {name}={stored.get(name)}, not {settings.get(name)}: "
                "choose another folder, or remove this one"
            )


def _read_rows(path: Path, content: bytes, texts: Sequence[str]) -> list[Scored]:
    try:
        header, *lines = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        if tuple(header) != _COLUMNS:
            raise ValueError(f"its first line is {','.join(header)}")
        rows = [Scored(int(i), text, float(value), float(seconds)) for i, text, value, seconds in lines]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another folder, or remove it") from None
    if len({row.index for row in rows}) < len(rows):
        raise ValueError(f"{path} is damaged (an architecture has two rows): choose another folder, or remove it")
    rows = [row for row in rows if row.index < len(texts)]
    for row in rows:
        if row.index < 0 or row.architecture != texts[row.index]:
            raise ValueError(
                f"{path}: row {row.index} is of {row.architecture}, not of {texts[row.index]}: choose another folder"
            )
    return rows


@dataclass(frozen=True, eq=False)
class _Job:
    """What a process needs to score architectures; picklable."""

    space: Space
    score: Score
    networks: Networks
    images: Any  # numpy, as torch would send tensors through shared memory
    labels: Any

    def __call__(self) -> _Scorer:
        return _Scorer(self)


def digest(*arrays: Any) -> str:
    """Returns a hash of the arrays' bytes."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


class _Scorer:
    """Scores architectures in this process."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._device = torch.device(job.networks.device)
        images = torch.from_numpy(job.images).to(self._device)
        self._batch = Batch(images, torch.from_numpy(job.labels).to(self._device))

    def __call__(self, index: int, genotype: AnyGenotype) -> Scored:
        started = time.perf_counter()
        n = self._job.networks
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(n.seed + index)
            in_channels = self._batch.images.shape[1]
            network = self._job.space.network(genotype, n.channels, n.layers, n.classes, in_channels)
            try:
                value = float(self._job.score(network.to(self._device), self._batch))
            except ValueError as error:
                raise ValueError(f"architecture {genotype.to_text()}: {error}") from error
        return Scored(index, genotype.to_text(), value, time.perf_counter() - started)


def _serial(make: Callable[[], Scorer], threads: int, work: Sequence[tuple[int, AnyGenotype]]) -> Iterator[Scored]:
    if not work:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scorer = make()
        for index, genotype in work:
            yield scorer(index, genotype)
    finally:
        torch.set_num_threads(before)


def _parallel(
    make: Callable[[], Scorer], threads: int, work: Sequence[tuple[int, AnyGenotype]], jobs: int
) -> Iterator[Scored]:
    """Yields the rows in order; a few architectures for each process are under way at any time."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(make, threads))
    pending: deque[Future[Scored]] = deque()
    try:
        for index, genotype in work:
            with _interrupts_blocked():  # Ctrl-C reaches every process, but the first one decides
                pending.append(pool.submit(_score, index, genotype))
            if len(pending) > 4 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process was killed, perhaps for want of memory: fewer jobs need less; what was scored is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks Ctrl-C in this thread, and for good in the processes that the block starts; here it only comes later."""
    if not hasattr(signal, "pthread_sigmask"):  # not a Unix
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_scorer: Scorer | None = None  # of a process of the pool


def _start(make: Callable[[], Scorer], threads: int) -> None:
    """Prepares a process of the pool."""
    global _scorer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be blocked
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    _scorer = make()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _score(index: int, genotype: AnyGenotype) -> Scored:
    assert _scorer is not None
    return _scorer(index, genotype)
