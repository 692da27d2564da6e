"""``fastnas count``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace
from torch import nn

from fastnas.commands._common import Again, Parser, console, describe, option_names
from fastnas.commands.show import WHAT
from fastnas.genotype import AnyGenotype, ChainGenotype, Genotype, NASBench201Genotype, OneShotGenotype
from fastnas.genotypes import find_genotype
from fastnas.nn import NASBench101Network, NASBench201Network, Network
from fastnas.nn.counting import count
from fastnas.nn.stems import STEMS
from fastnas.spaces import get_space

HELP = "parameters and multiply-adds of an architecture's network"


@dataclass(frozen=True)
class CountOptions:
    """The network.

    What is not given is as published: 36 channels and 20 layers in the DARTS space, 16 channels and 5 cells a stage in
    NAS-Bench-201, 128 channels and 9 cells in NAS-Bench-101, 32 channels in chains; 10 classes, images of 32x32 pixels,
    but 1000 classes and 224x224 for a chain of ProxylessNAS.

    Attributes:
        channels: Channels of the first cells; of a chain, of its stem.
        layers: Cells; in NAS-Bench-201 those of a stage. Chains have their own.
        num_classes: Classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        stem: What comes before the cells of the DARTS space.
    """

    channels: int | None = None
    layers: int | None = None
    num_classes: int | None = None
    in_channels: int = 3
    image_size: int | None = None
    stem: str | None = None


_CIFAR = {"num_classes": 10, "image_size": 32}
_PRESETS: dict[type, dict[str, Any]] = {
    Genotype: {"channels": 36, "layers": 20, "stem": "cifar", **_CIFAR},
    NASBench201Genotype: {"channels": 16, "layers": 5, **_CIFAR},
    OneShotGenotype: {"channels": 128, "layers": 9, **_CIFAR},
}
_CHAINS: dict[str, dict[str, Any]] = {
    "nb-macro": {"channels": 32, "layers": 8, **_CIFAR},
    "proxyless": {"channels": 32, "layers": 21, "num_classes": 1000, "image_size": 224},
}
_IMAGENET = {"channels": 48, "layers": 14, "stem": "imagenet", "num_classes": 1000, "image_size": 224}

describe("count", CountOptions, {"stem": list(STEMS)})


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    counting = Parser(
        prog="fastnas count",
        usage="fastnas count WHAT [options]",
        description="Prints the size of an architecture's network: its parameters, the multiply-adds of its "
        "convolutions and linear layers for one image, and the operations of what lies between them, which some papers "
        "add: two for each element of a norm, one for each of an activation, one for each that a pool reads.",
    )
    counting.add_argument("what", metavar="WHAT", help=WHAT)
    counting.add_argument(
        "--imagenet",
        action="store_true",
        help="The DARTS space's network for ImageNet: 48 channels, 14 layers, 1000 classes, 224x224 pixels.",
    )
    counting.add_class_arguments(CountOptions)
    return counting


def run(namespace: Namespace, again: Again) -> int:
    """Returns the exit status after the table was printed."""
    genotype = find_genotype(namespace.what)
    preset = _CHAINS[_space(genotype)] if isinstance(genotype, ChainGenotype) else _PRESETS[type(genotype)]
    if namespace.imagenet:
        if "stem" not in preset:
            raise ValueError("imagenet: only the DARTS space has such a network; give channels, layers, ... instead")
        preset = _IMAGENET
    given = {name: namespace[name] for name in option_names("count") if namespace[name] is not None}
    if "stem" in given and "stem" not in preset:
        raise ValueError(f"stem={given['stem']}: only networks of the DARTS space have one to choose; leave it out")
    network = preset | given
    size = network.pop("image_size")
    if size < 1:
        raise ValueError(f"image_size={size} must be at least 1")
    result = count(_build(genotype, **network), (network["in_channels"], size, size))
    out = console()
    out.print(", ".join(f"{name} {value}" for name, value in network.items()) + f", images of {size}x{size}")
    rows = {
        "parameters": (result.parameters, ""),
        "multiply-adds": (result.multiply_adds, "convolutions and linear layers"),
        "elementwise": (result.elementwise, "norms, activations and pools"),
    }
    for name, (value, what) in rows.items():
        out.print(f"{name:14}{value:15,}" + (f"  [dim]{what}[/]" if what else ""))
    return 0


def _build(genotype: AnyGenotype, channels: int, layers: int, **others: Any) -> nn.Module:
    # not by the space's name: NASNet and AmoebaNet have more nodes than that of DARTS
    if isinstance(genotype, Genotype):
        return Network(genotype, channels, layers, **others)
    if isinstance(genotype, NASBench201Genotype):
        return NASBench201Network(genotype, channels, layers, **others)
    if isinstance(genotype, ChainGenotype):
        return get_space(_space(genotype)).network(genotype, channels, layers, **others)
    return NASBench101Network(genotype, channels, layers, **others)


def _space(genotype: ChainGenotype) -> str:
    """Returns the name of the space whose blocks a chain has."""
    return "nb-macro" if set(genotype.ops) <= set(get_space("nb-macro").primitives) else "proxyless"
