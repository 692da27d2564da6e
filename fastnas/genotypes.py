"""Architectures by name: cells that papers found, with where they are published and the figures printed of them.

:func:`find_genotype` takes such a name, a file, or an architecture written out.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastnas._registry import Registry
from fastnas.genotype import AnyGenotype, Genotype, NASBench201Genotype, load_genotype, parse_genotype


@dataclass(frozen=True)
class Published:
    """What is printed of an architecture, in the digits that are printed; None where nothing is.

    In the DARTS space, the CIFAR-10 network has 36 channels and 20 layers, that of ImageNet 14 layers; neither counts
    its auxiliary head. Cells of NAS-Bench-201 have the benchmark's network.

    Attributes:
        parameters: Parameters of the CIFAR-10 network, in millions.
        error: Its test error on CIFAR-10, in percent.
        imagenet_parameters: Parameters of the ImageNet network, in millions.
        multiply_adds: Its multiply-adds at 224x224, in millions, by whatever way of counting the authors chose.
        imagenet_channels: Its channels.
    """

    parameters: str | None = None
    error: str | None = None
    imagenet_parameters: str | None = None
    multiply_adds: str | None = None
    imagenet_channels: int = 48


@dataclass(frozen=True)
class NamedGenotype:
    """An architecture with a name.

    Attributes:
        name: What :func:`find_genotype` finds it by.
        genotype: The architecture.
        source: Where its operations are listed: a repository and the file in it.
        published: Figures.
        arxiv: The paper that found it.
    """

    name: str
    genotype: AnyGenotype
    source: str
    published: Published
    arxiv: str


GENOTYPES: Registry[NamedGenotype] = Registry("architecture")
"""The named architectures."""


def find_genotype(what: str | os.PathLike[str]) -> AnyGenotype:
    """Returns an architecture.

    Args:
        what: a name in ``GENOTYPES`` (case and ``-`` for ``_`` do not matter); an architecture written out, in any
            notation; a file that holds one, or a folder with ``genotype.json``; or ``FILE:NAME``, what is assigned to
            NAME in a file with several ``Genotype(...)``, such as a ``genotypes.py`` or a search log, of which nothing
            is executed. A file that is called like a name is found by ``./NAME``.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is none of these, or what it holds describes no architecture.
    """
    if isinstance(what, str):
        named = {_plain(name): known for name, known in GENOTYPES.items()}.get(_plain(what))
        if named is not None:
            return named.genotype
        written = any(mark in what for mark in "(>") or re.fullmatch("[012]+", what)
        if "\n" in what or what.lstrip()[:1] in ("{", "|") or (written and not os.path.exists(what)):
            return parse_genotype(what)
    path, name = Path(what), None
    if not path.exists() and ":" in str(what):
        file, _, name = str(what).rpartition(":")
        path = Path(file)
    if not path.exists() and re.fullmatch(r"[\w-]+", str(what)):
        raise ValueError(f"{what} is neither a file nor the name of an architecture: {', '.join(GENOTYPES)}")
    if path.is_dir():
        path /= "genotype.json"
    several = _several(path)
    if name is not None:
        if name not in several:
            raise ValueError(f"{path}: nothing is assigned to {name!r}; {_there(several)}")
        return _parse(path, several[name])
    if len(several) > 1:
        raise ValueError(f"{path} holds several architectures: say which, as in {path}:NAME; {_there(several)}")
    return _parse(path, *several.values()) if several else load_genotype(path)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _there(several: dict[str, str]) -> str:
    return f"there {'is' if len(several) == 1 else 'are'} {', '.join(several) or 'none'}"


def _parse(path: Path, text: str) -> Genotype:
    try:
        return Genotype.from_text(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _several(path: Path) -> dict[str, str]:
    """Returns the text of each ``NAME = Genotype(...)`` in a file by its name; of several with one name, the last."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = {}
    for match in re.finditer(r"(\w+)\s*(?::\s*\w+\s*)?=\s*(Genotype\()", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        found[match[1]] = text[match.start(2) : end]
    return found


def _add(name: str, arxiv: str, source: str, genotype: AnyGenotype, published: Published) -> None:
    GENOTYPES.add(name, NamedGenotype(name, genotype, source, published, arxiv))


def _cells(normal: str, reduce: str, concats: tuple[list[int], list[int]] | None = None) -> Genotype:
    """Returns the genotype of two cells written as ``op~input op~input ...``; concats are all nodes, where None."""

    def edges(text: str) -> list[tuple[str, int]]:
        return [(op, int(j)) for op, _, j in (edge.rpartition("~") for edge in text.split())]

    normal_concat, reduce_concat = concats or (range(2, 6), range(2, 6))
    return Genotype(edges(normal), normal_concat, edges(reduce), reduce_concat)


_add(
    "DARTS_V1",
    "1806.09055",
    "yuhuixu1993/PC-DARTS genotypes.py, quark0/darts cnn/genotypes.py (as DARTS)",
    _cells(
        "sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~0 sep_conv_3x3~1 "
        "skip_connect~0 sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~2",
        "max_pool_3x3~0 max_pool_3x3~1 skip_connect~2 max_pool_3x3~0 "
        "max_pool_3x3~0 skip_connect~2 skip_connect~2 avg_pool_3x3~0",
    ),
    Published("3.3", "3.00"),
)
_add(
    "DARTS_V2",
    "1806.09055",
    "yuhuixu1993/PC-DARTS genotypes.py, D-X-Y/AutoDL-Projects lib/nas_infer_model/DXYs/genotypes.py",
    _cells(
        "sep_conv_3x3~0 sep_conv_3x3~1 sep_conv_3x3~0 sep_conv_3x3~1 "
        "sep_conv_3x3~1 skip_connect~0 skip_connect~0 dil_conv_3x3~2",
        "max_pool_3x3~0 max_pool_3x3~1 skip_connect~2 max_pool_3x3~1 "
        "max_pool_3x3~0 skip_connect~2 skip_connect~2 max_pool_3x3~1",
    ),
    Published("3.349", "2.76", "4.719", "574"),
)
_add(
    "PDARTS",
    "1904.12760",
    "chenxin061/pdarts genotypes.py",
    _cells(
        "skip_connect~0 dil_conv_3x3~1 skip_connect~0 sep_conv_3x3~1 "
        "sep_conv_3x3~1 sep_conv_3x3~3 sep_conv_3x3~0 dil_conv_5x5~4",
        "avg_pool_3x3~0 sep_conv_5x5~1 sep_conv_3x3~0 dil_conv_5x5~2 "
        "max_pool_3x3~0 dil_conv_3x3~1 dil_conv_3x3~1 dil_conv_5x5~3",
    ),
    Published("3.4", "2.50", "4.9", "557"),
)
_add(
    "PC_DARTS_cifar",
    "1907.05737",
    "yuhuixu1993/PC-DARTS genotypes.py",
    _cells(
        "sep_conv_3x3~1 skip_connect~0 sep_conv_3x3~0 dil_conv_3x3~1 "
        "sep_conv_5x5~0 sep_conv_3x3~1 avg_pool_3x3~0 dil_conv_3x3~1",
        "sep_conv_5x5~1 max_pool_3x3~0 sep_conv_5x5~1 sep_conv_5x5~2 "
        "sep_conv_3x3~0 sep_conv_3x3~3 sep_conv_3x3~1 sep_conv_3x3~2",
    ),
    Published("3.6", "2.57", "5.3", "586"),
)
_add(
    "PC_DARTS_image",
    "1907.05737",
    "yuhuixu1993/PC-DARTS genotypes.py",
    _cells(
        "skip_connect~1 sep_conv_3x3~0 sep_conv_3x3~0 skip_connect~1 "
        "sep_conv_3x3~1 sep_conv_3x3~3 sep_conv_3x3~1 dil_conv_5x5~4",
        "sep_conv_3x3~0 skip_connect~1 dil_conv_5x5~2 max_pool_3x3~1 "
        "sep_conv_3x3~2 sep_conv_3x3~1 sep_conv_5x5~0 sep_conv_3x3~3",
    ),
    Published(imagenet_parameters="5.3", multiply_adds="597"),
)
_add(
    "DrNAS_cifar10",
    "2006.10355",
    "xiangning-chen/DrNAS DARTS-space/genotypes.py",
    _cells(
        "sep_conv_3x3~0 sep_conv_5x5~1 sep_conv_3x3~1 sep_conv_3x3~2 "
        "skip_connect~0 sep_conv_3x3~1 sep_conv_3x3~2 dil_conv_5x5~3",
        "max_pool_3x3~0 sep_conv_5x5~1 dil_conv_5x5~2 sep_conv_5x5~1 "
        "sep_conv_5x5~1 dil_conv_5x5~3 skip_connect~4 sep_conv_5x5~1",
    ),
    Published("4.1", "2.46"),
)
_add(
    "DrNAS_imagenet",
    "2006.10355",
    "xiangning-chen/DrNAS DARTS-space/genotypes.py",
    _cells(
        "sep_conv_3x3~1 sep_conv_3x3~0 sep_conv_3x3~0 sep_conv_3x3~1 "
        "sep_conv_3x3~0 dil_conv_3x3~3 skip_connect~0 sep_conv_3x3~1",
        "max_pool_3x3~0 sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~2 "
        "sep_conv_3x3~0 sep_conv_3x3~2 sep_conv_3x3~3 sep_conv_3x3~1",
    ),
    Published(imagenet_parameters="5.7"),
)
_add(
    "GDAS_V1",
    "1910.04465",
    "D-X-Y/AutoDL-Projects lib/nas_infer_model/DXYs/genotypes.py",
    _cells(
        "skip_connect~0 skip_connect~1 skip_connect~0 sep_conv_5x5~2 "
        "sep_conv_3x3~3 skip_connect~0 sep_conv_5x5~4 sep_conv_3x3~3",
        "sep_conv_5x5~0 sep_conv_3x3~1 sep_conv_5x5~2 sep_conv_5x5~1 "
        "dil_conv_5x5~2 sep_conv_3x3~1 sep_conv_5x5~0 sep_conv_5x5~1",
    ),
    Published("3.4", "2.93", "5.3", "581", imagenet_channels=50),
)
_add(
    "SNAS_mild",
    "1812.09926",
    "SNAS-Series/SNAS-Series SNAS/genotypes.py",
    _cells(
        "sep_conv_3x3~0 sep_conv_3x3~1 skip_connect~0 dil_conv_3x3~1 "
        "skip_connect~0 skip_connect~1 skip_connect~0 sep_conv_3x3~1",
        "max_pool_3x3~0 max_pool_3x3~1 max_pool_3x3~1 skip_connect~2 "
        "max_pool_3x3~1 skip_connect~2 max_pool_3x3~0 dil_conv_5x5~2",
    ),
    Published(error="2.98", multiply_adds="522"),
)
_add(
    "SNAS_moderate",
    "1812.09926",
    "SNAS-Series/SNAS-Series SNAS/genotypes.py",
    _cells(
        "dil_conv_5x5~0 skip_connect~1 sep_conv_3x3~0 skip_connect~1 "
        "skip_connect~0 skip_connect~1 sep_conv_3x3~0 dil_conv_5x5~1",
        "max_pool_3x3~0 max_pool_3x3~1 sep_conv_5x5~0 dil_conv_5x5~1 "
        "sep_conv_5x5~0 sep_conv_5x5~1 sep_conv_5x5~0 sep_conv_5x5~1",
    ),
    Published("2.8", "2.85", "4.3"),
)
_add(
    "NASNet",
    "1707.07012",
    "quark0/darts cnn/genotypes.py",
    _cells(
        "sep_conv_5x5~1 sep_conv_3x3~0 sep_conv_5x5~0 sep_conv_3x3~0 avg_pool_3x3~1 "
        "skip_connect~0 avg_pool_3x3~0 avg_pool_3x3~0 sep_conv_3x3~1 skip_connect~1",
        "sep_conv_5x5~1 sep_conv_7x7~0 max_pool_3x3~1 sep_conv_7x7~0 avg_pool_3x3~1 "
        "sep_conv_5x5~0 skip_connect~3 avg_pool_3x3~2 sep_conv_3x3~2 max_pool_3x3~1",
        ([2, 3, 4, 5, 6], [4, 5, 6]),
    ),
    Published("3.3", "2.65", "5.3", "564"),
)
_add(
    "AmoebaNet",
    "1802.01548",
    "quark0/darts cnn/genotypes.py",
    _cells(
        "avg_pool_3x3~0 max_pool_3x3~1 sep_conv_3x3~0 sep_conv_5x5~2 sep_conv_3x3~0 "
        "avg_pool_3x3~3 sep_conv_3x3~1 skip_connect~1 skip_connect~0 avg_pool_3x3~1",
        "avg_pool_3x3~0 sep_conv_3x3~1 max_pool_3x3~0 sep_conv_7x7~2 sep_conv_7x7~0 "
        "avg_pool_3x3~1 max_pool_3x3~0 max_pool_3x3~1 conv_7x1_1x7~0 sep_conv_3x3~5",
        ([4, 5, 6], [3, 4, 6]),
    ),
    Published("3.2", "3.34", "5.1", "555"),
)
_add(
    "NB201_ResNet",
    "2001.00326",
    "D-X-Y/AutoDL-Projects lib/models/cell_searchs/genotypes.py (as resnet)",
    NASBench201Genotype.from_text("|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|skip_connect~2|"),
    Published(error="6.09"),
)
_add(
    "NB201_DrNAS",
    "2006.10355",
    "the benchmark's tables: DrNAS prints the accuracies of this cell, the best on CIFAR-100",
    NASBench201Genotype.from_text(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    ),
    Published(error="5.64"),
)
_add(
    "NB201_best_cifar10",
    "2001.00326",
    "the benchmark's tables",
    NASBench201Genotype.from_text(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
    ),
    Published(error="5.63"),
)
_add(
    "NB201_skip",
    "2001.00326",
    "D-X-Y/AutoDL-Projects lib/models/cell_searchs/genotypes.py (as all_idnt); where DARTS ends",
    NASBench201Genotype(("skip_connect",) * 6),
    Published(error="45.70"),
)
