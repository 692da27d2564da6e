"""One page of HTML for a run folder, with everything in it: no script, and nothing that is loaded from elsewhere."""

from __future__ import annotations

import base64
import csv
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import yaml
from markupsafe import Markup

from fastnas._files import write_text
from fastnas.genotype import AnyGenotype, ChainGenotype, Genotype, NASBench201Genotype, load_genotype, parse_genotype

from .cell import draw_genotype
from .curves import BLUE, GREEN, ORANGE, PURPLE, Band, Line, Stage, curves_svg
from .style import DPI

Numbers = npt.NDArray[np.float64]

_SKIP = "skip_connect"
_SKIPS_TAKE_OVER = 0.5
_CELLS = {
    "cell_normal.png": "Normal cell",
    "cell_reduce.png": "Reduction cell",
    "cell.png": "Cell",
}
_HESSIAN = {
    "hessian/eigenvalue": "Largest eigenvalue",
    "hessian/norm": "Norm",
    "hessian/trace": "Trace",
    "hessian/trace_term": "½ tr(H Cov): what sampling adds",
}


@dataclass(frozen=True)
class _Run:
    """What a run folder holds."""

    path: Path
    made_by: str
    options: Mapping[str, Any]
    columns: Mapping[str, list[str]]  # of metrics.csv, one text an epoch
    genotype: AnyGenotype | None
    notation: str

    def numbers(self, name: str) -> Numbers:
        """Returns a column of metrics.csv, (T,); NaN where there is no number, and all NaN where there is no column."""
        return np.array([_number(text) for text in self.columns.get(name, [""] * len(self.columns["epoch"]))])

    def has(self, name: str) -> bool:
        """Tells whether a column has a number."""
        return bool(np.isfinite(self.numbers(name)).any())

    @property
    def epochs(self) -> Numbers:
        """The epochs that were finished, (T,)."""
        return self.numbers("epoch")

    @property
    def genotypes(self) -> list[AnyGenotype | str]:
        """The architecture after each epoch, its text where that is in no notation known; [] where not recorded."""
        return [_parsed(text) or text for text in self.columns.get("genotype", [])]


@dataclass(frozen=True)
class _StageRow:
    """One stage of a search.

    Attributes:
        number: From 1.
        k: Partial channels, as text.
        rows: Where its epochs are in metrics.csv.
        first: Its first epoch.
        last: Its last epoch.
        seconds: Wall-clock time.
        memory: Bytes.
    """

    number: int
    k: str
    rows: slice
    first: int
    last: int
    seconds: float
    memory: float


@dataclass(frozen=True)
class _Picture:
    caption: str
    alt: str
    svg: str | Markup = ""
    source: str = ""  # a data URL, where it is no SVG
    width: int = 0  # CSS pixels
    height: int = 0


@dataclass(frozen=True)
class _Section:
    key: str
    title: str
    pictures: Sequence[_Picture] = ()
    note: str = ""
    warning: str = ""
    wide: bool = False
    heading: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    folded: str = ""  # what the rows are folded under
    caption: str = ""


@dataclass
class _Charts:
    """Makes pictures of curves, all over the same epochs and stages."""

    epochs: Numbers
    stages: Sequence[Stage]
    made: int = field(default=0, init=False)

    def draw(
        self, caption: str, lines: Sequence[Line], bands: Sequence[Band] = (), *, percent: bool = False, **how: Any
    ) -> list[_Picture]:
        """Returns the picture of those lines and bands that have numbers; none where none has."""
        lines = [line for line in lines if np.isfinite(line.values).any()]
        bands = [band for band in bands if np.isfinite(band.low + band.high).any()]
        if not lines:
            return []
        self.made += 1
        svg = curves_svg(
            *(self.epochs, lines, bands), stages=self.stages, percent=percent, key=f"curve{self.made}", **how
        )
        said = "; ".join(_course(line, self.epochs, percent) for line in lines)
        return [_Picture(caption, f"{caption}, over the epochs: {said}.", svg=Markup(svg))]


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Returns the path of `report.html`, one page that shows the run in `folder`, written there whole or not at all.

    The page has all its pictures inside, runs no script and loads nothing. What the folder lacks (a search that has not
    ended has no pictures, an older one fewer numbers) is left out.

    Args:
        folder: what `fastnas search` left: `config.yaml`, and where there are `metrics.csv`, `genotype.json`, the
            pictures of cells and `alphas.png`.

    Raises:
        FileNotFoundError: where the folder holds no run.
        ValueError: where `config.yaml` or `metrics.csv` is damaged; the message names the file.
        OSError: where a file cannot be read or written.
    """
    run = _read(Path(folder))
    stages = _stages(run)
    bands = [Stage(f"{s.number}, k = {s.k}" if s.k else str(s.number), s.first, s.last) for s in stages]
    charts = _Charts(run.epochs, bands)
    found = [
        section for section in _sections(run, stages, charts) if section.pictures or section.rows or section.warning
    ]
    return _render(
        run.path / "report.html",
        title=f"{_option(run, 'method')} on {_option(run, 'data')}",
        made_by=run.made_by,
        facts=_facts(run, stages),
        notation=run.notation,
        sections=found,
        begun=bool(len(run.epochs)),
    )


def _render(
    path: Path, *, sections: Sequence[_Section], notation: str = "", begun: bool = True, **content: Any
) -> Path:
    """Returns the path, where a page of sections was written."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        folder=path.parent.resolve().name,
        notation=notation,
        warnings=[section.warning for section in sections if section.warning],
        sections=sections,
        begun=begun,
        **content,
    )
    write_text(path, text)
    return path


def _read(folder: Path) -> _Run:
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run of fastnas: config.yaml is missing; give a search's folder")
    try:
        text = path.read_text(encoding="utf-8")
        options = yaml.safe_load(text)
        if not isinstance(options, Mapping):
            raise ValueError("it holds no options")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    first = text.partition("\n")[0]
    if first.startswith("# A training"):
        raise ValueError(f"{folder} is a training's, and pages are of searches: see its metrics.csv or TensorBoard")
    made_by = first.lstrip("# ").removesuffix(" To repeat it:") if first.startswith("#") else ""

    genotype, notation = None, ""
    for name in ("genotype.json", "genotype.txt"):
        if (folder / name).is_file():
            try:
                genotype = load_genotype(folder / name)
                notation = genotype.to_text()
                break
            except ValueError:  # of a space with a notation of its own
                notation = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
    return _Run(folder, made_by, options, _read_metrics(folder / "metrics.csv"), genotype, notation)


def _read_metrics(path: Path) -> dict[str, list[str]]:
    """Returns the columns of metrics.csv in their order, texts; an empty column of epochs where there is no file."""
    if not path.is_file():
        return {"epoch": []}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, restval="", restkey="")
            rows, names = list(reader), reader.fieldnames or ()
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    columns = {name: [row[name] for row in rows] for name in names if name}
    if "epoch" not in columns or not all(math.isfinite(_number(text)) for text in columns["epoch"]):
        raise ValueError(f"{path} cannot be read: it needs a column 'epoch' with a number in every row")
    return columns


def _stages(run: _Run) -> list[_StageRow]:
    """Returns the stages in their order; a run that does not tell of any has one."""
    numbers = np.nan_to_num(run.numbers("stage"), nan=1.0)
    k = run.columns.get("k", [_shown(run.options.get("k", ""))] * len(numbers))
    seconds, memory, stages = run.numbers("seconds"), run.numbers("peak_memory"), []
    for number, group in groupby(range(len(numbers)), key=lambda row: int(numbers[row])):
        rows = list(group)
        part = slice(rows[0], rows[-1] + 1)
        first, last = (int(run.epochs[row]) for row in (rows[0], rows[-1]))
        spent, most = float(np.nansum(seconds[part])), float(np.nan_to_num(memory[part]).max())
        stages.append(_StageRow(number, k[rows[0]], part, first, last, spent, most))
    return stages


def _facts(run: _Run, stages: Sequence[_StageRow]) -> list[tuple[str, str, str]]:
    """Returns what heads the page: name, value, and a remark."""
    done, asked = len(run.epochs), _number(_shown(run.options.get("epochs", "")))
    facts = [
        ("Method", _option(run, "method"), f"relaxation {_option(run, 'relaxation')}"),
        ("Space", _option(run, "space"), f"{_option(run, 'channels')} channels, {_option(run, 'layers')} layers"),
        ("Data", _option(run, "data"), f"seed {_option(run, 'seed')}, {_option(run, 'device')}"),
        ("Epochs", f"{done} of {asked:g}" if asked > done else str(done), "not finished" if asked > done else ""),
    ]
    if run.has("valid_accuracy"):
        facts.append(("Validation accuracy", f"{_last(run.numbers('valid_accuracy')):.1%}", "of the supernet"))
    if run.has("discrete/accuracy"):
        facts.append(
            ("Derived accuracy", f"{_last(run.numbers('discrete/accuracy')):.1%}", "with the supernet’s weights")
        )
    if done:
        seconds, memory = sum(s.seconds for s in stages), max(s.memory for s in stages)
        if seconds:
            facts.append(("Time", _duration(seconds), f"{_duration(seconds / done)} an epoch"))
        if memory:
            facts.append(("Peak memory", _bytes(memory), "on the GPU" if _on_gpu(run) else "of the process"))
    return facts


def _sections(run: _Run, stages: Sequence[_StageRow], charts: _Charts) -> Iterator[_Section]:
    yield _Section("cells", "Cells", _cells(run), wide=True)
    yield _Section("curves", "Curves", _curves(run, charts))
    yield _skips(run, charts)
    yield _Section("tables", "What a table says", _tables(run, charts), note=_of_tables(run))
    yield _Section("hessian", "Curvature", _hessian(run, charts), note=_CURVATURE)
    yield _Section("weights", "How the weights moved", _moved(run), wide=True)
    yield _changes(run)
    yield _costs(run, stages, charts)
    options = [[str(name), _shown(value)] for name, value in run.options.items()]
    yield _Section(
        *("options", "Options"), heading=("Option", "Value"), rows=options, folded=f"All {len(options)} options"
    )
    names = [name for name in run.columns if name != "genotype"]
    rows = [[_rounded(run.columns[name][row]) for name in names] for row in range(len(run.epochs))]
    yield _Section("numbers", "Numbers", heading=names, rows=rows, folded="metrics.csv, rounded to four digits")


_CURVATURE = (
    "The Hessian is that of the validation loss with respect to the weights of the mixed operations, at the mean that "
    "α stands for; the network’s own weights are held fixed. Searches whose largest eigenvalue grows tend to end in "
    "architectures that generalise badly (arXiv:1909.09656)."
)


def _cells(run: _Run) -> list[_Picture]:
    with tempfile.TemporaryDirectory() as temporary:
        paths = [run.path / name for name in _CELLS if (run.path / name).is_file()]
        if not paths and run.genotype is not None:  # they are drawn when a search ends
            paths = list(draw_genotype(run.genotype, temporary))
        return [_embed(path, _describe(run.genotype, path.name)) for path in paths]


def _describe(genotype: AnyGenotype | None, name: str) -> str:
    """Returns in words what the picture of a cell shows."""
    if genotype is None:
        return f"{_CELLS[name]}, drawn as a graph."
    which = "reduce" if name == "cell_reduce.png" else "normal"
    slots = _slots(genotype)
    cell = {slot: terms for slot, terms in slots.items() if slot.startswith(which)}
    said = "; ".join(f"{slot}: {' + '.join(terms)}" for slot, terms in (cell or slots).items())
    return f"{_CELLS[name]}, drawn as a graph. {said}."


def _curves(run: _Run, charts: _Charts) -> list[_Picture]:
    n = run.numbers
    valid, discrete = n("valid_accuracy"), n("discrete/accuracy")
    lr = [Line("learning rate", n("lr"), BLUE)]
    lr_caption = "Learning rate" + (", and stages with their k" if len(charts.stages) > 1 else "")
    return [
        *charts.draw(
            "Loss",
            [
                Line("train", n("train_loss"), BLUE),
                Line("valid", n("valid_loss"), ORANGE),
                Line("α steps", n("alpha_loss"), GREEN, dashed=True),
            ],
        ),
        *charts.draw(
            "Accuracy",
            [
                Line("train", n("train_accuracy"), BLUE),
                Line("valid", valid, ORANGE),
                Line("derived", discrete, PURPLE, dashed=True),
            ],
            [Band("gap", np.fmin(valid, discrete) + 0 * discrete, np.fmax(valid, discrete) + 0 * discrete, ORANGE)],
            percent=True,
        ),
        *charts.draw("Spread of the alphas on an edge", [Line("spread", n("alpha_spread"), BLUE)]),
        *charts.draw("Entropy of an edge’s weights, in nats", [Line("entropy", n("entropy"), GREEN)]),
        *charts.draw(lr_caption, lr, label_stages=True),
    ]


def _skips(run: _Run, charts: _Charts) -> _Section:
    share = run.numbers("discrete/skips")
    if not np.isfinite(share).any() and len(run.genotypes) == len(share):
        share = np.array([_skip_share(genotype) for genotype in run.genotypes])
    pictures = charts.draw(
        *("Share of skip_connect; dotted: half", [Line("share", share, GREEN)]),
        percent=True,
        limit=_SKIPS_TAKE_OVER,
    )
    last = _skip_share(run.genotype) if run.genotype is not None else math.nan
    last = _last(share) if math.isnan(last) else last
    warning, note = "", ""
    over = [int(epoch) for epoch, part in zip(run.epochs, share, strict=True) if part > _SKIPS_TAKE_OVER]
    if last > _SKIPS_TAKE_OVER:
        warning = (
            f"Skips take over: {last:.0%} of the operations of the architecture are skip_connect. Such networks learn "
            "little; search for fewer epochs, or with a method that holds skips back."
        )
    elif over:
        note = f"More than half of the operations were skips in {_spans(over)}, but they are not in the end."
    return _Section("skips", "Skip connections", pictures, note=note, warning=warning)


def _of_tables(run: _Run) -> str:
    note = "What a table of trained architectures says of the derived one"
    if not any(name.startswith("sampled/") for name in run.columns):
        return f"{note}."
    drawn = f"{_option(run, 'samples')} that are drawn from the relaxation"
    return f"{note} (the line), and of {drawn}: their mean (dashed) and one standard deviation to either side."


def _tables(run: _Run, charts: _Charts) -> list[_Picture]:
    names = dict.fromkeys(
        name.partition("/")[2].removesuffix("_mean")
        for name in run.columns
        if name.startswith("table/") or (name.startswith("sampled/") and name.endswith("_mean"))
    )
    pictures = []
    for name in names:
        mean, std = run.numbers(f"sampled/{name}_mean"), run.numbers(f"sampled/{name}_std")
        pictures += charts.draw(
            f"{name}, percent",
            [Line("derived", run.numbers(f"table/{name}"), BLUE), Line("drawn", mean, ORANGE, dashed=True)],
            [Band("spread", mean - std, mean + std, ORANGE)],
        )
    return pictures


def _hessian(run: _Run, charts: _Charts) -> list[_Picture]:
    pictures = []
    for n, name in enumerate(column for column in run.columns if column.startswith("hessian/")):
        values = run.numbers(name)
        there = values[np.isfinite(values)]
        log = len(there) > 0 and there.min() > 0 and there.max() > 100 * there.min()
        line = Line(name, values, (BLUE, ORANGE, GREEN, PURPLE)[n % 4])
        pictures += charts.draw(_HESSIAN.get(name, name), [line], log=bool(log))
    return pictures


def _moved(run: _Run) -> list[_Picture]:
    path = run.path / "alphas.png"
    alt = "The weight of every operation on every edge, over the epochs: a panel an edge, a line an operation."
    return [_embed(path, alt)] if path.is_file() else []


def _changes(run: _Run) -> _Section:
    """Returns what became another operation or input, and when."""
    genotypes, rows = run.genotypes, []
    for epoch, (before, after) in zip(run.epochs[1:], pairwise(genotypes), strict=False):
        if before != after:
            old, new, what = _slots(before), _slots(after), []
            for slot, terms in new.items():
                gone = [term for term in old.get(slot, ()) if term not in terms]
                come = [term for term in terms if term not in old.get(slot, ())]
                if gone or come:
                    what.append(f"{slot}: {' + '.join(gone) or '–'} → {' + '.join(come) or '–'}")
            if what:
                rows.append([f"{epoch:g}", "\n".join(what)])
    if len(genotypes) < 2:
        return _Section("changes", "The architecture over the epochs")
    last = f"the last in epoch {rows[-1][0]}" if rows else f"it is the same after all {len(genotypes)} epochs"
    return _Section(
        *("changes", "The architecture over the epochs"),
        heading=("Epoch", "What changed"),
        rows=rows or [["–", "nothing"]],
        note=f"It changed in {len(rows)} of {len(genotypes) - 1} epochs after the first; {last}.",
        folded="All changes" if len(rows) > 8 else "",
    )


def _costs(run: _Run, stages: Sequence[_StageRow], charts: _Charts) -> _Section:
    rows = [
        [
            str(s.number),
            f"{s.first}–{s.last}" if s.last > s.first else str(s.first),
            s.k,
            _duration(s.seconds),
            _duration(s.seconds / (s.rows.stop - s.rows.start)),
            _bytes(s.memory),
        ]
        for s in stages
    ]
    pictures = [
        *charts.draw("Seconds an epoch", [Line("seconds", run.numbers("seconds"), BLUE)]),
        *charts.draw("Peak memory, MiB", [Line("memory", run.numbers("peak_memory") / 2**20, PURPLE)]),
    ]
    note = "" if _on_gpu(run) else "Memory is the largest that the process had held by then: it falls only on resuming."
    heading = ("Stage", "Epochs", "k", "Time", "An epoch", "Peak memory")
    return _Section("costs", "Time and memory", pictures, heading=heading, rows=rows, note=note)


def _slots(genotype: AnyGenotype | str) -> dict[str, tuple[str, ...]]:
    """Returns what is added up at each place of an architecture; the same for equal architectures."""
    if isinstance(genotype, str):
        return {"architecture": (genotype,)}
    if isinstance(genotype, NASBench201Genotype):
        return {f"{j} to {i}": (op,) for (i, j), op in zip(genotype.edges, genotype.ops, strict=True)}
    if isinstance(genotype, Genotype):
        slots = {}
        for name in ("normal", "reduce"):
            edges = getattr(genotype, name)
            for node in range(len(edges) // 2):
                kept = sorted(edges[2 * node : 2 * node + 2], key=lambda edge: edge[1])
                slots[f"{name} {node}"] = tuple(f"{op}({_state(j)})" for op, j in kept)
        return slots
    if isinstance(genotype, ChainGenotype):
        return {f"layer {n}": (op,) for n, op in enumerate(genotype.ops)}
    names = [*(f"node {n}" for n in range(1, len(genotype.ops) + 1)), "output"]
    read = [",".join(map(str, nodes)) for nodes in genotype.inputs]
    return {name: (f"{op}({nodes})",) for name, op, nodes in zip(names, [*genotype.ops, ""], read, strict=True)}


def _state(index: int) -> str:
    """Returns what pictures call a state of a DARTS cell: its two inputs, then the nodes from 0."""
    return ("k-2", "k-1")[index] if index < 2 else str(index - 2)


def _skip_share(genotype: AnyGenotype | str) -> float:
    """Returns the share of skips among the operations, 0 to 1; NaN where they are not known."""
    if isinstance(genotype, str):
        return math.nan
    ops = [op for op, _ in (*genotype.normal, *genotype.reduce)] if isinstance(genotype, Genotype) else genotype.ops
    return ops.count(_SKIP) / len(ops) if ops else math.nan


def _parsed(text: str) -> AnyGenotype | None:
    try:
        return parse_genotype(text)
    except ValueError:
        return None


def _embed(path: Path, alt: str) -> _Picture:
    return _embedded(path.read_bytes(), alt)


def _embedded(content: bytes, alt: str, caption: str = "") -> _Picture:
    # PNG's first chunk has the size; a CSS pixel is 1/96 inch
    width, height = (round(int.from_bytes(content[at : at + 4], "big") * 96 / DPI) for at in (16, 20))
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return _Picture(caption, alt, source=source, width=width, height=height)


def _course(line: Line, epochs: Numbers, percent: bool) -> str:
    """Returns in words where a line begins and ends."""
    there = np.isfinite(line.values)
    values, at = line.values[there], epochs[there]
    first, last = (f"{v:.1%}" if percent else f"{v:.4g}" for v in (values[0], values[-1]))
    if len(values) == 1:
        return f"{line.label} {first} in epoch {at[0]:g}"
    return f"{line.label} from {first} in epoch {at[0]:g} to {last} in epoch {at[-1]:g}"


def _spans(epochs: Sequence[int]) -> str:
    """Returns "epochs 3 to 5 and 8" of ascending numbers."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and spans[-1][-1] == epoch - 1:
            spans[-1].append(epoch)
        else:
            spans.append([epoch])
    words = [str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans]
    said = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"epoch{'s' if len(epochs) > 1 else ''} {said}"


def _on_gpu(run: _Run) -> bool:
    return _option(run, "device").startswith("cuda")


def _option(run: _Run, name: str) -> str:
    return _shown(run.options.get(name, "?"))


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(text: str) -> float:
    """Returns the number in a text; NaN where there is none, or none that can be drawn."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _rounded(text: str) -> str:
    value = _number(text)
    if math.isnan(value):
        return "–" if text.strip() in ("", "nan") else text
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def _last(values: Numbers) -> float:
    there = values[np.isfinite(values)]
    return float(there[-1]) if len(there) else math.nan


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
