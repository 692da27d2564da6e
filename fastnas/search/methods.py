"""Search methods: named sets of values over the library's seams, run by one loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from fastnas.data import default_augment
from fastnas.search.architect import Architect, first_order

Value = bool | int | float | str | tuple[float, float]


@dataclass(frozen=True)
class Method:
    """A search method.

    Attributes:
        name: What ``--method`` calls it.
        summary: One line for help texts, with the paper.
        architect: Computes the gradient of the alphas.
        relaxation: The name of the function from alphas to weights.
        k: Partial channels: the candidates of an edge see 1/k of its channels; 1 is all of them.
        presets: Option values for each data set; data without a preset of its own takes those of ``cifar10``.
            Augmentation is not among them: it belongs to the data (:func:`fastnas.data.default_augment`).
    """

    name: str
    summary: str
    architect: Architect
    relaxation: str
    k: int
    presets: Mapping[str, Mapping[str, Value]]

    def preset(self, data: str) -> dict[str, Value]:
        """Returns the value of every option that may be left out, for a search on ``data``.

        Raises:
            ValueError: for unknown data.
        """
        return {
            "relaxation": self.relaxation,
            "k": self.k,
            **asdict(default_augment(data)),
            **self.presets.get(data, self.presets["cifar10"]),
        }


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Returns ``method`` after making it known to ``--method`` and :class:`~fastnas.search.SearchConfig`.

    Raises:
        ValueError: where another method has the name.
    """
    if method.name in METHODS:
        raise ValueError(f"method {method.name!r} is already registered; give this one another name")
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Returns the method called ``name``.

    Raises:
        ValueError: for an unknown name.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method={name!r} is unknown; choose from {', '.join(sorted(METHODS))}") from None


# The published search on CIFAR (arXiv:1806.09055, section 3.1 and appendix A.1.1).
_DARTS_CIFAR: Mapping[str, Value] = MappingProxyType(
    {
        "channels": 16,
        "layers": 8,
        "train_portion": 0.5,
        "batch_size": 64,
        "epochs": 50,
        "alpha_warmup": 0,
        "lr": 0.025,
        "lr_min": 0.001,
        "momentum": 0.9,
        "weight_decay": 3e-4,
        "clip": 5.0,
        "alpha_lr": 3e-4,
        "alpha_betas": (0.5, 0.999),
        "alpha_weight_decay": 1e-3,
        "alpha_scale": 1e-3,
        "threads": 0,
    }
)

# Not published anywhere: tuned for 1,797 images of 8x8 pixels and a few minutes on two CPU cores. So few steps need
# larger learning rates. The tensors are so small that a second thread gains little on a free core and waits long for a
# busy one; with one, a seed also gives the same result whatever the number of cores.
_DARTS_DIGITS: Mapping[str, Value] = MappingProxyType(
    {
        **_DARTS_CIFAR,
        "epochs": 8,
        "batch_size": 64,
        "lr": 0.1,
        "lr_min": 0.0,
        "alpha_lr": 0.02,
        "threads": 1,
    }
)

register_method(
    Method(
        name="darts",
        summary="DARTS, first order (arXiv:1806.09055)",
        architect=first_order,
        relaxation="softmax",
        k=1,
        presets=MappingProxyType({"cifar10": _DARTS_CIFAR, "cifar100": _DARTS_CIFAR, "digits": _DARTS_DIGITS}),
    )
)
