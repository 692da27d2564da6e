"""Pictures of cells and of alphas: legible, whole files, and no trace in matplotlib's global state."""

import itertools
import math
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

from fastnas.genotype import ChainGenotype, Genotype, NASBench201Genotype, OneShotGenotype
from fastnas.report import (
    alphas_figure,
    cell_figure,
    draw_cell,
    draw_genotype,
    op_color,
    plot_alphas,
    plot_scatter,
    scatter_figure,
    style,
)
from fastnas.report.alphas import _grid
from fastnas.report.cell import _chain_figure, _graph_of_nodes

OPS = ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
DARTS_V2 = Genotype(
    normal=[
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    ],
    normal_concat=[2, 3, 4, 5],
    reduce=[
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
    ],
    reduce_concat=[2, 3, 4, 5],
)


def edges_of(entries):
    return [(op, 2 + n // 2, j) for n, (op, j) in enumerate(entries)]


def random_cell(seed):
    generator = random.Random(seed)
    return [(generator.choice(OPS), i, j) for i in range(2, 6) for j in generator.sample(range(i), 2)]


CELLS = {
    "DARTS_V2 normal": edges_of(DARTS_V2.normal),
    "DARTS_V2 reduce": edges_of(DARTS_V2.reduce),
    "all from one input": [(OPS[n % 7], 2 + n // 2, 1) for n in range(8)],
    "chain": [(OPS[n % 7], 2 + n // 2, max(n // 2 + n % 2, 0)) for n in range(8)],
    "same input twice": [("skip_connect", 2, 0), ("skip_connect", 2, 0)],
    "one edge": [("none", 2, 1)],
    "long and unknown names": [("a_custom_operation_of_mine", 2, 0), ("x", 2, 1), ("sep_conv_7x7", 3, 2), ("x", 3, 0)],
    "every edge of four nodes": [(OPS[(i + j) % 7], i, j) for i in range(2, 6) for j in range(i)],
    **{f"random {seed}": random_cell(seed) for seed in range(6)},
}


def png_size(path):
    """Width and height of a PNG, after checking its chunks to the last byte."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kinds.append(raw[at + 4 : at + 8])
        (crc,) = struct.unpack(">I", raw[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(raw[at + 4 : at + 8 + length])
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    return struct.unpack(">II", raw[16:24])


def texts(figure):
    """Every text that is seen, with its extent in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Of an axis' labels, only those within its range are drawn.
    unseen = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in shown]
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    return boxes


def assert_no_overlap(boxes):
    for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
        overlap_x = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        overlap_y = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert overlap_x <= 0 or overlap_y <= 0, f"{a!r} and {b!r} overlap"


# Cells


@pytest.mark.parametrize("name", CELLS)
def test_every_operation_is_named_and_no_texts_overlap(name):
    figure = cell_figure(CELLS[name], "Some cell")
    boxes = texts(figure)
    shown = sorted(text for text, _ in boxes if not text.startswith("$"))
    states = {i for _, i, _ in CELLS[name]}
    assert shown == sorted([op for op, _, _ in CELLS[name]] + [str(i - 2) for i in states] + ["Some cell"])
    assert sum(text.startswith("$") for text, _ in boxes) == 3
    assert_no_overlap(boxes)


@pytest.mark.parametrize("name", CELLS)
def test_texts_lie_in_their_shapes_and_shapes_lie_apart(name):
    figure = cell_figure(CELLS[name])
    boxes = texts(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    shapes = [s.get_window_extent(renderer) for s in figure.axes[0].patches if isinstance(s, (Circle, FancyBboxPatch))]
    assert len(shapes) == len(boxes)
    for text, box in boxes:
        assert any(s.x0 <= box.x0 and box.x1 <= s.x1 and s.y0 <= box.y0 and box.y1 <= s.y1 for s in shapes), text
    assert_no_overlap([("shape", shape) for shape in shapes])


@pytest.mark.parametrize("name", CELLS)
def test_edges_touch_no_shape_but_their_own(name):
    """Every edge's line, sampled, meets the shapes at its two ends and the box of its label alone."""
    figure = cell_figure(CELLS[name])
    shapes = [s for s in figure.axes[0].patches if isinstance(s, (Circle, FancyBboxPatch))]
    lines = [p for p in figure.axes[0].patches if isinstance(p, PathPatch)]
    states = {i for _, i, _ in CELLS[name]}
    assert len(lines) == len(CELLS[name]) + len(states)  # one each for the concatenation
    extents = [s.get_path().transformed(s.get_patch_transform()).get_extents() for s in shapes]
    touched = []
    for line in lines:
        # Curves become lines at the resolution of the units, hence the scale.
        points = line.get_path().transformed(Affine2D().scale(100)).to_polygons(closed_only=False)[0] / 100
        dense = np.concatenate([np.linspace(a, b, 20) for a, b in itertools.pairwise(points)])
        touched.append(sum(bool(((dense >= e.min - 1e-9) & (dense <= e.max + 1e-9)).all(1).any()) for e in extents))
    # The tip of an edge stops short of its target, so that the arrow's point is sharp.
    assert all(count <= 2 for count in touched[: len(CELLS[name])]), touched
    assert all(count == 1 for count in touched[len(CELLS[name]) :]), touched


def test_colors():
    known = [op_color(op) for op in OPS] + [op_color("none")]
    assert len(set(known)) == 8
    neutral = op_color("never heard of")
    assert neutral not in known
    assert op_color("another") == neutral
    figure = cell_figure([("never heard of", 2, 0), ("sep_conv_3x3", 2, 1)])
    edges = [to_hex(p.get_edgecolor()).upper() for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert neutral in edges
    assert op_color("sep_conv_3x3") in edges


def test_draw_genotype(tmp_path):
    paths = draw_genotype(DARTS_V2, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["cell_normal.png", "cell_reduce.png"]
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())  # and no temporary file
    for path in paths:
        width, height = png_size(path)
        assert 600 < width < 3000
        assert 200 < height < 1500
    as_mapping = {name: list(value) for name, value in DARTS_V2._asdict().items()}
    as_mapping["normal"] = [list(entry) for entry in DARTS_V2.normal]
    again = draw_genotype(as_mapping, tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_draw_cell_options(tmp_path):
    path = draw_cell(
        [("nor_conv_3x3", 1, 0), ("skip_connect", 2, 1), ("none", 2, 0)],
        tmp_path / "cell.png",
        inputs=["x"],
        output="y",
        concat=[2],
    )
    assert path == tmp_path / "cell.png"
    assert min(png_size(path)) > 100
    named = {text for text, _ in texts(cell_figure([("a", 1, 0)], inputs=["x"], output="y"))}
    assert named == {"$x$", "$y$", "0", "a"}
    without = cell_figure([("a", 2, 0)], concat=[])
    assert len(texts(without)) == 4


def test_cell_errors(tmp_path):
    with pytest.raises(ValueError, match="edges is empty"):
        draw_cell([], tmp_path / "x.png")
    for edge in [("a", 2, 2), ("a", 2, -1), ("a", 1, 0), ("a", 2, 3)]:
        with pytest.raises(ValueError, match=r"an edge goes from state j to state i"):
            draw_cell([edge], tmp_path / "x.png")
    with pytest.raises(ValueError, match="concat has the state 7"):
        draw_cell([("a", 2, 0)], tmp_path / "x.png", concat=[7])
    with pytest.raises(ValueError, match=r"genotype has no reduce, reduce_concat"):
        draw_genotype({"normal": DARTS_V2.normal, "normal_concat": [2]}, tmp_path)
    with pytest.raises(ValueError, match="normal"):
        draw_genotype(DARTS_V2._replace(normal=[("skip_connect", 9), ("skip_connect", 0)]), tmp_path)
    assert not list(tmp_path.iterdir())


# Alphas

PRIMITIVES = ["none", *OPS]
DARTS_EDGES = [(i, j) for i in range(2, 6) for j in range(i)]


def history(steps, edges, ops, seed=0):
    logits = np.random.default_rng(seed).normal(0, 0.2, (steps, edges, ops)).cumsum(0)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("steps", [1, 2, 6, 51, 10_001])
def test_no_texts_overlap_in_alphas(steps):
    cells = {"Normal cell": history(steps, 14, 8), "Reduction cell": history(steps, 14, 8, 1)}
    figure = alphas_figure(cells, PRIMITIVES, DARTS_EDGES)
    boxes = texts(figure)
    assert_no_overlap(boxes)
    shown = [text for text, _ in boxes]
    assert {"Normal cell", "Reduction cell", "epoch", "weight", *PRIMITIVES} <= set(shown)
    assert len(figure.axes) == 28


def test_panels_hold_the_values_and_name_the_leader():
    values = history(7, 14, 8)
    values[-1, 3, 5] = 2.0
    figure = alphas_figure(values, PRIMITIVES, DARTS_EDGES, xlabel="step", ylabel="share")
    assert len(figure.axes) == 14
    for e, axes in enumerate(figure.axes):
        assert np.array_equal([line.get_ydata() for line in axes.lines], values[:, e].T)
        assert [line.get_color() for line in axes.lines] == [op_color(op) for op in PRIMITIVES]
        assert axes.get_title("right") == PRIMITIVES[values[-1, e].argmax()]
    assert figure.axes[3].get_title("right") == PRIMITIVES[5]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1  # panels can be compared
    low, high = figure.axes[0].get_ylim()
    assert low < values.min()
    assert values.max() < high
    assert [text.get_text() for text in figure.legends[0].get_texts()] == PRIMITIVES


def test_unknown_primitives_stay_apart_by_line_style():
    names = ["mine", "yours", "theirs", "a_name_that_is_longer_than_the_panel_is_wide"]
    figure = alphas_figure(history(5, 3, 4), names, [(1, 0), (2, 0), (2, 1)], inputs=["x"])
    styles = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in figure.axes[0].lines}
    assert len(styles) == 4
    assert_no_overlap(texts(figure))


def test_values_that_are_not_finite():
    values = history(5, 1, 3)
    values[2:, 0, 1] = np.nan
    values[3, 0, 2] = np.inf
    figure = alphas_figure(values, OPS[:3], [(2, 0)])
    assert_no_overlap(texts(figure))
    assert figure.axes[0].get_title("right") in (OPS[0], OPS[2])
    texts(alphas_figure(np.full((2, 1, 3), np.nan), OPS[:3], [(2, 0)]))
    texts(alphas_figure(np.zeros((2, 1, 3)), OPS[:3], [(2, 0)]))


def test_plot_alphas(tmp_path):
    import torch

    path = plot_alphas(torch.from_numpy(history(4, 14, 8)), PRIMITIVES, DARTS_EDGES, tmp_path / "a" / "alphas.png")
    width, height = png_size(path)
    assert 800 < width < 3000
    assert 500 < height < 3000
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("values", "edges", "message"),
    [
        (np.zeros((3, 14)), DARTS_EDGES, r"history must be \(T, 14, 8\)"),
        (np.zeros((0, 14, 8)), DARTS_EDGES, r"not \(0, 14, 8\)"),
        ({"normal": np.zeros((3, 14, 7))}, DARTS_EDGES, r"history of 'normal' must be"),
        ({}, DARTS_EDGES, "history is empty"),
        (np.zeros((3, 2, 8)), [(2, 0), (2, 0)], "different pairs"),
        (np.zeros((3, 1, 8)), [(0, 2)], "0 <= j < i"),
        (np.zeros((3, 0, 8)), [], "must not be empty"),
    ],
)
def test_alphas_errors(tmp_path, values, edges, message):
    with pytest.raises(ValueError, match=message):
        plot_alphas(values, PRIMITIVES, edges, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


# Files and global state


def test_a_failed_picture_leaves_the_old_file(tmp_path, monkeypatch):
    path = draw_cell(CELLS["one edge"], tmp_path / "cell.png")
    before = path.read_bytes()

    def fail(self, file):
        file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(style.FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_cell(CELLS["chain"], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_whole(tmp_path, monkeypatch):
    """The picture is complete under another name in the same folder before it gets its own."""
    moves = []
    replace = style.os.replace

    def record(source, target):
        png_size(Path(source))
        moves.append((Path(source).parent, Path(target)))
        replace(source, target)

    monkeypatch.setattr(style.os, "replace", record)
    path = draw_cell(CELLS["one edge"], tmp_path / "cell.png")
    assert moves == [(tmp_path, path)]


def test_pyplot_stays_out():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from fastnas.report import cell_figure\n"
        "cell_figure([('a', 2, 0)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict.__eq__(matplotlib.rcParams.copy(), before)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_figures_are_plain():
    assert isinstance(cell_figure(CELLS["one edge"]), Figure)


# Scatter


def test_scatter_has_every_pair():
    scores = [1.0, 2.0, -math.inf, math.nan, 3.0, math.inf, 4.0]
    values = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, math.nan]
    figure = scatter_figure(
        scores, values, xlabel="naswot", ylabel="accuracy", title="Spearman 0.7", subtitle="7 cells"
    )
    inside, low, high = figure.axes[0].collections
    assert np.array_equal(inside.get_offsets(), [[1, 10], [2, 20], [3, 50]])
    assert np.array_equal(low.get_offsets(), [[0, 30]])  # at the left edge, in parts of the width
    assert np.array_equal(high.get_offsets(), [[1, 60]])
    assert figure.axes[0].get_xscale() == "linear"
    boxes = texts(figure)
    assert_no_overlap(boxes)
    assert {"naswot", "accuracy", "Spearman 0.7", "7 cells"} <= {text for text, _ in boxes}


def test_scores_over_many_decades_are_logarithmic(tmp_path):
    figure = scatter_figure([1e-3, 1.0, 1e40], [1.0, 2.0, 3.0])
    assert figure.axes[0].get_xscale() == "log"
    assert_no_overlap(texts(figure))
    assert scatter_figure([-1.0, 1.0, 1e40], [1.0, 2.0, 3.0]).axes[0].get_xscale() == "linear"
    path = plot_scatter(np.arange(20_000) / 7, np.arange(20_000) % 13, tmp_path / "new" / "scatter.png")
    width, height = png_size(path)
    assert 500 < width < 2000
    assert 400 < height < 1500
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("scores", "values", "message"),
    [
        ([1, 2], [1], r"got \(2,\) and \(1,\)"),
        ([[1.0]], [[1.0]], "one an architecture"),
        ([math.nan], [1.0], "no pair"),
    ],
)
def test_scatter_errors(scores, values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_scatter(scores, values, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "genotype",
    [
        NASBench201Genotype(("none",) * 6),
        NASBench201Genotype(("nor_conv_3x3", "skip_connect", "none", "avg_pool_3x3", "nor_conv_1x1", "none")),
        OneShotGenotype((), ((0,),)),
        OneShotGenotype(("conv3x3-bn-relu", "maxpool3x3", "conv1x1-bn-relu"), ((0,), (0, 1), (1,), (0, 2))),
        ChainGenotype.from_text("01"),
    ],
)
def test_cells_of_other_spaces(genotype, tmp_path):
    (path,) = draw_genotype(genotype, tmp_path)
    assert path == tmp_path / "cell.png"
    width, height = png_size(path)
    assert width > height > 0


def test_operations_on_nodes_are_labels():
    genotype = OneShotGenotype(("conv3x3-bn-relu", "maxpool3x3", "conv1x1-bn-relu"), ((0,), (0, 1), (1,), (0, 2)))
    items, edges = _graph_of_nodes(genotype)
    assert [item.text for item in items if not item.through] == ["$c_{k{-}1}$", *genotype.ops, "$c_{k}$"]
    ends = [(edge.chain[0].text, edge.chain[-1].text) for edge in edges]
    names = ["$c_{k{-}1}$", *genotype.ops, "$c_{k}$"]
    assert ends == [(names[j], names[i]) for i, nodes in enumerate(genotype.inputs, start=1) for j in nodes]
    for edge in edges:  # every link joins neighbouring columns
        columns = [item.column for item in edge.chain]
        assert columns == list(range(columns[0], columns[-1] + 1))
    # the loose end is left of the output
    assert items[3].column < items[4].column


@pytest.mark.parametrize("layers", [1, 4, 5, 8, 21])
def test_a_chain_is_drawn_in_lines(layers):
    names = [f"mbconv6_{3 + n % 3}x{3 + n % 3}" for n in range(layers)]
    figure = _chain_figure(ChainGenotype(tuple(names)), "Chain")
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    texts = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert texts == ["Chain", "input", *names, "output"]
    places = [(box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2) for box in boxes]
    assert len(places) == layers + 2
    width, height = figure.get_size_inches()
    for (x, y), box in zip(places, boxes, strict=True):
        assert box.get_width() / 2 < x < width - box.get_width() / 2
        assert box.get_height() / 2 < y < height - box.get_height() / 2
    for (x0, y0), (x1, y1) in itertools.pairwise(places):  # side by side, or one below the other
        assert (x0 == pytest.approx(x1)) != (y0 == pytest.approx(y1))
        assert y1 <= y0 + 1e-9
    assert len({(round(x, 3), round(y, 3)) for x, y in places}) == layers + 2


def test_panels_of_a_chain_follow_one_another():
    edges = [(n + 1, n) for n in range(9)]
    assert _grid(edges) == [(n // 4, n % 4) for n in range(9)]
    assert _grid([(1, 0), (2, 0), (2, 1)]) == [(0, 0), (1, 0), (1, 1)]
    figure = alphas_figure(np.zeros((2, 9, 2)), ["mb3_3x3", "skip_connect"], edges)
    assert len(figure.axes) == 9
    assert figure.get_size_inches()[0] < 10
