"""The placing of boxes in columns."""

import itertools
import random

import pytest

from fastnas.report.layout import Box, link, place


def random_graph(seed):
    """Boxes in five columns, the links between them, and links that pass through columns."""
    generator = random.Random(seed)
    boxes = [
        Box(column, generator.choice([0.2, 0.4, 0.6])) for column in range(5) for _ in range(generator.randint(1, 5))
    ]
    for _ in range(12):
        a, b = generator.sample(boxes, 2)
        if a.column > b.column:
            a, b = b, a
        if a.column < b.column:
            passed = [Box(column, 0.0, through=True) for column in range(a.column + 1, b.column)]
            link([a, *passed, b])
            boxes += passed
    return boxes


@pytest.mark.parametrize("seed", range(10))
def test_boxes_of_a_column_keep_their_distance(seed):
    boxes = random_graph(seed)
    place(boxes, 0.1)
    for a, b in itertools.combinations(boxes, 2):
        if a.column == b.column:
            assert abs(a.y - b.y) >= (a.height + b.height) / 2 + 0.1 - 1e-9
    low, high = min(b.y - b.height / 2 for b in boxes), max(b.y + b.height / 2 for b in boxes)
    assert low == pytest.approx(-high)
    first = [box for box in boxes if box.column == 0]
    assert first[0].y >= first[-1].y


@pytest.mark.parametrize("seed", range(3))
def test_same_graph_same_places(seed):
    places = []
    for _ in range(2):
        boxes = random_graph(seed)
        place(boxes, 0.1)
        places.append([box.y for box in boxes])
    assert places[0] == places[1]


def test_crossings_are_undone():
    """Two columns of six, linked in some order: the second is put in the order that needs no crossing."""
    left = [Box(0, 0.2) for _ in range(6)]
    right = [Box(1, 0.2) for _ in range(6)]
    for a, b in zip(left, [3, 0, 5, 1, 4, 2], strict=True):
        link([a, right[b]])
    place(left + right, 0.1)
    ends = [(box.y, box.after[0].y) for box in left]
    assert not any((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(ends, 2))
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in ends)


def test_long_links_are_straight():
    start, end = Box(0, 0.4), Box(5, 0.4)
    passed = [Box(column, 0.0, through=True) for column in range(1, 5)]
    obstacles = [Box(column, 0.3) for column in range(1, 5)]
    for a, b in itertools.pairwise([start, *obstacles, end]):
        link([a, b])
    link([start, *passed, end])
    place([start, end, *passed, *obstacles], 0.1)
    assert len({round(box.y, 9) for box in passed}) == 1
