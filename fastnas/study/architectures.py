"""The architectures that a study looks at, and what they are worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastnas.genotype import AnyGenotype, Genotype, OneShotGenotype, parse_genotype
from fastnas.saliency.rank import sample
from fastnas.spaces import Space
from fastnas.tabular import Table
from fastnas.tabular.nasbench301 import parse_cells

_PROBES = 50
_FAILURES = 20_000  # draws one after another that are nothing new, until the space counts as exhausted


@dataclass(frozen=True)
class Known:
    """Architectures of known worth, in the order in which they are drawn.

    Attributes:
        genotypes: The architectures, all different.
        truth: What each is worth; higher is better.
    """

    genotypes: list[AnyGenotype]
    truth: list[float]


def known(space: Space, table: Table, column: str, count: int | None, seed: int = 0, *, errors: bool = False) -> Known:
    """Returns random architectures of a space that a table knows, or all of them.

    They are drawn from the space where the table has most of it, or has graphs that a space writes in several ways, and
    else from the table's rows. A larger count begins with the architectures of a smaller one of the same seed.

    Args:
        space: the space.
        table: the table; DARTS' cells may be JSON without their concat.
        column: its column that says what they are worth; where that is NaN they are not known.
        count: how many; None for all.
        seed: of the draws.
        errors: the column has errors as parts of 1, and the worth is 100 (1 - error).

    Raises:
        ValueError: where the table has no such column, a number in it that is not finite, architectures of another
            space, or fewer than ``count``; and for all of a space that cannot be listed.
    """
    worth = _worth(table, column, errors)
    generator = torch.Generator().manual_seed(seed)
    probes = [_key(space.sample(generator)) in worth for _ in range(_PROBES)]
    found: Iterable[AnyGenotype]
    if 2 * sum(probes) < _PROBES and not isinstance(_parsed(table.rows[0]), OneShotGenotype):
        rows = [row for row in map(_parsed, table.rows) if _belongs(space, row)]
        if not rows:
            raise ValueError(f"the table has no architecture of the space {space.name}: {table.rows[0]}")
        order = torch.randperm(len(rows), generator=generator).tolist()
        found = (rows[n] for n in order if _key(rows[n]) in worth)
    else:
        found = sample(space, None) if count is None else (space.sample(generator) for _ in itertools.count())
    chosen: dict[str, AnyGenotype] = {}
    failures = 0
    for genotype in found:
        if len(chosen) == count or failures == _FAILURES:
            break
        key = _key(genotype)
        new = key in worth and key not in chosen
        failures = 0 if new or count is None else failures + 1
        if new:
            chosen[key] = genotype
    if len(chosen) < (count or 1):
        raise ValueError(
            f"sample={count or 'all'}: the table knows {len(chosen)} architectures of the space {space.name}"
        )
    return Known(list(chosen.values()), [worth[key] for key in chosen])


def _worth(table: Table, column: str, errors: bool) -> dict[str, float]:
    values = table.column(column)
    if np.isinf(values).any():
        raise ValueError(f"column={column!r}: {table.rows[np.isinf(values).argmax()]} has a worth that is not finite")
    # a table's graphs are canonical already
    found = {_parsed(row).to_text(): float(v) for row, v in zip(table.rows, values, strict=True) if not math.isnan(v)}
    return {key: 100 * (1 - value) for key, value in found.items()} if errors else found


def _parsed(row: str) -> AnyGenotype:
    if row.lstrip().startswith("{") and '"normal"' in row:
        return parse_cells(row, f"table: {row}")
    return parse_genotype(row)


def _key(genotype: AnyGenotype) -> str:
    """Returns what tells architectures apart: a NAS-Bench-101 cell is the graph, however its nodes are numbered."""
    return (genotype.canonical() if isinstance(genotype, OneShotGenotype) else genotype).to_text()


def _belongs(space: Space, genotype: AnyGenotype) -> bool:
    try:
        space.encode(genotype)
    except ValueError:
        return False
    return True


def operators(genotype: AnyGenotype) -> list[str]:
    """Returns the operator at each place of an architecture; of DARTS' cells, the normal one's first."""
    if isinstance(genotype, Genotype):
        return [op for op, _ in (*genotype.normal, *genotype.reduce)]
    return list(genotype.ops)


def places(space: Space, genotype: AnyGenotype) -> list[str]:
    """Returns what :func:`operators`' places are called."""
    if isinstance(genotype, Genotype):
        return [
            f"{cell} {n // 2}, {'first' if n % 2 == 0 else 'second'}"
            for cell, edges in (("normal", genotype.normal), ("reduce", genotype.reduce))
            for n in range(len(edges))
        ]
    if isinstance(genotype, OneShotGenotype):
        return [f"node {n}" for n in range(1, len(genotype.ops) + 1)]
    if space.cell_types == ("chain",):
        return [f"layer {n}" for n in range(len(genotype.ops))]
    return [f"{j} to {i}" for i, j in space.edges]


def best(values: Sequence[float], part: float, seed: int = 0) -> list[int]:
    """Returns the indices of the best part of some values, ascending. Which of equals are kept, chance decides."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda n: math.inf if math.isnan(values[n]) else -values[n])
    return sorted(order[: round(part * len(values))])
