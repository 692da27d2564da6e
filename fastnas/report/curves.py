"""Curves over the epochs of a search, as SVG that takes its colours and fonts from the page it stands in."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from .style import FAINT, INK, SLATE

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#8E3B8E"
GRID = "#E4E7EB"

# The page's name of each colour; what it says counts, these values only where it says nothing.
_NAMES = {
    INK: "ink",
    SLATE: "slate",
    FAINT: "faint",
    GRID: "grid",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
}
_SIZE = (4.2, 2.55)  # inches
_TEXT = 9.0  # points
_FEW = 6  # values that all have a tick


@dataclass(frozen=True)
class Line:
    """A line, drawn over the epochs in which it has a number.

    Attributes:
        label: What the legend calls it.
        values: (T,), one an epoch; NaN where nothing was measured.
        color: One of this file's.
        dashed: Whether it is dashed.
    """

    label: str
    values: npt.NDArray[np.float64]
    color: str = BLUE
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """What lies between two lines, shaded.

    Attributes:
        label: What the legend calls it; it is left out where this is empty.
        low: (T,); NaN where nothing was measured.
        high: (T,).
        color: One of this file's.
    """

    label: str
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    color: str = BLUE


@dataclass(frozen=True)
class Stage:
    """A part of the search: what is drawn behind the curves.

    Attributes:
        label: What stands in it.
        first: Its first epoch.
        last: Its last epoch.
    """

    label: str
    first: float
    last: float


def curves_svg(
    epochs: npt.NDArray[np.float64],
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    stages: Sequence[Stage] = (),
    label_stages: bool = False,
    percent: bool = False,
    log: bool = False,
    limit: float | None = None,
    xlabel: str = "epoch",
    xlog: bool = False,
    key: str = "curve",
) -> str:
    """Returns an `<svg>` element of the lines and bands over the epochs.

    Its colours are CSS variables (`--ink`, `--slate`, `--faint`, `--grid`, `--blue`, `--orange`, `--green`,
    `--purple`), so that a page can be dark; it has no background and no fonts of its own. Labels are drawn as they are,
    never as TeX.

    Args:
        epochs: (T,).
        lines: drawn in this order.
        bands: drawn behind the lines.
        stages: shaded in turn behind everything, where there are two or more.
        label_stages: write the stages' labels.
        percent: values are parts of 1 and shown in percent.
        log: a logarithmic axis; values must then be above 0.
        limit: a value to mark with a horizontal line.
        xlabel: what stands in the place of the epochs.
        xlog: a logarithmic axis for that; its values must then be above 0.
        key: starts the ids inside; different on a page for each picture.
    """
    named: list[Line | Band] = [*lines, *bands]
    figure = Figure(figsize=_SIZE)
    keyed = sum(bool(entry.label) for entry in named)
    columns = _columns([entry.label for entry in named if entry.label])
    lines_of_keys = -(-keyed // columns)
    axes = figure.add_axes((0.135, 0.15, 0.845, 0.78 - 0.06 * lines_of_keys if keyed > 1 else 0.8))
    axes.patch.set_visible(False)
    shaded = stages if len(stages) > 1 else ()
    for n, stage in enumerate(shaded):
        if n % 2 == 0:
            axes.axvspan(stage.first - 0.5, stage.last + 0.5, color=FAINT, alpha=0.16, linewidth=0)
        if label_stages:
            middle = (stage.first + stage.last) / 2
            axes.text(
                *(middle, 0.97, stage.label),
                transform=axes.get_xaxis_transform(),
                color=SLATE,
                size=_TEXT - 1,
                ha="center",
                va="top",
                parse_math=False,
            )
    shades = []
    for band in bands:
        there = np.isfinite(band.low) & np.isfinite(band.high)
        shade = axes.fill_between(
            *(epochs[there], band.low[there], band.high[there]),
            color=band.color,
            alpha=0.18,
            linewidth=0,
        )
        shades.append(shade)
    drawn = []
    for line in lines:
        there = np.isfinite(line.values)
        drawn += axes.plot(
            epochs[there],
            line.values[there],
            color=line.color,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            linewidth=1.6,
            # a line through few points would hide which they are, and one point has no line
            marker="o" if there.sum() <= 12 else None,
            markersize=2.8,
        )
    if limit is not None:
        axes.axhline(limit, color=FAINT, linewidth=1, linestyle=(0, (1, 1.5)))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(y=0.08)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if xlog:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if len(epochs) <= _FEW:  # which may all lie within a decade
            axes.set_xticks(epochs)
    elif xlabel == "epoch":
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_xlabel(xlabel, color=SLATE, size=_TEXT, labelpad=1)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=FAINT, labelcolor=SLATE, labelsize=_TEXT, length=2, pad=2)
    for offset in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
        offset.set(color=SLATE, size=_TEXT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=FAINT, linewidth=0.8)
    keys = [(mark, entry.label) for mark, entry in zip([*drawn, *shades], named, strict=True) if entry.label]
    if len(keys) > 1:
        legend = axes.legend(
            [mark for mark, _ in keys],
            [label for _, label in keys],
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            borderaxespad=0.2,
            ncols=columns,
            frameon=False,
            fontsize=_TEXT if lines_of_keys == 1 else _TEXT - 2,
            labelcolor=INK,
            handlelength=1.5,
            handletextpad=0.5,
            columnspacing=1.2,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _inline(figure, key)


def _columns(labels: Sequence[str]) -> int:
    """Returns in how many columns a legend fits: all in one line, or fewer."""
    # in sizes of the text: of the letters, and of what is drawn before them
    widths = [0.55 * len(label) + 3.5 for label in labels]
    width = _SIZE[0] * 72 / _TEXT
    if len(labels) < 5 and sum(widths) <= width:
        return max(1, len(labels))
    return max(1, min(3, int(width / max(widths))))


def _inline(figure: Figure, key: str) -> str:
    """Returns the figure as an element that can stand in a page beside others."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # text stays text, and what matplotlib numbers is numbered alike each time
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)  # type: ignore[no-untyped-call]
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    # both the short and the long form of a font's style
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # a hundredth of a point is enough for coordinates; what is written between the tags is left alone
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for color, name in _NAMES.items():
        svg = svg.replace(color.lower(), f"var(--{name}, {color.lower()})")
    return svg.strip()
