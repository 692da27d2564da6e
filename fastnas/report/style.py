"""What all pictures share: colours, fonts, and how a file is written."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fastnas._files import write_atomic

DPI = 160
INK = "#1F2933"  # text
SLATE = "#52606D"  # nodes, axes
FAINT = "#9AA5B1"  # what should stay behind
NEUTRAL = "#7B8794"  # operations that this file does not know
SANS = "DejaVu Sans"  # both come with matplotlib
MONO = "DejaVu Sans Mono"

# After Okabe and Ito, whose colours stay apart for colour-blind readers; the second is for kernels other than 3×3.
_FAMILIES = (
    ("none", "#9AA0A6", "#9AA0A6"),
    ("max_pool", "#D55E00", "#D55E00"),
    ("maxpool", "#D55E00", "#D55E00"),
    ("avg_pool", "#E69F00", "#E69F00"),
    ("skip", "#009E73", "#009E73"),
    ("identity", "#009E73", "#009E73"),
    ("sep_conv", "#0072B2", "#56B4E9"),
    ("mb", "#0072B2", "#56B4E9"),
    ("dil_conv", "#8E3B8E", "#CC79A7"),
    ("nor_conv", "#6D4C41", "#A1887F"),
    ("conv", "#6D4C41", "#A1887F"),
)


def op_color(op: str) -> str:
    """Returns the colour of an operation, by its family (`sep_conv`, `max_pool`, ...); neutral where it is unknown."""
    for family, usual, other in _FAMILIES:
        if op.startswith(family):
            return other if op.endswith(("1x1", "5x5", "7x7")) else usual
    return NEUTRAL


def tint(color: str, strength: float = 0.14) -> tuple[float, float, float]:
    """Returns `color` mixed with white, `strength` of it and white for the rest."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(color))
    return red, green, blue


def deepen(color: str) -> tuple[float, float, float]:
    """Returns `color` made dark enough for text on white."""
    red, green, blue = (0.7 * part for part in to_rgb(color))
    return red, green, blue


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Returns `path`, after writing the figure there as PNG; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, FigureCanvasAgg(figure).print_png)
    return path
