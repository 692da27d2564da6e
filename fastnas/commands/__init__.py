"""The commands of ``fastnas``, one a file: its parser, and what it does."""

from . import genotype, info, rank, report, score, search

COMMANDS = {
    "search": search,
    "rank": rank,
    "score": score,
    "report": report,
    "genotype": genotype,
    "info": info,
}
"""In the order in which they are shown."""

__all__ = ["COMMANDS"]
