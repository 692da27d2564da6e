"""A score of architectures against what they are worth."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from .style import DPI, FAINT, INK, SANS, SLATE, save

_SIZE = (5.4, 4.0)  # inches
_POINT = "#0072B2"
_OUTSIDE = "#D55E00"


def plot_scatter(
    scores: npt.ArrayLike,
    values: npt.ArrayLike,
    path: str | os.PathLike[str],
    *,
    xlabel: str = "score",
    ylabel: str = "accuracy",
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Returns `path`, where a point for each architecture was drawn as PNG, its score to the right, its value upwards.

    Scores that are all above 0 and span more than three decades are drawn on a logarithmic axis. A score of −inf is
    drawn as a mark on the left edge, one of inf on the right; NaN is left out.

    Args:
        scores: (N,).
        values: (N,).
        path: of the picture; it is written whole or not at all.
        xlabel: what the scores are.
        ylabel: what the values are.
        title: over the picture, such as the rank correlations.
        subtitle: under the title, smaller.

    Raises:
        ValueError: the arrays don't fit each other, or there is nothing to draw.
    """
    return save(scatter_figure(scores, values, xlabel=xlabel, ylabel=ylabel, title=title, subtitle=subtitle), path)


def scatter_figure(
    scores: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    xlabel: str = "score",
    ylabel: str = "accuracy",
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Returns the picture that `plot_scatter` writes, with the same arguments."""
    x, y = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"scores and values must be (N,), one an architecture, got {x.shape} and {y.shape}")
    kept = ~np.isnan(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) == 0:
        raise ValueError("scores and values have no pair of numbers to draw")
    finite = np.isfinite(x)

    figure = Figure(figsize=_SIZE, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.13, 0.13, 0.83, 0.72))
    # The more points, the fainter each, so that their density shows.
    alpha = float(np.clip(40 / np.sqrt(len(x)) / 2, 0.15, 0.8))
    axes.scatter(x[finite], y[finite], s=9, color=_POINT, alpha=alpha, linewidths=0)
    if finite.any() and x[finite].min() > 0 and x[finite].max() > 1e3 * x[finite].min():
        axes.set_xscale("log")
    for sign, position, marker in ((-1, 0.0, "<"), (1, 1.0, ">")):
        outside = ~finite & (np.sign(x) == sign)
        if outside.any():
            axes.scatter(
                np.full(outside.sum(), position),
                y[outside],
                s=16,
                color=_OUTSIDE,
                alpha=0.6,
                linewidths=0,
                marker=marker,
                transform=axes.get_yaxis_transform(),
                clip_on=False,
            )
    axes.set_xlabel(xlabel, color=SLATE, family=SANS, size=9)
    axes.set_ylabel(ylabel, color=SLATE, family=SANS, size=9)
    axes.grid(color="#E4E7EB", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=FAINT, labelcolor=SLATE, labelsize=7.5, length=2)
    axes.xaxis.get_offset_text().set(color=SLATE, size=7.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=FAINT, linewidth=0.8)
    figure.text(0.13, 0.93, title, color=INK, family=SANS, size=10, weight="bold", va="bottom")
    figure.text(0.13, 0.885, subtitle, color=SLATE, family=SANS, size=8, va="bottom")
    return figure
