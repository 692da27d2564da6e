"""``fastnas report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastnas.commands._common import Again, Parser

HELP = "one page about a search or a study"


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    report = Parser(
        prog="fastnas report",
        usage="fastnas report RUN",
        description="Writes one HTML page about a search or a study into its folder, report.html: curves, cells, what "
        "was measured and every option. It needs no network and no other file.",
    )
    report.add_argument("run", metavar="RUN", help="The folder of the search or study.")
    return report


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the page was written."""
    from fastnas.report import write_page
    from fastnas.report.study import write_study_page

    folder = Path(options.run)
    print(write_study_page(folder) if (folder / "study.json").exists() else write_page(folder))
    return 0
