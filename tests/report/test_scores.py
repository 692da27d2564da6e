from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from fastnas.report import plot_scores, scores_figure

TABLE = np.array([[1.0, 3.0, 0.0], [-np.inf, -2.0, -6.0]])


def test_fields_say_their_part_of_the_row() -> None:
    axes = scores_figure({"cell": TABLE}, ["a", "b", "c"], ["1", "2"]).axes[0]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    fields = [[texts[o + 0.5, e + 0.5] for o in range(3)] for e in range(2)]
    assert fields == [["25.0", "75.0", "0.0"], ["–", "-25.0", "-75.0"]]
    framed = [p.get_xy() for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]
    assert [(int(x), int(y)) for x, y in framed] == [(1, 0), (1, 1)]


def test_a_row_of_zeros_or_of_nothing() -> None:
    axes = scores_figure({"cell": np.array([[0.0, 0.0], [np.nan, np.nan]])}, ["a", "b"], ["1", "2"]).axes[0]
    assert sum(not p.get_fill() for p in axes.patches) == 1


def test_the_file_is_written(tmp_path: Path) -> None:
    path = plot_scores({"normal": TABLE, "reduce": TABLE}, ["a", "b", "c"], ["1", "2"], tmp_path / "x" / "s.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["s.png"]


@pytest.mark.parametrize("scores", [{}, {"cell": TABLE.T}])
def test_bad_shapes(scores: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="scores"):
        scores_figure(scores, ["a", "b", "c"], ["1", "2"])
