"""What a search measures at the end of an epoch beside loss and accuracy, as its options ask for.

| name | what |
| --- | --- |
| `discrete/accuracy` | accuracy of the architecture so far with the supernet's parameters, 0 to 1 |
| `discrete/skips` | the share of its operations that are skip connections, 0 to 1 |
| `table/<column>` | what a table has for it |
| `sampled/<column>_mean`, `sampled/<column>_std` | the table's numbers of architectures drawn from the relaxation |
| `hessian/...` | see :mod:`fastnas.search.hessian` |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastnas.genotype import AnyGenotype, parse_genotype
from fastnas.search.config import SearchConfig
from fastnas.spaces import Space
from fastnas.tabular import Table, open_table

if TYPE_CHECKING:
    from fastnas.search.loop import Search

_TESTS = ("c10_test_e200", "c100_test_e200", "in16_test_e200", "cifar10-test")


class Measures:
    """The measures that a search's options ask for.

    Args:
        config: The options.
        space: The space that is searched.

    Raises:
        ValueError: where the table is none, or has no such column.
        OSError: where it cannot be read.
    """

    def __init__(self, config: SearchConfig, space: Space) -> None:
        self._config = config
        self._table: Table | None = None
        self._columns: list[str] = []
        if config.table is not None:
            self._table = open_table(config.table, space.name)
            first = self._table.rows[0]
            if _kind(first) not in (None, type(space.sample(torch.Generator()))):
                raise ValueError(f"{config.table}: {first} is no architecture of the space {space.name}")
            tests = [name for name in _TESTS if name in self._table.columns]
            self._columns = config.columns or tests or list(self._table.columns)
            for name in self._columns:
                self._table.column(name)

    def __call__(self, search: Search, genotype: AnyGenotype) -> dict[str, float]:
        """Returns the measures of the epoch that ends."""
        measures = {"discrete/skips": skips(genotype)}
        if self._config.discrete:
            measures["discrete/accuracy"] = search.evaluate(genotype)[1]
        if self._table is not None:
            measures |= {f"table/{name}": value for name, value in self.find(genotype).items()}
            if self._config.samples and self._config.select == "derive":
                measures |= self._sampled(search)
        if self._config.hessian and (search.epoch + 1) % self._config.hessian == 0:
            measures |= search.hessian()
        return measures

    def find(self, genotype: AnyGenotype) -> dict[str, float]:
        """Returns what the table has for an architecture: NaN where it does not have it, nothing without a table."""
        if self._table is None:
            return {}
        row = self._table.find(genotype) if genotype in self._table else {}
        return {name: row.get(name, math.nan) for name in self._columns}

    def _sampled(self, search: Search) -> dict[str, float]:
        generator = torch.Generator(search.device).manual_seed(1000 * self._config.seed + search.epoch)
        rows = [self.find(search.space.derive(search.sampled_weights(generator))) for _ in range(self._config.samples)]
        measures = {}
        for name in self._columns:
            known = [row[name] for row in rows if not math.isnan(row[name])]
            measures[f"sampled/{name}_mean"] = float(np.mean(known)) if known else math.nan
            measures[f"sampled/{name}_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
        return measures


def _kind(text: str) -> type | None:
    try:
        return type(parse_genotype(text))
    except ValueError:
        return None


def skips(genotype: AnyGenotype) -> float:
    """Returns the share of an architecture's operations that are ``skip_connect``; of DARTS' cells, the normal one."""
    operations = [op for op, _ in genotype.normal] if hasattr(genotype, "normal") else list(genotype.ops)
    return operations.count("skip_connect") / len(operations)
