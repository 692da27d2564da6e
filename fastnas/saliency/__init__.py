"""What can be said of candidates and of architectures without training.

A *saliency* scores every candidate of a supernet, a *score* a whole network. One file each; a file here is found by
itself.
"""

import importlib
import pkgutil

from fastnas.saliency._registry import (
    SALIENCIES,
    SCORES,
    Batch,
    Saliency,
    Score,
    get_saliency,
    get_score,
    saliency,
    score,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from fastnas.saliency.freedarts import FreeDarts, TrainingFreeResult  # noqa: E402

__all__ = [
    "SALIENCIES",
    "SCORES",
    "Batch",
    "FreeDarts",
    "Saliency",
    "Score",
    "TrainingFreeResult",
    "get_saliency",
    "get_score",
    "saliency",
    "score",
]
