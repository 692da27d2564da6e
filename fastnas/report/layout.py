"""Places boxes in columns and the links between them, so that no link passes under a box and few links cross.

The layered drawing of Sugiyama, Tagawa and Toda (IEEE Trans. SMC 11(2), 1981) for small graphs: every link joins
neighbouring columns (a longer one passes through boxes of its own without height), columns are ordered by sweeps of
barycentres, and the heights are the least-squares ones that keep the boxes of a column apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise

_RESTARTS = 32
_SWEEPS = 6
_RELAXATIONS = 60
_INVERSION = 0.1  # what two boxes in the wrong order cost, in length of links


@dataclass(eq=False)
class Box:
    """Something in a column: a node, a label, or a link that passes.

    Attributes:
        column: from left to right.
        height: how much of the column it takes.
        through: whether it stands for a link that passes; such links are kept straight.
        y: its centre, set by `place`.
    """

    column: int
    height: float
    through: bool = False
    y: float = 0.0
    before: list[Box] = field(default_factory=list, repr=False)
    after: list[Box] = field(default_factory=list, repr=False)


def link(boxes: Sequence[Box]) -> None:
    """Joins boxes of successive columns."""
    for a, b in pairwise(boxes):
        a.after.append(b)
        b.before.append(a)


def place(boxes: Sequence[Box], gap: float) -> None:
    """Sets every box's `y`, at least `gap` between two boxes of a column; the middle of all is 0.

    The same boxes and links give the same places. Of a column's boxes, the first comes on top where there is a choice,
    and in column 0 always.
    """
    columns = [[box for box in reversed(boxes) if box.column == c] for c in range(1 + max(box.column for box in boxes))]
    generator = random.Random(0)
    best: tuple[int, float] | None = None
    places: list[float] = []
    seen: set[tuple[Box, ...]] = set()
    for _ in range(_RESTARTS):
        order = _ordered(columns)
        columns = [generator.sample(column, len(column)) for column in columns]
        crossings = _crossings(order)
        key = tuple(chain.from_iterable(order))
        if key in seen or (best is not None and crossings > best[0]):
            continue
        seen.add(key)
        _set_heights(order, gap)
        first = [box.y for box in boxes if box.column == 0]
        sign = -1 if first[0] < first[-1] else 1
        length = sum(abs(a.y - b.y) for a in boxes for b in a.after)
        ordered = [box for box in boxes if not box.through]
        inversions = sum(a.column == b.column and sign * a.y < sign * b.y for a, b in combinations(ordered, 2))
        cost = (crossings, length + _INVERSION * inversions)
        if best is None or cost < best:
            best, places = cost, [sign * box.y for box in boxes]
    for box, y in zip(boxes, places, strict=True):
        box.y = y
    middle = (max(box.y + box.height / 2 for box in boxes) + min(box.y - box.height / 2 for box in boxes)) / 2
    for box in boxes:
        box.y -= middle


def _ordered(columns: list[list[Box]]) -> list[list[Box]]:
    """Returns the columns, each ordered from bottom to top so that few links cross."""
    best, fewest = columns, _crossings(columns)
    for _ in range(_SWEEPS):
        columns = _sweep(columns, range(1, len(columns)), lambda box: box.before)
        columns = _sweep(columns, range(len(columns) - 2, -1, -1), lambda box: box.after)
        columns = _exchange(columns)
        crossings = _crossings(columns)
        if crossings < fewest:
            best, fewest = columns, crossings
        if not crossings:
            break
    return best


def _sweep(columns: list[list[Box]], through: range, linked: Callable[[Box], list[Box]]) -> list[list[Box]]:
    """Returns the columns, each in turn ordered by the mean position of what its boxes are linked to."""
    columns = list(columns)
    position = {box: float(i) for column in columns for i, box in enumerate(column)}
    for c in through:
        centre = {
            box: sum(position[other] for other in linked(box)) / len(linked(box)) if linked(box) else position[box]
            for box in columns[c]
        }
        columns[c] = sorted(columns[c], key=lambda box: centre[box])
        position.update((box, float(i)) for i, box in enumerate(columns[c]))
    return columns


def _exchange(columns: list[list[Box]]) -> list[list[Box]]:
    """Returns the columns after every exchange of neighbours that saves crossings, in one pass."""
    columns = [list(column) for column in columns]
    for c, column in enumerate(columns):
        near = columns[max(c - 1, 0) : c + 2]
        fewest = _crossings(near)
        for i in range(len(column) - 1):
            if not fewest:
                break
            column[i], column[i + 1] = column[i + 1], column[i]
            crossings = _crossings(near)
            if crossings < fewest:
                fewest = crossings
            else:
                column[i], column[i + 1] = column[i + 1], column[i]
    return columns


def _crossings(columns: Sequence[Sequence[Box]]) -> int:
    """Returns how often links between these columns cross."""
    count = 0
    for left, right in pairwise(columns):
        position = {box: i for i, box in enumerate(right)}
        ends = [(i, position[other]) for i, box in enumerate(left) for other in box.after]
        count += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(ends, 2))
    return count


def _set_heights(columns: list[list[Box]], gap: float) -> None:
    """Sets `y` for the given order: links as level as the boxes' sizes allow, long ones above all."""
    for column in columns:
        for i, box in enumerate(column):
            box.y = (i - (len(column) - 1) / 2) * (gap + 0.3)
    place_of = {box: (column, i) for column in columns for i, box in enumerate(column)}
    chains = [_chain(box) for column in columns for box in column if box.through and not box.before[0].through]
    settlings = [_Settling(column, gap) for column in columns]
    for _ in range(_RELAXATIONS):
        for settling in (*settlings, *reversed(settlings)):
            settling.settle()
        for passing in chains:
            lows, highs = zip(*(_room(*place_of[box], gap) for box in passing), strict=True)
            low, high = max(lows), min(highs)
            if low <= high:  # a straight line has room
                level = min(max(sum(box.y for box in passing) / len(passing), low), high)
                for box in passing:
                    box.y = level


def _chain(box: Box) -> list[Box]:
    """Returns the boxes through which one link passes, the first of which is given."""
    boxes = [box]
    while boxes[-1].after[0].through:
        boxes.append(boxes[-1].after[0])
    return boxes


def _room(column: Sequence[Box], i: int, gap: float) -> tuple[float, float]:
    """Returns the lowest and the highest place of a column's box i that its neighbours leave."""
    low, high = float("-inf"), float("inf")
    if i > 0:
        low = column[i - 1].y + (column[i - 1].height + column[i].height) / 2 + gap
    if i + 1 < len(column):
        high = column[i + 1].y - (column[i + 1].height + column[i].height) / 2 - gap
    return low, high


class _Settling:
    """Moves one column's boxes to the least-squares heights given all other columns (pool adjacent violators)."""

    def __init__(self, column: list[Box], gap: float) -> None:
        offsets = [0.0]
        for below, above in pairwise(column):
            offsets.append(offsets[-1] + (below.height + above.height) / 2 + gap)
        self._boxes = []  # with their offsets, what pulls them, and how strongly it does in all
        for box, offset in zip(column, offsets, strict=True):
            pulls = [(8.0 if box.through and other.through else 1.0, other) for other in box.before + box.after]
            self._boxes.append((box, offset, pulls, sum(pull for pull, _ in pulls) or 1e-3))

    def settle(self) -> None:
        blocks: list[tuple[float, float, int]] = []  # (weight, mean wanted height less offset, boxes)
        for box, offset, pulls, weight in self._boxes:
            wanted = 0.0
            for pull, other in pulls:
                wanted += pull * other.y
            wanted = wanted / weight if pulls else box.y
            mean, count = wanted - offset, 1
            while blocks and blocks[-1][1] > mean:
                w, m, n = blocks.pop()
                weight, mean, count = w + weight, (w * m + weight * mean) / (w + weight), n + count
            blocks.append((weight, mean, count))
        heights = [mean for _, mean, count in blocks for _ in range(count)]
        for (box, offset, _, _), height in zip(self._boxes, heights, strict=True):
            box.y = height + offset
