"""Relaxations: from ``alphas`` (E, O) to the ``weights`` (E, O) that multiply the candidates' outputs.

One file each; a file here is found by itself. One of your own is a function with the decorator::

    @relaxation("sigmoid")
    def sigmoid(alphas):
        return alphas.sigmoid()
"""

import importlib
import pkgutil

from fastnas.relaxations._registry import RELAXATIONS, Relaxation, Sampler, get_relaxation, relaxation

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from fastnas.relaxations.dirichlet import concentration, dirichlet  # noqa: E402
from fastnas.relaxations.exponentiated import exponentiated  # noqa: E402
from fastnas.relaxations.gdas import gdas  # noqa: E402
from fastnas.relaxations.gumbel_softmax import gumbel_softmax  # noqa: E402
from fastnas.relaxations.softmax import softmax, softmax_per_node  # noqa: E402
from fastnas.relaxations.uniform import uniform  # noqa: E402

__all__ = [
    "RELAXATIONS",
    "Relaxation",
    "Sampler",
    "concentration",
    "dirichlet",
    "exponentiated",
    "gdas",
    "get_relaxation",
    "gumbel_softmax",
    "relaxation",
    "softmax",
    "softmax_per_node",
    "uniform",
]
