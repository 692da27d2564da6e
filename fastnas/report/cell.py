"""Pictures of cells: the states as nodes, the operations between them as labelled edges. Needs no graphviz.

A chain of blocks is drawn as one, in lines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Patch, PathPatch, Polygon
from matplotlib.path import Path

from fastnas.genotype import AnyGenotype, ChainGenotype, Genotype, NASBench201Genotype, OneShotGenotype

from .layout import Box, link, place
from .style import DPI, FAINT, INK, MONO, SANS, SLATE, op_color, save, tint

INPUTS = ("c_{k{-}2}", "c_{k{-}1}")
OUTPUT = "c_{k}"

# Inches; font sizes in points.
_MARGIN = 0.25
_TITLE = 0.36
_GAP = 0.14  # between two boxes of a column
_BEND = 0.62  # between two columns: the room in which edges change height
_NODE = 0.42  # an intermediate node, and the height of all others
_END_WIDTH = 0.62  # inputs and output
_LABEL_HEIGHT = 0.29
_LABEL_SIZE = 9.0
_LABEL_PADDING = 0.11
_CHARACTER = 0.602 * _LABEL_SIZE / 72  # advance of DejaVu Sans Mono
_PORT = 0.11  # between two edges at one node
_ARROW = 0.085
_LINE = 6  # boxes in a line of a chain
_BETWEEN = (0.34, 0.36)  # two boxes of a line, and two lines


@dataclass(eq=False)
class _Item(Box):
    """A box with its looks."""

    text: str = ""
    width: float = 0.0
    color: str = SLATE

    @property
    def label(self) -> bool:
        return self.height == _LABEL_HEIGHT

    @property
    def round(self) -> bool:
        return self.width == self.height


@dataclass
class _Edge:
    chain: list[_Item]
    color: str
    line: float


def draw_genotype(genotype: AnyGenotype | Mapping[str, Any], directory: str | os.PathLike[str]) -> tuple[FilePath, ...]:
    """Returns the paths of the pictures drawn in `directory`: `cell_normal.png` and `cell_reduce.png`, or `cell.png`.

    Args:
        genotype: a genotype, or the mapping of the four fields of `Genotype` that a JSON file holds.
        directory: made where it is missing.

    Raises:
        ValueError: the genotype describes no architecture; the message names the field.
    """
    if isinstance(genotype, NASBench201Genotype):
        edges = [(op, i, j) for op, (i, j) in zip(genotype.ops, genotype.edges, strict=True)]
        last = genotype.nodes - 1
        return (draw_cell(edges, FilePath(directory) / "cell.png", "Cell", concat=[last], inputs=INPUTS[1:]),)
    if isinstance(genotype, OneShotGenotype):
        items, drawn = _graph_of_nodes(genotype)
        return (save(_figure(items, drawn, "Cell"), FilePath(directory) / "cell.png"),)
    if isinstance(genotype, ChainGenotype):
        return (save(_chain_figure(genotype, "Chain"), FilePath(directory) / "cell.png"),)
    if isinstance(genotype, Mapping):
        missing = [name for name in Genotype._fields if name not in genotype]
        if missing:
            raise ValueError(f"genotype has no {', '.join(missing)}; it needs {', '.join(Genotype._fields)}")
        genotype = Genotype(*(genotype[name] for name in Genotype._fields))
    genotype = genotype.validate()
    paths = []
    for name, title, entries, concat in (
        ("normal", "Normal cell", genotype.normal, genotype.normal_concat),
        ("reduce", "Reduction cell", genotype.reduce, genotype.reduce_concat),
    ):
        edges = [(op, 2 + n // 2, j) for n, (op, j) in enumerate(entries)]
        paths.append(draw_cell(edges, FilePath(directory) / f"cell_{name}.png", title, concat=concat))
    return tuple(paths)


def draw_cell(
    edges: Sequence[tuple[str, int, int]],
    path: str | os.PathLike[str],
    title: str = "",
    *,
    concat: Sequence[int] | None = None,
    inputs: Sequence[str] = INPUTS,
    output: str = OUTPUT,
) -> FilePath:
    """Returns `path`, where the cell was drawn as PNG.

    Args:
        edges: `(op, i, j)`: the operation from state j to state i, j < i. The first states are the inputs.
        path: of the picture; it is written whole or not at all.
        title: above the picture.
        concat: the states that make the output; all but the inputs where None.
        inputs: names of the inputs, in TeX's mathematics.
        output: name of the output, likewise.

    Raises:
        ValueError: no edges, or an edge from or to a state that cannot be.
    """
    return save(cell_figure(edges, title, concat=concat, inputs=inputs, output=output), path)


def cell_figure(
    edges: Sequence[tuple[str, int, int]],
    title: str = "",
    *,
    concat: Sequence[int] | None = None,
    inputs: Sequence[str] = INPUTS,
    output: str = OUTPUT,
) -> Figure:
    """Returns the picture that `draw_cell` writes, with the same arguments."""
    states = _states(edges, len(inputs), concat)
    concat = range(len(inputs), states) if concat is None else concat
    return _figure(*_graph(edges, states, concat, inputs, output), title)


def _figure(items: list[_Item], drawn: list[_Edge], title: str) -> Figure:
    place(items, _GAP)

    columns = 1 + max(item.column for item in items)
    widths = [max(item.width for item in items if item.column == c) for c in range(columns)]
    left = [_MARGIN + sum(widths[:c]) + c * _BEND for c in range(columns)]
    spans = [(x, x + width) for x, width in zip(left, widths, strict=True)]
    top = max(item.y + item.height / 2 for item in items)
    width = spans[-1][1] + _MARGIN
    height = 2 * top + 2 * _MARGIN + (_TITLE if title else 0)

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(-top - _MARGIN, height - top - _MARGIN))
    if title:
        axes.text(_MARGIN, top + _TITLE, title, color=INK, family=SANS, size=13, weight="bold", va="center")
    for edge, start, end in _ports(drawn):
        _draw_edge(axes, edge, start, end, spans)
    for item in items:
        if not item.through:
            _draw_item(axes, item, sum(spans[item.column]) / 2)
    return figure


def _states(edges: Sequence[tuple[str, int, int]], inputs: int, concat: Sequence[int] | None) -> int:
    """Returns the number of states, inputs included, after checking the edges."""
    if not edges:
        raise ValueError("edges is empty; a cell needs at least one (op, i, j)")
    states = 1 + max(i for _, i, _ in edges)
    for op, i, j in edges:
        if not 0 <= j < i or i < inputs:
            raise ValueError(
                f"edges has ({op!r}, {i}, {j}); an edge goes from state j to state i, 0 <= j < i, and i is no input "
                f"(states 0 to {inputs - 1} are)"
            )
    for i in concat or ():
        if not 0 <= i < states:
            raise ValueError(f"concat has the state {i}; the states of these edges are 0 to {states - 1}")
    return states


def _graph(
    edges: Sequence[tuple[str, int, int]], states: int, concat: Sequence[int], inputs: Sequence[str], output: str
) -> tuple[list[_Item], list[_Edge]]:
    """Returns the boxes, each in its column and linked, and the edges as chains of them.

    States are in the even columns, by the longest way from an input; the labels of the edges to a state are in the odd
    column before it.
    """
    column = [0] * states
    for i in range(len(inputs), states):
        column[i] = 2 + max((column[j] for _, target, j in edges if target == i), default=0)
    last = 1 + max(column)

    items = [_Item(0, _NODE, text=f"${name}$", width=_END_WIDTH) for name in inputs]
    items += [_Item(column[i], _NODE, text=str(i - len(inputs)), width=_NODE) for i in range(len(inputs), states)]
    nodes = list(items)
    if concat:
        nodes.append(_Item(last, _NODE, text=f"${output}$", width=_END_WIDTH))
        items.append(nodes[-1])

    drawn = []
    for op, i, j in edges:
        color = op_color(op)
        label = _Item(column[i] - 1, _LABEL_HEIGHT, text=op, width=_label_width(op), color=color)
        passed = [_Item(c, 0.0, through=True) for c in range(column[j] + 1, column[i] - 1)]
        drawn.append(_Edge([nodes[j], *passed, label, nodes[i]], color, 1.6))
        items += [*passed, label]
    for i in concat:
        passed = [_Item(c, 0.0, through=True) for c in range(column[i] + 1, last)]
        drawn.append(_Edge([nodes[i], *passed, nodes[-1]], FAINT, 1.1))
        items += passed
    for edge in drawn:
        link(edge.chain)
    return items, drawn


def _graph_of_nodes(genotype: OneShotGenotype) -> tuple[list[_Item], list[_Edge]]:
    """Returns boxes and edges of a cell whose operations lie on its nodes; each is a label, right of all it reads."""
    column = [0]
    for read in genotype.inputs:
        column.append(1 + max(column[j] for j in read))
    column[-1] = max(column[-1], 1 + max(column[:-1]))
    nodes = [_Item(0, _NODE, text=f"${INPUTS[-1]}$", width=_END_WIDTH)]
    for op, c in zip(genotype.ops, column[1:-1], strict=True):
        nodes.append(_Item(c, _LABEL_HEIGHT, text=op, width=_label_width(op), color=op_color(op)))
    nodes.append(_Item(column[-1], _NODE, text=f"${OUTPUT}$", width=_END_WIDTH))
    items, drawn = list(nodes), []
    for node, read in zip(nodes[1:], genotype.inputs, strict=True):
        for j in read:
            passed = [_Item(c, 0.0, through=True) for c in range(nodes[j].column + 1, node.column)]
            drawn.append(_Edge([nodes[j], *passed, node], node.color, 1.6))
            items += passed
    for edge in drawn:
        link(edge.chain)
    return items, drawn


def _chain_figure(genotype: ChainGenotype, title: str) -> Figure:
    """Returns the picture of a chain: boxes in lines, of which every other one runs from right to left."""
    labels = [_Item(0, _LABEL_HEIGHT, text=op, width=_label_width(op), color=op_color(op)) for op in genotype.ops]
    ends = [_Item(0, _NODE, text=name, width=_END_WIDTH) for name in ("input", "output")]
    items = [ends[0], *labels, ends[1]]
    step = (max(item.width for item in items) + _BETWEEN[0], _NODE + _BETWEEN[1])
    lines = math.ceil(len(items) / _LINE)
    width = min(len(items), _LINE) * step[0] - _BETWEEN[0] + 2 * _MARGIN
    height = lines * step[1] - _BETWEEN[1] + 2 * _MARGIN + _TITLE

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.text(
        _MARGIN, height - _MARGIN - _TITLE / 4, title, color=INK, family=SANS, size=13, weight="bold", va="center"
    )
    places = []
    for n, item in enumerate(items):
        line, column = divmod(n, _LINE)
        column = _LINE - 1 - column if line % 2 else column
        item.y = height - _TITLE - _MARGIN - _NODE / 2 - line * step[1]
        places.append(_MARGIN + (step[0] - _BETWEEN[0]) / 2 + column * step[0])
        _draw_item(axes, item, places[-1])
    for (before, x0), (item, x1) in pairwise(zip(items, places, strict=True)):
        if item.y == before.y:
            side = math.copysign(1, x1 - x0)
            tail, tip = (x0 + side * before.width / 2, item.y), (x1 - side * item.width / 2, item.y)
        else:
            tail, tip = (x0, before.y - before.height / 2), (x1, item.y + item.height / 2)
        axes.annotate(
            "", tip, tail, arrowprops={"arrowstyle": "-|>", "color": item.color, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        )
    return figure


def _label_width(op: str) -> float:
    return len(op) * _CHARACTER + 2 * _LABEL_PADDING


def _ports(edges: list[_Edge]) -> list[tuple[_Edge, float, float]]:
    """Returns every edge with the heights at which it leaves its first box and meets its last one, side by side."""
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for at, towards, ports in ((0, 1, starts), (-1, -2, ends)):
        groups: dict[_Item, list[int]] = {}
        for e, edge in enumerate(edges):
            groups.setdefault(edge.chain[at], []).append(e)
        for node, group in groups.items():
            group.sort(key=lambda e: edges[e].chain[towards].y)
            step = min(_PORT, 0.7 * node.height / len(group))
            for n, e in enumerate(group):
                ports[e] = node.y + (n - (len(group) - 1) / 2) * step
    return [(edge, starts[e], ends[e]) for e, edge in enumerate(edges)]


def _draw_edge(axes: Axes, edge: _Edge, start: float, end: float, spans: list[tuple[float, float]]) -> None:
    """Draws an edge: level across a column, where the boxes are, and bent between two."""
    heights = [start, *(item.y for item in edge.chain[1:-1]), end]
    first, last = edge.chain[0], edge.chain[-1]
    vertices = [(sum(spans[first.column]) / 2, start)]  # the node itself is drawn over the first piece
    codes = [Path.MOVETO]
    reach = math.sqrt(_NODE**2 / 4 - (end - last.y) ** 2) if last.round else last.width / 2
    tip = sum(spans[last.column]) / 2 - reach
    for (item, y), (following, target) in pairwise(zip(edge.chain, heights, strict=True)):
        x0 = spans[item.column][1]
        x1 = spans[following.column][0] - (_ARROW if following is last else 0)
        middle = (x0 + x1) / 2
        vertices += [(x0, y), (middle, y), (middle, target), (x1, target)]
        codes += [Path.LINETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    vertices.append((tip - _ARROW, end))
    codes.append(Path.LINETO)
    axes.add_patch(
        PathPatch(Path(vertices, codes), facecolor="none", edgecolor=edge.color, linewidth=edge.line, zorder=1)
    )
    head = [(tip, end), (tip - 1.5 * _ARROW, end + 0.5 * _ARROW), (tip - 1.5 * _ARROW, end - 0.5 * _ARROW)]
    axes.add_patch(Polygon(head, closed=True, facecolor=edge.color, edgecolor="none", zorder=1.5))


def _draw_item(axes: Axes, item: _Item, x: float) -> None:
    """Draws a node or a label."""
    end = not (item.label or item.round)
    shape: Patch
    if item.round:
        shape = Circle((x, item.y), item.height / 2)
    else:
        corner = (x - item.width / 2, item.y - item.height / 2)
        shape = FancyBboxPatch(corner, item.width, item.height, boxstyle="round,pad=0,rounding_size=0.09")
    shape.set(facecolor=item.color if end else tint(item.color), edgecolor=item.color, linewidth=1.2, zorder=2)
    axes.add_patch(shape)
    axes.text(
        x,
        item.y,
        item.text,
        color="white" if end else INK,
        family=MONO if item.label else SANS,
        size=_LABEL_SIZE if item.label else 11,
        ha="center",
        va="center" if end else "center_baseline",
        zorder=3,
    )
