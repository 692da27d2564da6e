"""Loads the native library and chooses the backend that ops run on.

Backends: ``native`` (the C++/CUDA kernels), ``reference`` (plain PyTorch) and, in tests, ``emulated`` (the CUDA
kernels compiled for the host, on CPU tensors).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from fastnas import _C

Backend = Literal["native", "reference", "emulated"]
BACKENDS: tuple[Backend, ...] = ("native", "reference", "emulated")

# Plain globals, since torch.compile guards on them (it cannot trace a ContextVar).
_backend: Backend | None = None
_debug = False
_warned_no_cuda = False


def _check(name: str, source: str) -> Backend:
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise ValueError(f"{source}={name!r}: expected 'native' or 'reference'")


_default: Backend = _check(os.environ.get("FASTNAS_BACKEND", "native"), "FASTNAS_BACKEND")


def current_backend() -> Backend:
    """Returns the backend that ops use where none is named in the call."""
    return _backend or _default


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Runs the block's ops on ``backend``: ``"native"`` or ``"reference"``.

    Raises:
        ValueError: for an unknown backend.
    """
    global _backend
    before, _backend = _backend, _check(backend, "backend")
    try:
        yield
    finally:
        _backend = before


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Runs the block's ops on the reference backend, whose results can be differentiated more than once.

    The native ops are differentiable once. Analyses that need second derivatives (Hessians, exact unrolled gradients)
    build their graph inside this block.
    """
    with use_backend("reference"):
        yield


@contextmanager
def debug() -> Iterator[None]:
    """Checks the block's ops for NaN in ``weights``; the check reads them back to the host, so it costs time."""
    global _debug
    before, _debug = _debug, True
    try:
        yield
    finally:
        _debug = before


def debugging() -> bool:
    """Tells whether the code runs inside :func:`debug`."""
    return _debug


def namespace(backend: Backend | None, *tensors: torch.Tensor) -> Any | None:
    """Returns the torch.ops namespace to call for these tensors, or None for the reference.

    CUDA tensors with a library that was built without CUDA use the reference, with one warning; so do devices for
    which there is no kernel.
    """
    global _warned_no_cuda
    backend = _check(backend, "backend") if backend is not None else current_backend()
    if backend == "reference" or torch._C._are_functorch_transforms_active():  # which need ops that they can look into
        return None
    device = tensors[0].device.type
    if backend == "emulated":
        return torch.ops.fastnas_emulated
    if device == "cuda" and _C.build_info()["cuda"] is None:
        if not _warned_no_cuda:
            _warned_no_cuda = True
            warnings.warn(
                "fastnas was built without CUDA: CUDA tensors use the reference backend. Reinstall where torch has "
                "CUDA and nvcc is on the path (pip install --no-build-isolation .)",
                stacklevel=3,
            )
        return None
    if device not in ("cpu", "cuda", "meta"):
        return None
    return torch.ops.fastnas


def release_memory() -> int:
    """Frees the feature maps that the CPU kernels keep from call to call; returns how many bytes that were.

    They keep at most a quarter of the machine's memory, and only what calls have used.
    """
    before = _C.arena()
    _C.arena_set_limit(0)
    _C.arena_set_limit(before["limit"])
    return before["kept"]


DOUBLE_BACKWARD = (
    "fastnas' native ops are differentiable once; build the graph inside `with fastnas.twice_differentiable():` "
    "for second derivatives"
)
