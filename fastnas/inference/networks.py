"""Which network a genotype stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastnas.genotype import AnyGenotype, ChainGenotype, Genotype, NASBench201Genotype, OneShotGenotype
from fastnas.nn import NASBench101Network, NASBench201Network, Network
from fastnas.spaces import get_space


class Networks(NamedTuple):
    """The networks of a space.

    Attributes:
        genotype: The class of its genotypes.
        build: Returns a network from a genotype and its sizes.
        published: The sizes in the paper, ``stem`` where there is a choice, and ``image_size``.
    """

    genotype: type[Any]
    build: Callable[..., nn.Module]
    published: Mapping[str, Any]


def _chain(space: str, **published: int) -> Networks:
    return Networks(ChainGenotype, get_space(space).network, published)


_CIFAR = {"num_classes": 10, "image_size": 32}
_IMAGENET = {"num_classes": 1000, "image_size": 224}

NETWORKS: dict[str, Networks] = {
    "darts": Networks(Genotype, Network, {"channels": 36, "layers": 20, "stem": "cifar", **_CIFAR}),
    "nb201": Networks(NASBench201Genotype, NASBench201Network, {"channels": 16, "layers": 5, **_CIFAR}),
    "nb101": Networks(OneShotGenotype, NASBench101Network, {"channels": 128, "layers": 9, **_CIFAR}),
    "nb-macro": _chain("nb-macro", channels=32, layers=8, **_CIFAR),
    "proxyless": _chain("proxyless", channels=32, layers=21, **_IMAGENET),
    "proxyless-cifar": _chain("proxyless-cifar", channels=32, layers=21, **_CIFAR),
}
"""The networks by the name of their space."""

_SIZES = ("channels", "layers", "num_classes", "in_channels")


def space_of(genotype: AnyGenotype) -> str:
    """Returns the name in :data:`NETWORKS` that a genotype belongs to, the first one where there are several.

    Raises:
        ValueError: where it belongs to none.
    """
    for name, networks in NETWORKS.items():
        if not isinstance(genotype, networks.genotype):
            continue
        # not of others: cells of NASNet and AmoebaNet have the network of the DARTS space, and other operations
        if not isinstance(genotype, ChainGenotype) or set(genotype.ops) <= set(get_space(name).primitives):
            return name
    raise ValueError(f"genotype is of none of the spaces {', '.join(NETWORKS)}: got {genotype!r}")


def build_network(
    genotype: AnyGenotype, network: Mapping[str, Any], *, auxiliary: bool = False, drop_path: float = 0.0
) -> nn.Module:
    """Returns the network that a genotype stands for, with fresh weights.

    Args:
        genotype: the architecture.
        network: its other arguments: ``space`` (a name in :data:`NETWORKS`), ``channels``, ``layers``, ``num_classes``,
            ``in_channels`` and, for ``darts``, ``stem`` (``cifar`` where it is missing).
        auxiliary: of :class:`fastnas.nn.Network`; of training alone.
        drop_path: likewise.

    Raises:
        ValueError: where an argument is missing, unknown or does not fit, or the genotype is of another space.
    """
    space = network.get("space")
    if space not in NETWORKS:
        raise ValueError(f"network: space={space!r}: expected one of {', '.join(NETWORKS)}")
    kind, build, _ = NETWORKS[space]
    darts = space == "darts"
    unknown = set(network) - {"space", "stem", *_SIZES}
    missing = [name for name in _SIZES if type(network.get(name)) is not int]
    if unknown or missing:
        raise ValueError(
            f"network: expected space, stem and the whole numbers {', '.join(_SIZES)}; "
            + (f"{', '.join(missing)} not given" if missing else f"{', '.join(sorted(unknown))} unknown")
        )
    if not isinstance(genotype, kind):
        raise ValueError(f"genotype is none of the space {space!r}: got {genotype!r}")
    if not darts and (network.get("stem", "cifar") != "cifar" or auxiliary or drop_path):
        raise ValueError(f"stem, auxiliary and drop_path are choices of the space 'darts', not of {space!r}")
    sizes = [network[name] for name in _SIZES]
    if not darts:
        return build(genotype, *sizes)
    return build(genotype, *sizes, stem=network.get("stem", "cifar"), auxiliary=auxiliary, drop_path=drop_path)
