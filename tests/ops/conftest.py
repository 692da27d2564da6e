from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from fastnas import _C, use_backend


@dataclass(frozen=True)
class Target:
    """Where an op runs: a backend, the device of its tensors, its namespace of raw ops, its library's counters."""

    backend: str
    device: str
    ops: Any
    library: ModuleType


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test's ops on the CPU kernels, on the CUDA kernels executed by the emulator, and on a GPU."""
    if request.param == "emulated":
        library = request.getfixturevalue("emulated")
        found = Target("emulated", "cpu", torch.ops.fastnas_emulated, library)
    elif request.param == "cuda":
        if not torch.cuda.is_available() or _C.build_info()["cuda"] is None:
            pytest.skip("no GPU, or fastnas was built without CUDA")
        found = Target("native", "cuda", torch.ops.fastnas, _C)
    else:
        found = Target("native", "cpu", torch.ops.fastnas, _C)
    with use_backend(found.backend):  # type: ignore[arg-type]
        yield found


@pytest.fixture(params=["native", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device), for tests that name the backend in every call: they compare two."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return "emulated", "cpu"
    if request.param == "cuda":
        if not torch.cuda.is_available() or _C.build_info()["cuda"] is None:
            pytest.skip("no GPU, or fastnas was built without CUDA")
        return "native", "cuda"
    return "native", "cpu"
