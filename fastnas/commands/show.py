"""``fastnas show``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.table import Table

from fastnas.commands._common import Again, Parser, console
from fastnas.genotypes import GENOTYPES, find_genotype

HELP = "print, convert or draw an architecture; list those that have a name"

WHAT = (
    "A name (fastnas show lists them); a file, such as genotype.json or genotypes.py:NAME; a run folder; or an "
    "architecture written out."
)


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    show = Parser(
        prog="fastnas show",
        usage="fastnas show [WHAT] [options]",
        description="Prints an architecture. It may be in JSON or in the notation of its space: DARTS' Genotype(...), "
        "NAS-Bench-201's |op~0|+|op~0|op~1|+..., op(0)+op(0,1)+...+output(1,2) for NAS-Bench-1Shot1, NAS-Bench-Macro's "
        "22212202, or op>op>... for another chain. Without WHAT, lists the architectures that have a name, with the "
        "figures that their papers print.",
    )
    show.add_argument("what", nargs="?", metavar="WHAT", help=WHAT)
    show.add_argument("--to", choices=["json", "text"], default="text", help="The notation to print.")
    show.add_argument("--draw", metavar="FOLDER", help="Also draw its cells into this folder.")
    return show


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the architecture, or the list, was printed."""
    if options.what is None:
        if options.draw is not None:
            raise ValueError("--draw needs an architecture: say which before it")
        console().print(_named())
        return 0
    genotype = find_genotype(options.what)
    print(genotype.to_json().rstrip() if options.to == "json" else genotype.to_text())
    if options.draw is not None:
        from fastnas.report import draw_genotype

        folder = Path(options.draw)
        folder.mkdir(parents=True, exist_ok=True)
        draw_genotype(genotype, folder)
    return 0


def _named() -> Table:
    table = Table(
        box=None,
        header_style="dim",
        caption="As printed; a dash where nothing is. CIFAR-10: test error in percent, parameters in millions at 36 "
        "channels and 20 layers. ImageNet: parameters and multiply-adds in millions. fastnas count counts.",
        caption_justify="left",
    )
    table.add_column("name")
    table.add_column("arXiv")
    for column in ("error", "parameters", "ImageNet", "multiply-adds"):
        table.add_column(column, justify="right")
    for name, known in GENOTYPES.items():
        printed = known.published
        figures = (printed.error, printed.parameters, printed.imagenet_parameters, printed.multiply_adds)
        table.add_row(name, known.arxiv, *(figure or "-" for figure in figures))
    return table
