"""The commands of ``fastnas``, one a file: its parser, and what it does."""

from . import count, export, info, predict, rank, report, score, search, show, study, train

COMMANDS = {
    "search": search,
    "train": train,
    "rank": rank,
    "score": score,
    "study": study,
    "report": report,
    "show": show,
    "count": count,
    "predict": predict,
    "export": export,
    "info": info,
}
"""In the order in which they are shown."""

__all__ = ["COMMANDS"]
