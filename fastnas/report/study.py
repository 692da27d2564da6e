"""One page of HTML for a study of a supernet, and one for several side by side; as the page of a search."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastnas._files import read_table, write_table

from .curves import BLUE, GREEN, ORANGE, PURPLE, Band, Line, curves_svg
from .operators import operators_figure
from .page import Numbers, _course, _embedded, _number, _Picture, _read_metrics, _render, _rounded, _Section, _shown
from .scatter import scatter_figure
from .style import INK, SLATE

_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
_SCATTERS = 12  # at most so many pictures of points

Table = Mapping[str, list[str]]


@dataclass(frozen=True)
class _Study:
    """What the folder of a study holds: tables as texts by column."""

    path: Path
    options: Mapping[str, Any]
    summary: Table
    pruning: Table

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(self.summary["bn"]))

    @property
    def epochs(self) -> Numbers:
        """The epochs studied, (T,), ascending."""
        return np.unique(_numbers(self.summary, "epoch"))

    def series(self, name: str, bn: str) -> Numbers:
        """Returns a column of the summary for one mode, (T,)."""
        rows = [n for n, mode in enumerate(self.summary["bn"]) if mode == bn]
        return _numbers(self.summary, name)[rows]


@dataclass
class _Pictures:
    """Draws curves, each with ids of its own."""

    made: int = field(default=0, init=False)

    def __call__(
        self, caption: str, x: Numbers, lines: Sequence[Line], bands: Sequence[Band] = (), **how: Any
    ) -> list[_Picture]:
        lines = [line for line in lines if np.isfinite(line.values).any()]
        bands = [band for band in bands if np.isfinite(band.low + band.high).any()]
        if not lines:
            return []
        self.made += 1
        svg = curves_svg(x, lines, bands, key=f"study{self.made}", **how)
        said = "; ".join(_course(line, x, how.get("percent", False)).replace("epoch ", "") for line in lines)
        return [_Picture(caption, f"{caption}: {said}.", svg=Markup(svg))]


def write_study_page(folder: str | os.PathLike[str]) -> Path:
    """Returns the path of `report.html`, one page that shows the study in `folder`, written there whole or not at all.

    Args:
        folder: what `fastnas study` left.

    Raises:
        FileNotFoundError: where the folder holds no finished study.
        ValueError: where a file is damaged; the message names it.
        OSError: where a file cannot be read or written.
    """
    study = _read(Path(folder))
    draw = _Pictures()
    sections = [
        _Section("ranking", "Does it rank?", _ranking(study, draw), note=_RANKING),
        _Section("finding", "Does it find the best?", _finding(study, draw), note=_FINDING),
        _Section("points", "Architectures", _points(study), note=_POINTS, wide=True),
        _Section("stability", "From snapshot to snapshot", _stability(study, draw), note=_STABILITY),
        _Section("sizes", "Is it size?", _sizes(study, draw), note=_SIZES),
        _Section("operators", "What is preferred", _operators(study), note=_OPERATORS, wide=True),
        _Section("pruning", "Pruned search spaces", _pruning(study, draw), note=_PRUNING),
        _numbers_section("numbers", "Numbers", study.summary, "summary.csv, rounded to four digits"),
        _numbers_section("pruned", "Numbers of pruned spaces", study.pruning, "pruning.csv, rounded to four digits"),
        _Section(
            *("options", "Options"),
            heading=("Option", "Value"),
            rows=[[name, _shown(value)] for name, value in study.options.items() if name != "made_by"],
            folded="All options",
        ),
    ]
    return _render(
        study.path / "report.html",
        title=f"A supernet of {study.options['space']} on {study.options['data']}",
        made_by=str(study.options.get("made_by", "")),
        facts=_facts(study),
        sections=[section for section in sections if section.pictures or section.rows],
    )


_RANKING = (
    "Rank correlations of the subnets’ accuracies with the ground truth; shaded: 95 % of bootstrap resamples of the "
    "architectures. A supernet that keeps getting better need not get better at ranking (arXiv:2010.08219)."
)
_FINDING = (
    "The best ground truth among the k architectures that the supernet ranks first, and among k drawn at random "
    "(expectation; shaded: 5 to 95 %). Where the two lines meet, the ranking is worth nothing. Of the worst tenth, "
    "recall is the part that is among the last k; precision is the part of the last k that is of the worst tenth."
)
_POINTS = (
    "Each point is an architecture: its place by the accuracy with the shared weights, and by the ground truth; the "
    "best is 1."
)
_STABILITY = "How far a snapshot orders the architectures as the one before it did."
_SIZES = (
    "Spearman’s correlation of the supernet’s order with that by parameters and by multiply-adds. Dashed: that of the "
    "ground truth with the same. A supernet that follows size more closely than the truth does is biased."
)
_OPERATORS = (
    "Shares of the operators among the architectures, in tenths from the best to the worst, by the ground truth and by "
    "the last snapshot; and at each place of the best tenth."
)
_PRUNING = (
    "Supernets trained in search spaces that lack the worst of the studied architectures by some verdict, over the "
    "part that is kept; at 1 a supernet trained on all of them. Where the space has more than those, “space” is "
    "the supernet of the whole space. Random search is the expected best of ten, of all studied and of pruned spaces."
)


def _read(folder: Path) -> _Study:
    path = folder / "study.json"
    if not path.is_file() or not (folder / "summary.csv").is_file():
        raise FileNotFoundError(f"{folder} holds no finished study of fastnas: give a study's folder")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(options, dict) or not {"space", "data", "seed"} <= options.keys():
            raise ValueError("it holds no options")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    summary = _read_metrics(folder / "summary.csv")
    for name in ("bn", "spearman", "top10", "random10"):
        if name not in summary:
            raise ValueError(f"{folder / 'summary.csv'} cannot be read: it has no column {name!r}")
    return _Study(folder, options, summary, _read_metrics(folder / "pruning.csv"))


def _facts(study: _Study) -> list[tuple[str, str, str]]:
    o, bn = study.options, study.modes[0]
    low, high = (study.series(f"spearman_{end}", bn)[-1] for end in ("low", "high"))
    facts = [
        ("Space", str(o["space"]), f"{o.get('channels')} channels, {o.get('layers')} layers"),
        ("Data", str(o["data"]), f"seed {o['seed']}, {o.get('device')}"),
        ("Architectures", f"{study.series('count', bn)[-1]:.0f}", f"of {Path(str(o.get('table'))).name}"),
        ("Epochs", f"{study.epochs[-1]:g}", f"of {o.get('epochs')}, the last one studied"),
        ("Spearman", f"{study.series('spearman', bn)[-1]:.3f}", f"{low:.3f} to {high:.3f}, bn {bn}"),
        ("Kendall", f"{study.series('kendall', bn)[-1]:.3f}", f"bn {bn}"),
        (
            "Top 10",
            f"{study.series('top10', bn)[-1]:.2f}",
            f"random 10: {study.series('random10', bn)[-1]:.2f}, {o.get('column')}",
        ),
    ]
    return facts


def _by_mode(study: _Study, name: str) -> list[Line]:
    return [Line(bn, study.series(name, bn), _COLORS[n % 4]) for n, bn in enumerate(study.modes)]


def _ranking(study: _Study, draw: _Pictures) -> list[_Picture]:
    pictures = []
    for name, caption in (("spearman", "Spearman’s ρ"), ("kendall", "Kendall’s τ")):
        bands = [
            Band("", study.series(f"{name}_low", bn), study.series(f"{name}_high", bn), _COLORS[n % 4])
            for n, bn in enumerate(study.modes)
        ]
        pictures += draw(caption, study.epochs, _by_mode(study, name), bands)
    pictures += draw("Average accuracy of the subnets", study.epochs, _by_mode(study, "supernet_mean"), percent=True)
    pictures += draw("Best accuracy of a subnet", study.epochs, _by_mode(study, "supernet_best"), percent=True)
    return pictures


def _finding(study: _Study, draw: _Pictures) -> list[_Picture]:
    pictures, bn = [], study.modes[0]
    for k in (1, 10):
        lines = _by_mode(study, f"top{k}")
        lines.append(Line(f"random {k}", study.series(f"random{k}", bn), SLATE, dashed=True))
        pictures += draw(f"Ground truth of the best of the first {k}", study.epochs, lines)
    top = _read_table(study.path / "top.csv")
    if top:
        last = f"{study.epochs[-1]:g}"
        by = {name: _where(top, by=name) for name in ("random", "params", "flops")}
        by["supernet"] = _where(top, by="supernet", epoch=last, bn=bn)
        x = _numbers(by["random"], "k")
        colors = {"supernet": BLUE, "random": SLATE, "params": GREEN, "flops": ORANGE}
        lines = [
            Line(name, _numbers(by[name], "best"), color, dashed=name != "supernet") for name, color in colors.items()
        ]
        band = Band("", _numbers(by["random"], "low"), _numbers(by["random"], "high"), SLATE)
        pictures += draw(f"Ground truth of the best of the first k, bn {bn}", x, lines, [band], xlabel="k", xlog=True)
    lines = _by_mode(study, "bottom_recall")
    lines.append(Line("chance", study.series("bottom_chance", bn), SLATE, dashed=True))
    pictures += draw("Part of the worst tenth that it ranks in the last tenth", study.epochs, lines, percent=True)
    bottom = _read_table(study.path / "bottom.csv")
    if bottom:
        found = _where(bottom, by="supernet", epoch=f"{study.epochs[-1]:g}", bn=bn)
        chance = _where(bottom, by="random")
        lines = [
            Line("recall", _numbers(found, "recall"), BLUE),
            Line("precision", _numbers(found, "precision"), ORANGE),
            Line("chance", _numbers(chance, "recall"), BLUE, dashed=True),
            Line("chance", _numbers(chance, "precision"), ORANGE, dashed=True),
        ]
        x = _numbers(found, "k")
        pictures += draw(f"The worst tenth among the last k, bn {bn}", x, lines, percent=True, xlabel="k", xlog=True)
    return pictures


def _points(study: _Study) -> list[_Picture]:
    from scipy.stats import rankdata

    table = _read_table(study.path / "subnets.csv")
    if not table:
        return []
    epochs = study.epochs
    shown = epochs[
        np.unique(np.linspace(0, len(epochs) - 1, max(1, _SCATTERS // len(study.modes))).round().astype(int))
    ]
    pictures = []
    for epoch in shown:
        for bn in study.modes:
            name = f"epoch{epoch:g}_{bn}"
            rho = study.series("spearman", bn)[int(np.flatnonzero(epochs == epoch)[0])]
            figure = scatter_figure(
                *(rankdata(-_numbers(table, name)), rankdata(-_numbers(table, "truth"))),
                xlabel="place by the accuracy with the shared weights",
                ylabel=f"place by {study.options.get('column', 'the ground truth')}",
                title=f"Epoch {epoch:g}, bn {bn}",
                subtitle=f"Spearman {rho:.3f}",
            )
            alt = f"Places by the shared weights against those by the ground truth, epoch {epoch:g}, bn {bn}."
            pictures.append(_png(figure, alt))
    return pictures


def _stability(study: _Study, draw: _Pictures) -> list[_Picture]:
    return [
        *draw("Spearman’s ρ with the snapshot before", study.epochs, _by_mode(study, "stability")),
        *draw("Common part of the two top 10", study.epochs, _by_mode(study, "stability_top10"), percent=True),
    ]


def _sizes(study: _Study, draw: _Pictures) -> list[_Picture]:
    bn = study.modes[0]
    lines = []
    for name, said, color in (("params", "parameters", BLUE), ("flops", "multiply-adds", ORANGE)):
        lines.append(Line(said, study.series(f"{name}_supernet_spearman", bn), color))
        lines.append(Line("truth", study.series(f"{name}_truth_spearman", bn), color, dashed=True))
    return draw(f"Spearman’s ρ with size, bn {bn}", study.epochs, lines)


def _operators(study: _Study) -> list[_Picture]:
    table = _read_table(study.path / "operators.csv")
    if not table:
        return []
    heads = ("by", "epoch", "bn", "group", "size", "mean", "place")
    primitives = [name for name in table if name not in heads]
    last = {"by": "supernet", "epoch": f"{study.epochs[-1]:g}", "bn": study.modes[0]}
    rankings = {"ground truth": {"by": "truth"}, f"supernet, epoch {last['epoch']}, bn {last['bn']}": last}

    def shares(part: Table) -> Numbers:
        return np.stack([_numbers(part, name) for name in primitives], axis=1)

    tenths = {title: _where(table, place="all", **where) for title, where in rankings.items()}
    places = {title: _where(table, group="1", **where) for title, where in rankings.items()}
    first, at = next(iter(tenths.values())), next(iter(places.values()))
    return [
        _png(
            operators_figure({t: shares(part) for t, part in tenths.items()}, first["group"], primitives),
            "Shares of the operators in tenths of the architectures, the best first.",
            "Tenths of the architectures, the best first",
        ),
        _png(
            operators_figure({t: shares(part) for t, part in places.items()}, at["place"], primitives),
            "Shares of the operators at each place of the best tenth of the architectures.",
            "The best tenth, place by place",
        ),
    ]


def _pruning(study: _Study, draw: _Pictures) -> list[_Picture]:
    table = study.pruning
    if "prune" not in table:
        return []
    kinds = [kind for kind in dict.fromkeys(table["prune"]) if kind not in _UNPRUNED]
    keep = _numbers(table, "keep")
    x = np.unique(keep[np.isfinite(keep)])
    space = _where(table, prune="space")
    pictures = []

    def values(kind: str, name: str) -> Numbers:
        found: dict[float, float] = {}
        for where in ("none", kind):  # all is kept at 1
            part = _where(table, prune=where)
            found |= dict(zip(_numbers(part, "keep"), _numbers(part, name), strict=True))
        return np.array([found.get(keep, math.nan) for keep in x])

    for name, (caption, percent) in _PRUNED.items():
        lines = [Line(kind, values(kind, name), _COLORS[n % 4]) for n, kind in enumerate(kinds)]
        if name == "top10":
            lines += [
                Line(f"random, {kind}", values(kind, "random10_pruned"), _COLORS[n % 4], dashed=True)
                for n, kind in enumerate(kinds)
                if kind == "optimistic"
            ]
            whole = np.full(len(x), _numbers(table, "random10_whole")[0])
            lines.append(Line("random, all", whole, SLATE, dashed=True))
        if space["prune"]:
            lines.append(Line("space", np.full(len(x), _numbers(space, name)[0]), INK, dashed=True))
        pictures += draw(caption, x, lines, percent=percent, xlabel=_KEPT, xlog=True)
    return pictures


def _numbers_section(key: str, title: str, table: Table, folded: str) -> _Section:
    names = list(table)
    count = len(table[names[0]]) if names else 0
    rows = [[_rounded(table[name][n]) for name in names] for n in range(count)]
    return _Section(key, title, heading=names, rows=rows, folded=folded)


_COMPARED = {
    "spearman": "Spearman’s ρ",
    "kendall": "Kendall’s τ",
    "top1": "Ground truth of the first",
    "top10": "Ground truth of the best of the first 10",
    "random10": "Ground truth of the best of 10 at random",
    "bottom_recall": "Part of the worst tenth in the last tenth",
    "stability": "Spearman’s ρ with the snapshot before",
    "supernet_mean": "Average accuracy of the subnets",
    "supernet_best": "Best accuracy of a subnet",
}
_AGREEMENT = ("agreement", "Spearman’s ρ of the supernets of two seeds")
_PRUNED = {
    "top10": ("Ground truth of the best of the supernet’s first 10", False),
    "spearman": ("Spearman’s ρ", False),
    "supernet_mean": ("Average accuracy of the subnets", True),
    "supernet_best": ("Best accuracy of a subnet", True),
}
_KEPT = "part of the studied architectures that is kept"
_UNPRUNED = ("none", "space")  # what pruning.csv calls all of the studied architectures, and all of the space
_ALIKE = {"seed", "made_by", "jobs", "threads", "device", "root", "table"}


def write_comparison(folders: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> Path:
    """Returns the path of `report.html` in `folder`, one page that shows several studies side by side.

    Studies whose options differ in nothing but the seed are one: mean and standard deviation over them, and how far
    their supernets agree with each other. A folder that is given twice counts once. The numbers are in `compare.csv`
    beside it, those of pruned spaces in `compare_pruning.csv`.

    Args:
        folders: of the studies.
        folder: where the page is written.

    Raises:
        FileNotFoundError: where a folder holds no finished study.
        ValueError: where a file is damaged; the message names it.
        OSError: where a file cannot be read or written.
    """
    different = {Path(path).resolve(): Path(path) for path in folders}.values()
    groups = _groups([_read(path) for path in different])
    draw = _Pictures()
    rows = [row for label, studies in groups.items() for row in _compared(label, studies)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pruned = [row for label, studies in groups.items() for row in _compared_pruning(label, studies)]
    write_table(folder / "compare.csv", list(rows[0]), rows)
    if pruned:
        write_table(folder / "compare_pruning.csv", list(pruned[0]), pruned)
    x = np.unique([_number(str(row["epoch"])) for row in rows])
    several = len({row["bn"] for row in rows}) > 1
    pictures = []
    for name, caption in (*_COMPARED.items(), _AGREEMENT):
        lines, bands = [], []
        for n, (label, bn) in enumerate(dict.fromkeys((row["study"], row["bn"]) for row in rows)):
            found = {_number(str(r["epoch"])): r for r in rows if (r["study"], r["bn"]) == (label, bn)}
            mean, std = (
                np.array([_number(str(found[e][f"{name}_{what}"])) if e in found else math.nan for e in x])
                for what in ("mean", "std")
            )
            title = ", ".join(str(part) for part in (label, bn if several or not label else "") if part)
            lines.append(Line(title, mean, _COLORS[n % 4], dashed=n >= 4))
            bands.append(Band("", mean - std, mean + std, _COLORS[n % 4]))
        pictures += draw(caption, x, lines, bands, percent=name in ("supernet_mean", "supernet_best", "bottom_recall"))
    table = {name: [_shown(row[name]) for row in rows] for name in rows[0]}
    listed = [
        [label or "all", str(study.path), str(study.options["seed"])] for label, g in groups.items() for study in g
    ]
    sections = [
        _Section("curves", "Side by side", pictures, note=_SIDE),
        *([_Section("pruning", "Pruned search spaces", _compare_pruning(pruned, draw))] if pruned else []),
        _numbers_section("numbers", "Numbers", table, "compare.csv, rounded to four digits"),
        _Section("studies", "Studies", heading=("Study", "Folder", "Seed"), rows=listed),
    ]
    first = next(iter(groups.values()))[0].options
    facts = [
        ("Studies", str(len(groups)), f"{len(different)} folders"),
        ("Seeds", ", ".join(str(len(g)) for g in groups.values()), "of each study"),
    ]
    return _render(
        folder / "report.html",
        title=f"{len(groups)} {'studies' if len(groups) > 1 else 'study'} of supernets",
        made_by=str(first.get("made_by", "")),
        facts=facts,
        sections=sections,
    )


_SIDE = "Means over the seeds; shaded: one standard deviation to either side."


def _groups(studies: Sequence[_Study]) -> dict[str, list[_Study]]:
    """Returns the studies by what tells them apart: options, seed aside, that are not all the same."""
    options = [{k: v for k, v in study.options.items() if k not in _ALIKE} for study in studies]

    def told_apart(names: Sequence[str]) -> int:
        return len({json.dumps([o.get(name) for name in names]) for o in options})

    differs: list[str] = []  # as few as tell all apart
    for name in dict.fromkeys(name for o in options for name in o):
        if told_apart([*differs, name]) > told_apart(differs):
            differs.append(name)
    groups: dict[str, list[_Study]] = {}
    for study, o in zip(studies, options, strict=True):
        label = ", ".join(f"{name} {_shown(o.get(name))}" for name in differs)
        groups.setdefault(label, []).append(study)
    return groups


def _compared(label: str, studies: Sequence[_Study]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for bn in studies[0].modes:
        for t, epoch in enumerate(studies[0].epochs):
            row: dict[str, object] = {"study": label, "bn": bn, "epoch": f"{epoch:g}", "seeds": len(studies)}
            for name in _COMPARED:
                row |= _over_seeds(name, [study.series(name, bn)[t] for study in studies])
            row |= _over_seeds(_AGREEMENT[0], _agreements(studies, f"epoch{epoch:g}_{bn}"))
            rows.append(row)
    return rows


def _compared_pruning(label: str, studies: Sequence[_Study]) -> list[dict[str, object]]:
    tables = [study.pruning for study in studies if "prune" in study.pruning]
    keys = dict.fromkeys(key for table in tables for key in zip(table["prune"], table["keep"], strict=True))
    rows: list[dict[str, object]] = []
    for kind, keep in keys:
        parts = [part for table in tables if (part := _where(table, prune=kind, keep=keep))["prune"]]
        row: dict[str, object] = {"study": label, "prune": kind, "keep": keep, "seeds": len(parts)}
        for name in _PRUNED:
            row |= _over_seeds(name, [_numbers(part, name)[0] for part in parts])
        rows.append(row)
    return rows


def _agreements(studies: Sequence[_Study], column: str) -> list[float]:
    """Returns Spearman's ρ of the subnets' accuracies for each two studies; none where their architectures differ."""
    from scipy.stats import rankdata

    tables = [_read_table(study.path / "subnets.csv") for study in studies]
    if any(column not in table or table["architecture"] != tables[0]["architecture"] for table in tables):
        return []
    ranks = [rankdata(_numbers(table, column)) for table in tables]
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in itertools.combinations(ranks, 2) if np.ptp(a) and np.ptp(b)]


def _over_seeds(name: str, values: Sequence[float]) -> dict[str, float | str]:
    """Returns mean and standard deviation, empty where there are not enough numbers."""
    there = [value for value in values if not math.isnan(value)]
    std = float(np.std(there, ddof=1)) if len(there) > 1 else ""
    return {f"{name}_mean": float(np.mean(there)) if there else "", f"{name}_std": std}


def _compare_pruning(rows: Sequence[Mapping[str, object]], draw: _Pictures) -> list[_Picture]:
    """Returns the pictures of pruned spaces, a line a study and a verdict; all of the architectures is part 1."""
    rows = [row for row in rows if row["prune"] != "space"]
    x = np.unique([_number(str(row["keep"])) for row in rows])
    named = [pair for pair in dict.fromkeys((row["study"], row["prune"]) for row in rows) if pair[1] != "none"]
    pictures = []
    for name, (caption, percent) in _PRUNED.items():
        lines, bands = [], []
        for n, (label, kind) in enumerate(named):
            own = {_number(str(r["keep"])): r for r in rows if r["study"] == label and r["prune"] in (kind, "none")}
            mean, std = (
                np.array([_number(str(own[keep][f"{name}_{what}"])) if keep in own else math.nan for keep in x])
                for what in ("mean", "std")
            )
            lines.append(Line(f"{label}, {kind}" if label else str(kind), mean, _COLORS[n % 4], dashed=n >= 4))
            bands.append(Band("", mean - std, mean + std, _COLORS[n % 4]))
        pictures += draw(caption, x, lines, bands, percent=percent, xlabel=_KEPT, xlog=True)
    return pictures


def _read_table(path: Path) -> dict[str, list[str]]:
    rows = read_table(path) if path.is_file() else []
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _where(table: Table, **values: str) -> dict[str, list[str]]:
    """Returns the rows that have these texts."""
    rows = [n for n in range(len(next(iter(table.values())))) if all(table[k][n] == v for k, v in values.items())]
    return {name: [column[n] for n in rows] for name, column in table.items()}


def _numbers(table: Table, name: str) -> Numbers:
    return np.array([_number(text) for text in table[name]])


def _png(figure: Figure, alt: str, caption: str = "") -> _Picture:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]
    return _embedded(file.getvalue(), alt, caption)
