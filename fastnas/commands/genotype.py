"""``fastnas genotype``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastnas.commands._common import Again, Parser
from fastnas.genotype import load_genotype

HELP = "convert or draw a searched architecture"


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    genotype = Parser(
        prog="fastnas genotype",
        usage="fastnas genotype FILE [options]",
        description="Prints the architecture in a file, which is in JSON or in the notation of its space: DARTS' "
        "Genotype(...), NAS-Bench-201's |op~0|+|op~0|op~1|+..., or op(0)+op(0,1)+...+output(1,2) for NAS-Bench-1Shot1.",
    )
    genotype.add_argument("file", metavar="FILE", help="genotype.json, genotype.txt, or a line of a genotypes.py.")
    genotype.add_argument("--to", choices=["json", "text"], default="text", help="The notation to print.")
    genotype.add_argument("--draw", metavar="FOLDER", help="Also draw its cells into this folder.")
    return genotype


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the architecture was printed."""
    genotype = load_genotype(options.file)
    print(genotype.to_json().rstrip() if options.to == "json" else genotype.to_text())
    if options.draw is not None:
        from fastnas.report import draw_genotype

        folder = Path(options.draw)
        folder.mkdir(parents=True, exist_ok=True)
        draw_genotype(genotype, folder)
    return 0
