"""The space of NAS-Bench-Macro (arXiv:2103.11922, and the benchmark's published code)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fastnas.genotype import ChainGenotype
from fastnas.nn.chain import Skeleton
from fastnas.spaces._chain import ChainSpace
from fastnas.spaces._registry import register


class MacroSpace(ChainSpace):
    """A chain whose architectures can be listed."""

    def all(self) -> Iterator[ChainGenotype]:
        """Yields every chain of the space once; the last layer changes fastest."""
        choices = [[p for p, here in zip(self.primitives, row, strict=True) if here] for row in self._rows()]
        return (ChainGenotype(ops) for ops in itertools.product(*choices))


NASBENCH_MACRO = register(
    MacroSpace(
        "nb-macro",
        ("skip_connect", "mb3_3x3", "mb6_5x5"),
        Skeleton(stem=32, stem_stride=1, first=0, stages=((64, 2, 2), (128, 3, 2), (256, 3, 2)), head=1280),
    )
)
