"""``fastnas count``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from fastnas.commands._common import Again, Parser, console, describe, option_names
from fastnas.commands.show import WHAT
from fastnas.genotypes import find_genotype
from fastnas.inference import NETWORKS, build_network, space_of
from fastnas.nn.counting import count
from fastnas.nn.stems import STEMS

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
    space = space_of(genotype)
    preset = NETWORKS[space].published
    if namespace.imagenet:
        if "stem" not in preset:
            raise ValueError("imagenet: only the DARTS space has such a network; give channels, layers, ... instead")
        preset = _IMAGENET
    given = {name: namespace[name] for name in option_names("count") if namespace[name] is not None}
    if "stem" in given and "stem" not in preset:
        raise ValueError(f"stem={given['stem']}: only networks of the DARTS space have one to choose; leave it out")
    network = {**preset, **given}
    size = network.pop("image_size")
    if size < 1:
        raise ValueError(f"image_size={size} must be at least 1")
    result = count(build_network(genotype, {"space": space, **network}), (network["in_channels"], size, size))
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
