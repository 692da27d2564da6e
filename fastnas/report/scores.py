"""A score of every candidate on every edge, as a coloured table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import DPI, FAINT, INK, MONO, SANS, SLATE, op_color, save, tint

# Inches; font sizes in points.
_FIELD = (0.92, 0.3)
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.95, 0.5, 1.15, 0.55
_BETWEEN = 0.75


def plot_scores(
    scores: Mapping[str, npt.ArrayLike],
    primitives: Sequence[str],
    edges: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> Path:
    """Returns `path`, where scores were drawn as PNG: a table for each cell type, a row an edge, a column a candidate.

    A field says its part of the sum of its row's absolute values and is the stronger coloured the larger it is; the
    best of a row is framed.

    Args:
        scores: (E, O) for each cell type; what is not finite is left empty.
        primitives: O names.
        edges: E names.
        path: of the picture; it is written whole or not at all.
        title: over all tables.

    Raises:
        ValueError: a table that does not fit the primitives and the edges.
    """
    return save(scores_figure(scores, primitives, edges, title=title), path)


def scores_figure(
    scores: Mapping[str, npt.ArrayLike], primitives: Sequence[str], edges: Sequence[str], *, title: str = ""
) -> Figure:
    """Returns the picture that `plot_scores` writes, with the same arguments."""
    tables = {name: np.asarray(s, np.float64) for name, s in scores.items()}
    shape = (len(edges), len(primitives))
    for name, table in tables.items():
        if table.shape != shape:
            raise ValueError(f"scores[{name!r}] has shape {table.shape}: expected {shape}, edges x primitives")
    if not tables or 0 in shape:
        raise ValueError("scores, primitives and edges must not be empty")
    size = (_FIELD[0] * shape[1], _FIELD[1] * shape[0])
    width = _LEFT + len(tables) * (size[0] + _BETWEEN) - _BETWEEN + _RIGHT
    height = _TOP + size[1] + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    for n, (name, table) in enumerate(tables.items()):
        left = _LEFT + n * (size[0] + _BETWEEN)
        axes = figure.add_axes((left / width, _BOTTOM / height, size[0] / width, size[1] / height))
        _table(axes, table, primitives, edges)
        if len(tables) > 1:
            axes.text(0, -1.75, name, color=INK, family=SANS, size=10, weight="bold", va="bottom")
    if title:
        figure.text(0.12 / width, 1 - 0.12 / height, title, color=INK, family=SANS, size=11, weight="bold", va="top")
    figure.text(
        _LEFT / width,
        0.2 / height,
        "% of the row's absolute values; framed: the best of the row",
        color=SLATE,
        family=SANS,
        size=7.5,
    )
    return figure


def _table(axes: Axes, table: npt.NDArray[np.float64], primitives: Sequence[str], edges: Sequence[str]) -> None:
    axes.set(xlim=(0, table.shape[1]), ylim=(table.shape[0], 0))
    axes.axis("off")
    for o, op in enumerate(primitives):
        axes.text(*(o + 0.5, -0.35, op), color=SLATE, family=MONO, size=7, rotation=22, ha="left", va="bottom")
    for e, edge in enumerate(edges):
        axes.text(-0.12, e + 0.5, edge, color=SLATE, family=SANS, size=8.5, ha="right", va="center")
        row = table[e]
        finite = np.isfinite(row)
        total = float(np.abs(row[finite]).sum()) or 1.0
        largest = float(np.abs(row[finite]).max(initial=0.0)) or 1.0
        best = int(np.argmax(np.where(finite, row, -np.inf))) if finite.any() else -1
        for o, value in enumerate(row):
            strength = 0.75 * abs(value) / largest if finite[o] else 0.0
            colour = tint(op_color(primitives[o]) if value >= 0 else FAINT, strength)
            axes.add_patch(Rectangle((o, e), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
            text = f"{100 * value / total:.1f}" if finite[o] else "–"
            axes.text(o + 0.5, e + 0.5, text, color=INK, family=SANS, size=8, ha="center", va="center")
        if best >= 0:
            axes.add_patch(Rectangle((best + 0.04, e + 0.08), 0.92, 0.84, fill=False, edgecolor=INK, linewidth=1.4))
