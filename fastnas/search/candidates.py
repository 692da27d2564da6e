"""Tables of edges that do not have all candidates: after pruning, or where a space does not allow one everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Candidates:
    """Takes tables (E, O) apart into what edges have, one part for each number of candidates, and puts them together.

    A relaxation of such a part gives weights to the candidates that there are, and to no other.

    Args:
        has: name -> bool (E, O); tables that are not named here have all, and are left alone.
    """

    def __init__(self, has: Mapping[str, Tensor]) -> None:
        self._parts: dict[str, list[tuple[str, Tensor, Tensor]]] = {}  # key, rows (R,), columns (R, n) ascending
        self._order: dict[str, Tensor] = {}
        for name, table in has.items():
            counts = table.sum(1)
            rows = [(counts == n).nonzero()[:, 0] for n in sorted(set(counts.tolist()))]
            self._order[name] = torch.cat(rows).argsort()
            self._parts[name] = [
                (f"{name}+{i}" if i else name, r, table[r].nonzero()[:, 1].view(len(r), -1)) for i, r in enumerate(rows)
            ]
        self._widths = {name: table.shape[1] for name, table in has.items()}

    def split(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the parts of tables (E, O): name -> (R, n), and ``name+1``, ... for further numbers of candidates."""
        split = {}
        for name, table in tables.items():
            if name not in self._parts:
                split[name] = table
            for key, rows, columns in self._parts.get(name, ()):
                split[key] = table.index_select(0, rows).gather(1, columns)
        return split

    def join(self, split: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole tables, (E, O), from their parts: 0 for the candidates that there are not."""
        inner = {key for parts in self._parts.values() for key, _, _ in parts}
        tables = {name: table for name, table in split.items() if name not in inner}
        for name, parts in self._parts.items():
            whole = [
                split[key].new_zeros(len(rows), self._widths[name]).scatter(1, columns, split[key])
                for key, rows, columns in parts
            ]
            tables[name] = torch.cat(whole).index_select(0, self._order[name])
        return tables
