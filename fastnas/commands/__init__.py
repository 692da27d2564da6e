"""The commands of ``fastnas``, one a file: its parser, and what it does."""

from . import count, info, rank, report, score, search, show

COMMANDS = {
    "search": search,
    "rank": rank,
    "score": score,
    "report": report,
    "show": show,
    "count": count,
    "info": info,
}
"""In the order in which they are shown."""

__all__ = ["COMMANDS"]
