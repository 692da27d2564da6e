"""What architectures are made of, from the best to the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from .style import DPI, FAINT, INK, SANS, SLATE, op_color

Shares = npt.NDArray[np.float64]


def operators_figure(
    panels: Mapping[str, Shares], rows: Sequence[str], primitives: Sequence[str], *, width: float = 4.2
) -> Figure:
    """Returns a picture of bars, a panel a ranking and a bar a row, each divided by the operators' shares.

    Args:
        panels: title -> (R, O) shares, whose rows sum to 1.
        rows: R names.
        primitives: O names.
        width: of a panel, inches.
    """
    height = 0.24 * len(rows) + 0.95
    figure = Figure(figsize=(width * len(panels) * 0.8 + 0.8, height), dpi=DPI, facecolor="white")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    at = np.arange(len(rows))
    for panel, (title, shares) in zip(axes, panels.items(), strict=True):
        left = np.zeros(len(rows))
        for o, name in enumerate(primitives):
            panel.barh(at, shares[:, o], 0.82, left, color=op_color(name), label=name, edgecolor="white", linewidth=0.4)
            left = left + shares[:, o]
        panel.set_xlim(0, 1)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_yticks(at, rows)
        panel.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        panel.set_title(title, color=INK, family=SANS, size=9, loc="left", pad=4)
        panel.tick_params(color=FAINT, labelcolor=SLATE, labelsize=7.5, length=2)
        for spine in panel.spines.values():
            spine.set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=min(len(primitives), 5),
        frameon=False,
        fontsize=7.5,
        labelcolor=INK,
        handlelength=1,
        columnspacing=1.2,
    )
    legend = 0.2 * -(-len(primitives) // 5)
    figure.subplots_adjust(
        left=0.75 / figure.get_figwidth(),
        right=0.96,
        top=1 - 0.28 / height,
        bottom=(0.3 + legend) / height,
        wspace=0.12,
    )
    return figure
