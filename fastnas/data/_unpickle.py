"""Pickles of plain data, read without running anything they contain.

The CIFAR archives of the "python version" are Python 2 pickles of a dictionary with a NumPy array. `pickle.load` on
such a file runs whatever the file asks for. Here every global name that a pickle may mention is looked up in a small
table of builders written for this purpose; the objects they return can hold numbers and nothing else; any other name is
refused before anything is called.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_NUMBER = re.compile(r"[?biuf][1248]?")


def _text(value: object) -> str:
    """Returns a str from a str or from the bytes that a Python 2 str becomes."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, str):
        return value
    raise pickle.UnpicklingError(f"expected a string, found {type(value).__name__}")


class _Number:
    """Stands in for `numpy.dtype`: the code of a number type, such as "u1"."""

    __slots__ = ("code", "order")

    def __init__(self, code: object) -> None:
        self.code = _text(code)
        self.order = "="
        if not _NUMBER.fullmatch(self.code):
            raise pickle.UnpicklingError(f"arrays of dtype {self.code!r} are refused; only numbers are read")

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, sub-array, field names, fields, item size, alignment, flags)
        order = _text(state[1])
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured dtypes are refused; only numbers are read")
        self.order = order

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands in for `numpy.ndarray` while a pickle is read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: npt.NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, number, fortran, data = state
        self.fill(data, number, shape, "F" if fortran else "C")

    def fill(self, data: object, number: object, shape: object, order: object) -> None:
        if not isinstance(number, _Number) or not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array's content is not raw numbers")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array's shape is not a tuple of sizes")
        dtype = number.dtype()
        if math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} does not fit its {len(data)} bytes")
        self.value = np.frombuffer(data, dtype).reshape(shape, order="F" if order in ("F", b"F") else "C")


class _Builder:
    """A callable that a pickle may use but not change: it has no settable attributes and refuses a state."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a builder has no state")


def _from_buffer(data: object, number: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.fill(data, number, shape, order)
    return array


def _encode(text: object, codec: object) -> bytes:
    """Returns the bytes that Python 3 writes as `_codecs.encode(text, "latin1")` under the old protocols."""
    if _text(codec) != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError("only latin1 text can become bytes")
    return text.encode("latin-1")


_BUILDERS = {
    ("numpy", "ndarray"): _Builder(_Array),
    ("numpy", "dtype"): _Builder(lambda code, *_: _Number(code)),
    ("_codecs", "encode"): _Builder(_encode),
}
for _core in ("numpy.core", "numpy._core"):  # the second since NumPy 2
    _BUILDERS[f"{_core}.multiarray", "_reconstruct"] = _Builder(lambda *_: _Array())
    _BUILDERS[f"{_core}.numeric", "_frombuffer"] = _Builder(_from_buffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _BUILDERS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a data file has no use for; nothing of it was run"
            ) from None

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("it asks for an object outside the file; nothing of it was run")


def read_dict(raw: bytes) -> dict[str, Any]:
    """Returns the dictionary pickled in `raw`, keys as str, NumPy arrays as read-only arrays of numbers.

    Raises:
        pickle.UnpicklingError: damaged data, anything but a dictionary, or a pickle that wants any global name besides
            NumPy's arrays of numbers. Nothing named in the pickle is ever imported or called.
    """
    try:
        value = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, not a dictionary")
        return {_text(key): item.value if isinstance(item, _Array) else item for key, item in value.items()}
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise pickle.UnpicklingError(f"the pickle is damaged or cut short ({type(error).__name__}: {error})") from error
