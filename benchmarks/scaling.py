"""How time and memory of a supernet grow with its sizes: ``python -m benchmarks.scaling``.

One DARTS supernet, and one size at a time that is changed. Measured by the rules of ``benchmarks/measure.py``: fastnas
and plain PyTorch in channels_last memory in turn, both compared with plain PyTorch in float64 first.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import fastnas
from benchmarks import plain
from benchmarks.facts import facts, folder, machine, write
from benchmarks.measure import MIB, Variant, check, errors, in_turn, saved_bytes
from benchmarks.supernets import SPACES, loss_on_a_batch
from fastnas.report.style import DPI, FAINT, INK, SANS, SLATE, save

VARIANTS = {"fastnas": "#0072B2", "eager channels_last": "#D55E00"}
LABELS = {"fastnas": "fastnas", "eager channels_last": "plain PyTorch, channels_last"}

BASE = {"channels": 16, "nodes": 4, "candidates": 0, "cells": 4, "batch": 4, "k": 1, "size": 32}
"""A supernet; with 0 candidates its edges have the eight of DARTS, otherwise so many times ``sep_conv_3x3``."""
CURVES: dict[str, tuple[int, ...]] = {
    "channels": (8, 16, 32, 64),
    "nodes": (2, 3, 4, 6),
    "candidates": (1, 2, 4, 8),
    "cells": (3, 4, 6, 8, 12),
    "batch": (2, 4, 8, 16),
    "k": (1, 2, 4, 8),
}
QUICK_BASE = {**BASE, "channels": 4, "nodes": 1, "cells": 3, "batch": 4, "size": 16}
QUICK_CURVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(CURVES, (1, 2)),
    "channels": (4, 8),
    "cells": (3, 4),
    "batch": (2, 4),
}
TITLES = {"nodes": "nodes a cell", "candidates": "candidates (sep_conv_3x3)", "k": "k (partial channels)"}


def build(name: str, dtype: torch.dtype, device: str, sizes: Mapping[str, int]) -> Variant:
    """Returns one variant of the supernet of these sizes."""
    nodes, candidates = sizes["nodes"], sizes["candidates"]
    primitives = ("sep_conv_3x3",) * candidates or plain.PRIMITIVES
    options = {"steps": nodes, "primitives": primitives, "k": sizes["k"]}
    shape = nodes * (nodes + 3) // 2, len(primitives)
    return loss_on_a_batch(
        dataclasses.replace(SPACES["DARTS"], alphas={"normal": shape, "reduce": shape}),
        *(name, dtype, device),
        **{key: sizes[key] for key in ("batch", "channels", "cells", "size")},
        ours={**options, "multiplier": nodes},
        theirs=options,
    )


def point(sizes: Mapping[str, int], device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns seconds and saved bytes of each variant at these sizes."""
    truth = build("eager", torch.float64, device, sizes).outcome()
    variants = {name: build(name, torch.float32, device, sizes) for name in VARIANTS}
    for name, v in variants.items():
        check(f"{name} at {dict(sizes)}", errors(v.outcome(), truth), (1e-3, 1e-1))
    del truth
    saved = {name: saved_bytes(v.forward, v.parameters.values()) for name, v in variants.items()}
    times = in_turn([v.step for v in variants.values()], rounds, 1, device)
    fastnas.release_memory()  # the next point has maps of other sizes
    return {
        name: {"seconds": seconds, "median": statistics.median(seconds), "saved_bytes": saved[name]}
        for name, seconds in zip(variants, times, strict=True)
    }


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the exponent p of the power law y = a x^p that fits best, by least squares of the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def curve(
    name: str, values: Sequence[int], base: Mapping[str, int], measure: Callable[[dict[str, int]], dict[str, Any]]
) -> dict[str, Any]:
    """Returns what ``measure`` gives at ``base`` with size ``name`` at each of ``values``, and the slopes."""
    points = [measure({**base, name: value}) for value in values]
    variants = {}
    for v in VARIANTS:
        found = {key: [p[v][key] for p in points] for key in ("seconds", "median", "saved_bytes")}
        variants[v] = {
            **found,
            "slope_time": slope(values, found["median"]),
            "slope_saved": slope(values, found["saved_bytes"]),
        }
    return {"values": list(values), "variants": variants}


def figure(report: Mapping[str, Any]) -> Figure:
    """Returns small multiples: time above, saved bytes below, one column a curve."""
    curves = report["curves"]
    picture = Figure(figsize=(2.35 * len(curves) + 0.6, 5.6), dpi=DPI, facecolor="white")
    grid = picture.subplots(2, len(curves), sharex="col", sharey="row", squeeze=False)
    rows = ("median", "slope_time", 1e3), ("saved_bytes", "slope_saved", 1 / MIB)
    for column, (name, data) in enumerate(curves.items()):
        for axes, (quantity, exponent, unit) in zip(grid[:, column], rows, strict=True):
            for variant, color in VARIANTS.items():
                found = data["variants"][variant]
                ys = [y * unit for y in found[quantity]]
                axes.plot(data["values"], ys, color=color, marker="o", markersize=3.5, linewidth=1.6)
            _dress(axes, data["values"], [data["variants"][v][exponent] for v in VARIANTS])
        grid[0, column].set_title(TITLES.get(name, name), color=INK, family=SANS, size=9, weight="bold")
        base = report["base"][name]
        if base in data["values"]:
            for axes in grid[:, column]:
                axes.axvline(base, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
    for axes, text in zip(grid[:, 0], ("forward + backward, ms", "saved for backward, MiB"), strict=True):
        axes.set_ylabel(text, color=SLATE, family=SANS, size=9)
    lines = grid[0, 0].get_lines()[: len(VARIANTS)]
    picture.legend(
        *(lines, [LABELS[v] for v in VARIANTS]),
        **{"loc": "upper left", "bbox_to_anchor": (0.04, 1.0), "ncols": 2, "frameon": False, "labelcolor": INK},
    )
    base, info = report["base"], report["machine_info"]
    where = info["gpus"][0] if report["device"] == "cuda" else f"{info['processor']}, threads: {info['threads']}"
    text = (
        f"DARTS supernet; dotted: C {base['channels']}, {base['nodes']} nodes, {base['cells']} cells, "
        f"batch {base['batch']}, {base['size']}x{base['size']}, 8 candidates, k = 1 · {where} · torch {info['torch']}"
    )
    picture.text(0.99, 0.012, text, color=SLATE, family=SANS, size=7.5, ha="right")
    picture.tight_layout(rect=(0, 0.03, 1, 0.94))
    return picture


def _dress(axes: Axes, values: Sequence[int], slopes: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.12)
    axes.set_xticks(values, [str(v) for v in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(colors=SLATE, labelsize=8)
    axes.grid(True, color=FAINT, alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    right = slopes[-1] < 0  # where the lines leave room above them
    for line, (color, exponent) in enumerate(zip(VARIANTS.values(), slopes, strict=True)):
        axes.text(
            *(0.97 if right else 0.04, 0.97 - 0.1 * line, rf"$\propto x^{{{exponent:.2f}}}$"),
            **{"color": color, "size": 9, "ha": "right" if right else "left", "va": "top"},
            transform=axes.transAxes,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all curves, writes the numbers after each and the picture at the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs", "images", "scaling.png"), help="the picture")
    parser.add_argument("--json", type=Path, default=folder() / f"scaling-{machine()}.json", help="the numbers")
    parser.add_argument("--rounds", type=int, default=3, help="of every point (default: 3)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check, and numbers of no worth")
    options = parser.parse_args(arguments)
    base, curves = (QUICK_BASE, QUICK_CURVES) if options.quick else (BASE, CURVES)
    report: dict[str, Any] = {"machine_info": facts(), "device": options.device, "quick": options.quick}
    report |= {"base": base, "curves": {}}
    for name, values in curves.items():
        start = time.perf_counter()
        found = curve(name, values, base, lambda sizes: point(sizes, options.device, options.rounds))
        report["curves"][name] = found
        write(options.json, report)
        slopes = {v: f"{r['slope_time']:.2f}, saved {r['slope_saved']:.2f}" for v, r in found["variants"].items()}
        print(f"{name} in {time.perf_counter() - start:.0f} s: slopes of time {slopes}", flush=True)
    print(save(figure(report), options.out))


if __name__ == "__main__":
    sys.exit(main())
