"""The scaling curves: their arithmetic on made-up numbers, and the whole of it on tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from benchmarks import scaling  # noqa: E402


def test_slope_of_a_power_law() -> None:
    xs = [1, 2, 8, 16]
    assert scaling.slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert scaling.slope(xs, [7, 7, 7, 7]) == pytest.approx(0)


def test_a_curve_changes_one_size() -> None:
    seen = []

    def measure(sizes: dict[str, int]) -> dict[str, dict[str, object]]:
        seen.append(sizes)
        one = {"seconds": [0.1 * sizes["batch"]], "median": 0.1 * sizes["batch"], "saved_bytes": sizes["batch"] ** 2}
        return dict.fromkeys(scaling.VARIANTS, one)

    found = scaling.curve("batch", (2, 4, 16), scaling.BASE, measure)
    assert seen == [{**scaling.BASE, "batch": n} for n in (2, 4, 16)]
    assert found["values"] == [2, 4, 16]
    for data in found["variants"].values():
        assert data["saved_bytes"] == [4, 16, 256]
        assert data["slope_time"] == pytest.approx(1)
        assert data["slope_saved"] == pytest.approx(2)


@pytest.mark.slow
def test_picture_and_numbers_of_tiny_sizes(tmp_path: Path) -> None:
    picture, numbers = tmp_path / "scaling.png", tmp_path / "scaling.json"
    scaling.main(["--quick", "--rounds", "1", "--out", str(picture), "--json", str(numbers)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(numbers.read_text())
    assert report["quick"]
    assert report["curves"].keys() == {"channels", "nodes", "candidates", "cells", "batch", "k"}
    for name, curve in report["curves"].items():
        assert curve["values"] == list(scaling.QUICK_CURVES[name])
        for data in curve["variants"].values():
            assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in data["seconds"])
        ours, theirs = (curve["variants"][v]["saved_bytes"] for v in scaling.VARIANTS)
        assert all(a < b for a, b in zip(ours, theirs, strict=True)), name
    assert report["curves"]["batch"]["variants"]["fastnas"]["slope_saved"] > 0.5
    panels = scaling.figure(report).axes
    assert len(panels) == 12
    assert {axes.get_xscale() for axes in panels} == {axes.get_yscale() for axes in panels} == {"log"}
