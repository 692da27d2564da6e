"""How the architecture parameters moved in the course of a search."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .cell import INPUTS
from .style import DPI, FAINT, INK, MONO, SANS, SLATE, deepen, op_color, save

History = npt.ArrayLike | Mapping[str, npt.ArrayLike]

# Inches; font sizes in points.
_PANEL = (1.75, 1.1)
_BETWEEN = (0.26, 0.42)  # to the next panel, sideways and down (where its heading is)
_LEFT, _RIGHT, _BOTTOM = 0.75, 0.25, 0.5
_HEADING = 0.3  # over a panel
_TITLE = 0.36  # over a cell type
_BLOCK = 0.6  # between two cell types
_LEGEND_ROW = 0.22
_SMALL, _MEDIUM = 7.5, 9.0
_LINE = 4  # panels in a line of a chain
_LONGEST = 16  # characters of a leader's name that have room beside the edge
_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def plot_alphas(
    history: History,
    primitives: Sequence[str],
    edges: Sequence[tuple[int, int]],
    path: str | os.PathLike[str],
    *,
    xlabel: str = "epoch",
    ylabel: str = "weight",
    inputs: Sequence[str] = INPUTS,
) -> Path:
    """Returns `path`, where the course of a search was drawn as PNG: a panel for each edge, a line for each primitive.

    The panels of a row are the edges to one node; those of a column come from the same state. Of a chain, whose nodes
    have one edge each, the panels follow one another in lines. Each is headed by the primitive that leads at the end.

    Args:
        history: (T, E, O), what each of O primitives weighed on each of E edges at T points of time; or a mapping of
            such arrays, one for each cell type by its name. Values that are not finite leave a gap.
        primitives: O names.
        edges: E pairs `(i, j)`, from state j to state i, j < i.
        path: of the picture; it is written whole or not at all.
        xlabel: what T counts.
        ylabel: what the values are.
        inputs: names of the first states, in TeX's mathematics.

    Raises:
        ValueError: the arrays don't fit the primitives and the edges.
    """
    return save(alphas_figure(history, primitives, edges, xlabel=xlabel, ylabel=ylabel, inputs=inputs), path)


def alphas_figure(
    history: History,
    primitives: Sequence[str],
    edges: Sequence[tuple[int, int]],
    *,
    xlabel: str = "epoch",
    ylabel: str = "weight",
    inputs: Sequence[str] = INPUTS,
) -> Figure:
    """Returns the picture that `plot_alphas` writes, with the same arguments."""
    cells = _cells(history, len(primitives), edges)
    grid = _grid(edges)
    rows_of_panels, columns = (1 + max(place[axis] for place in grid) for axis in (0, 1))

    step = (_PANEL[0] + _BETWEEN[0], _PANEL[1] + _BETWEEN[1])
    legend_column = 0.55 + 0.07 * max(map(len, primitives))
    across = max(columns * step[0] - _BETWEEN[0], legend_column)
    rows = math.ceil(len(primitives) / int(across / legend_column))
    legend_height = rows * _LEGEND_ROW + 0.2
    heading = _HEADING + (_TITLE if any(cells) else 0)
    block = heading + rows_of_panels * step[1] - _BETWEEN[1] + _BLOCK
    width = _LEFT + across + _RIGHT
    height = legend_height + len(cells) * block - _BLOCK + _BOTTOM

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    looks = _looks(primitives)
    limits = _limits(list(cells.values()))
    for c, (title, values) in enumerate(cells.items()):
        top = height - legend_height - c * block  # of the block, inches from below
        if title:
            figure.text(
                _LEFT / width,
                (top - _TITLE / 2) / height,
                title,
                color=INK,
                family=SANS,
                size=12,
                weight="bold",
                va="center",
            )
        for e, (i, j) in enumerate(edges):
            row, column = grid[e]
            x = _LEFT + column * step[0]
            y = top - heading - row * step[1] - _PANEL[1]
            axes = figure.add_axes((x / width, y / height, _PANEL[0] / width, _PANEL[1] / height))
            lowest = not any(b == column and a > row for a, b in grid)
            _panel(axes, values[:, e], primitives, looks, limits, leftmost=column == 0, lowest=lowest)
            source = f"${inputs[j]}$" if j < len(inputs) else str(j - len(inputs))
            _heading(axes, rf"{source} $\rightarrow$ {i - len(inputs)}", values[-1, e], primitives)
            if column == 0:
                axes.set_ylabel(ylabel, color=SLATE, family=SANS, size=_SMALL)
            if lowest:
                axes.set_xlabel(xlabel, color=SLATE, family=SANS, size=_SMALL)

    lines = [Line2D([], [], color=color, linestyle=style, linewidth=2) for color, style in looks]
    figure.legend(
        lines,
        list(primitives),
        loc="upper left",
        bbox_to_anchor=((_LEFT - 0.05) / width, 1 - 0.08 / height),
        borderaxespad=0,
        ncols=math.ceil(len(primitives) / rows),
        frameon=False,
        prop={"family": MONO, "size": _MEDIUM - 1},
        labelcolor=INK,
        handlelength=1.8,
        columnspacing=1.4,
    )
    return figure


def _grid(edges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the row and the column of each edge's panel."""
    targets, sources = sorted({i for i, _ in edges}), sorted({j for _, j in edges})
    if len(targets) == len(sources) == len(edges):
        return [divmod(n, _LINE) for n in range(len(edges))]
    return [(targets.index(i), sources.index(j)) for i, j in edges]


def _cells(history: History, primitives: int, edges: Sequence[tuple[int, int]]) -> dict[str, npt.NDArray[np.float64]]:
    """Returns the arrays by cell type, after checking them."""
    if not primitives or not edges:
        raise ValueError("primitives and edges must not be empty")
    if any(not 0 <= j < i for i, j in edges) or len(set(edges)) != len(edges):
        raise ValueError(f"edges must be different pairs (i, j) with 0 <= j < i, not {list(edges)}")
    by_name: Mapping[str, Any] = history if isinstance(history, Mapping) else {"": history}
    cells = {}
    for name, values in by_name.items():
        array = np.asarray(values, np.float64)
        if array.ndim != 3 or len(array) == 0 or array.shape[1:] != (len(edges), primitives):
            raise ValueError(
                f"history{f' of {name!r}' if name else ''} must be (T, {len(edges)}, {primitives}): points of time, "
                f"edges, primitives; not {array.shape}"
            )
        cells[name] = array
    if not cells:
        raise ValueError("history is empty; give an array (T, E, O) for at least one cell type")
    return cells


def _looks(primitives: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns a colour and a line style for each primitive; those of one colour differ in style."""
    colors = [op_color(op) for op in primitives]
    return [(color, _STYLES[colors[:n].count(color) % len(_STYLES)]) for n, color in enumerate(colors)]


def _limits(arrays: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Returns the range of all values, a little widened, so that all panels can be compared."""
    finite = np.concatenate([array[np.isfinite(array)] for array in arrays])
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _panel(
    axes: Axes,
    values: npt.NDArray[np.float64],
    primitives: Sequence[str],
    looks: Sequence[tuple[str, Any]],
    limits: tuple[float, float],
    *,
    leftmost: bool,
    lowest: bool,
) -> None:
    """Draws one edge's values, (T, O)."""
    time = np.arange(len(values))
    for o, (color, style) in enumerate(looks):
        # A single point has no line.
        marker = "o" if len(values) == 1 else None
        axes.plot(time, values[:, o], color=color, linestyle=style, linewidth=1.4, marker=marker, markersize=3)
    axes.set(xlim=(0, len(values) - 1) if len(values) > 1 else (-0.5, 0.5), ylim=limits)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.grid(color="#E4E7EB", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(
        color=FAINT, labelcolor=SLATE, labelsize=_SMALL - 0.5, length=2, labelleft=leftmost, labelbottom=lowest, pad=2
    )
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=FAINT, linewidth=0.8)


def _heading(axes: Axes, edge: str, last: npt.NDArray[np.float64], primitives: Sequence[str]) -> None:
    """Names the edge, and the primitive that leads at the end."""
    axes.set_title(edge, loc="left", color=INK, family=SANS, size=_MEDIUM, pad=4)
    if np.isfinite(last).any():
        leader = primitives[int(np.nanargmax(np.where(np.isfinite(last), last, np.nan)))]
        shown = leader if len(leader) <= _LONGEST else leader[: _LONGEST - 1] + "…"
        axes.set_title(
            shown, loc="right", color=deepen(op_color(leader)), family=MONO, size=_SMALL, weight="bold", pad=4
        )
