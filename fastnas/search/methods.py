"""Search methods: named sets of values over the library's seams, run by one loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

from fastnas._registry import Registry
from fastnas.data import default_augment

Value = bool | int | float | str | tuple[float, float] | list[str] | list[list[int]]

_NONE: Mapping[str, Value] = MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """A search method: values of the options of a search.

    An option that a method does not name has the value of the space's published search. Augmentation is no method's: it
    belongs to the data (:func:`fastnas.data.default_augment`).

    Attributes:
        name: What ``--method`` calls it.
        summary: One line for help texts, with the paper.
        values: Its options, whatever the space and the data.
        spaces: Further ones by space; they win over ``values``.
        digits: Further ones on the few small images of ``digits``; they win over all others.
    """

    name: str
    summary: str
    values: Mapping[str, Value] = field(default_factory=dict)
    spaces: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    digits: Mapping[str, Value] = field(default_factory=dict)

    def preset(self, data: str, space: str = "darts") -> dict[str, Value]:
        """Returns the value of every option that may be left out, for a search in ``space`` on ``data``.

        Raises:
            ValueError: for unknown data.
        """
        small = data == "digits"
        return {
            **_DEFAULTS,
            **asdict(default_augment(data)),
            **_SPACES.get(space, _NONE),
            **self.values,
            **self.spaces.get(space, _NONE),
            **(_DIGITS if small else _NONE),
            **(self.digits if small else _NONE),
        }


METHODS: Registry[Method] = Registry("method")


def register_method(method: Method) -> Method:
    """Returns ``method`` after making it known to ``--method`` and :class:`~fastnas.search.SearchConfig`.

    Raises:
        ValueError: where another method has the name.
    """
    return METHODS.add(method.name, method)


def get_method(name: str) -> Method:
    """Returns the method called ``name``.

    Raises:
        ValueError: for an unknown name.
    """
    return METHODS.find(name)


# The published search of DARTS on CIFAR (arXiv:1806.09055, section 3.1 and appendix A.1.1), first order.
_DEFAULTS: Mapping[str, Value] = MappingProxyType(
    {
        "relaxation": "softmax",
        "k": 1,
        "edge_normalization": False,
        "stages": [],
        "channels": 16,
        "layers": 8,
        "train_portion": 0.5,
        "batch_size": 64,
        "epochs": 50,
        "lr": 0.025,
        "lr_min": 0.001,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 3e-4,
        "clip": 5.0,
        "skip_dropout": 0.0,
        "perturbation": "none",
        "perturbation_radius": (0.03, 0.3),
        "order": 1,
        "alpha_first": True,
        "alpha_optimizer": "adam",
        "alpha_lr": 3e-4,
        "alpha_betas": (0.5, 0.999),
        "alpha_weight_decay": 1e-3,
        "alpha_warmup": 0,
        "alpha_scale": 1e-3,
        "regularizer": "none",
        "regularizer_scale": 1e-3,
        "temperature": (1.0, 1.0),
        "select": "derive",
        "candidates": 100,
        "discrete": True,
        "columns": [],
        "samples": 100,
        "threads": 0,
    }
)

# NAS-Bench-201's own searches (arXiv:2001.00326, appendix) step the weights first, and by Nesterov's momentum.
# NAS-Bench-1Shot1's are those of DARTS with 9 cells and batches of 96 (arXiv:2001.10422, appendix).
_ONE_SHOT: Mapping[str, Value] = MappingProxyType({"layers": 9, "batch_size": 96})
_PROXYLESS: Mapping[str, Value] = MappingProxyType({"channels": 32, "layers": 21})
_SPACES: Mapping[str, Mapping[str, Value]] = MappingProxyType(
    {
        "nb201": MappingProxyType(
            {"layers": 5, "nesterov": True, "weight_decay": 5e-4, "alpha_first": False},
        ),
        "nb1shot1-s1": _ONE_SHOT,
        "nb1shot1-s2": _ONE_SHOT,
        "nb1shot1-s3": _ONE_SHOT,
        "nb-macro": MappingProxyType({"channels": 32, "layers": 8}),
        "proxyless": _PROXYLESS,
        "proxyless-cifar": _PROXYLESS,
    }
)

# Not published anywhere: tuned for 1,797 images of 8x8 pixels and a few minutes on two CPU cores. So few steps need
# larger learning rates. The tensors are so small that a second thread gains little on a free core and waits long for a
# busy one; with one, a seed also gives the same result whatever the number of cores.
_DIGITS: Mapping[str, Value] = MappingProxyType(
    {"epochs": 8, "batch_size": 64, "lr": 0.1, "lr_min": 0.0, "alpha_lr": 0.02, "threads": 1}
)


def _values(*parts: Mapping[str, Value], **values: Value) -> Mapping[str, Value]:
    merged: dict[str, Value] = {}
    for part in (*parts, values):
        merged.update(part)
    return MappingProxyType(merged)


def _spaces(**spaces: Mapping[str, Value]) -> Mapping[str, Mapping[str, Value]]:
    """Returns values by space; those of ``darts`` hold for ``darts-7``, too."""
    return MappingProxyType({**spaces, **({"darts-7": spaces["darts"]} if "darts" in spaces else {})})


_PARTIAL = _values(k=4, edge_normalization=True)
_PARTIAL_DARTS = _values(batch_size=256, lr=0.1, lr_min=0.0)
_DIRICHLET = _values(relaxation="dirichlet", regularizer="l2", alpha_weight_decay=0.0)
_EXPONENTIATED = _values(relaxation="exponentiated", alpha_optimizer="sgd", alpha_lr=0.1, alpha_weight_decay=0.0)
# What DrNAS, SDARTS and, for 50 epochs, GAEA ran in NAS-Bench-201: the recipe of DARTS.
_LIKE_DARTS = _values(nesterov=False, weight_decay=3e-4, alpha_first=True, epochs=100)

register_method(Method("darts", "DARTS, first order (arXiv:1806.09055)"))
register_method(Method("darts-2nd", "DARTS, second order (arXiv:1806.09055)", _values(order=2)))
register_method(
    Method(
        "pc-darts",
        "PC-DARTS, partial channels and edge normalisation (arXiv:1907.05737)",
        _values(_PARTIAL, alpha_warmup=15),
        _spaces(darts=_values(_PARTIAL_DARTS, alpha_lr=6e-4), nb201=_values(_LIKE_DARTS, epochs=50)),
        digits=_values(alpha_warmup=2),
    )
)
register_method(
    Method(
        "drnas",
        "DrNAS, Dirichlet sampling (arXiv:2006.10355)",
        _DIRICHLET,
        _spaces(darts=_values(alpha_warmup=10), nb201=_LIKE_DARTS),
        digits=_values(alpha_warmup=0),
    )
)
register_method(
    Method(
        "drnas-progressive",
        "DrNAS, Dirichlet sampling and progressive learning (arXiv:2006.10355)",
        _values(_DIRICHLET, stages=[[4, 0, 25, 10], [2, 3, 25, 10]]),
        _spaces(
            darts=_values(
                channels=36, layers=20, lr=0.1, lr_min=0.0, alpha_lr=6e-4, stages=[[6, 0, 25, 10], [4, 4, 25, 10]]
            ),
            nb201=_values(_LIKE_DARTS, stages=[[4, 0, 50, 10], [2, 3, 50, 10]]),
        ),
        digits=_values(channels=16, layers=5, stages=[[4, 0, 4, 1], [2, 3, 4, 1]]),
    )
)
register_method(
    Method(
        "gdas",
        "GDAS, a path drawn by straight-through Gumbel-softmax (arXiv:1910.04465)",
        _values(relaxation="gdas", temperature=(10.0, 0.1), epochs=250),
        _spaces(darts=_values(batch_size=256, weight_decay=5e-4, nesterov=True, alpha_first=False)),
    )
)
register_method(
    Method(
        "snas",
        "SNAS, Gumbel-softmax of falling temperature (arXiv:1812.09926)",
        _values(relaxation="gumbel_softmax", temperature=(1.0, 0.03), epochs=150, lr_min=0.0),
        _spaces(nb201=_values(_LIKE_DARTS, temperature=(10.0, 1.0), lr_min=0.001)),
    )
)
register_method(
    Method(
        "gaea",
        "GAEA, exponentiated gradient on the weights of the mixed operations (arXiv:2004.07802)",
        _EXPONENTIATED,
        _spaces(nb201=_values(_LIKE_DARTS, epochs=50)),
        digits=_values(alpha_lr=0.1),
    )
)
register_method(
    Method(
        "gaea-pc-darts",
        "GAEA on PC-DARTS (arXiv:2004.07802)",
        _values(_PARTIAL, _EXPONENTIATED, alpha_warmup=10),
        _spaces(darts=_PARTIAL_DARTS, nb201=_values(_LIKE_DARTS, epochs=50)),
        digits=_values(alpha_lr=0.1, alpha_warmup=2),
    )
)
for _name, _kind, _what in (("rs", "random", "random smoothing"), ("adv", "adversarial", "adversarial training")):
    register_method(
        Method(
            f"sdarts-{_name}",
            f"SDARTS, {_what} (arXiv:2002.05283)",
            _values(perturbation=_kind),
            _spaces(nb201=_LIKE_DARTS),
        )
    )
register_method(
    Method(
        "random-ws",
        "Random search with weight sharing: uniform paths, the best of random cells (arXiv:1902.07638)",
        _values(relaxation="uniform", order=0, select="evaluate"),
        _spaces(darts=_values(candidates=1000), nb201=_values(epochs=250)),
        digits=_values(candidates=20),
    )
)
register_method(
    Method(
        "random",
        "A random architecture; nothing is trained",
        _values(order=0, epochs=0, select="random"),
        digits=_values(epochs=0),
    )
)
