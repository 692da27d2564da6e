"""The CPU kernels of every instruction set that this machine can run, and how one is forced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnas import _C

HERE = Path(__file__).parent


def python(*arguments: str, cpu: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FASTNAS_CPU": cpu}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=HERE.parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [i for i in ("plain", "avx2", "avx512") if i != _C.build_info()["cpu_isa"]])
def test_every_instruction_set_passes_the_tests_of_the_ops(isa: str) -> None:
    if isa not in _C.build_info()["cpu_isas"]:
        pytest.skip(f"this processor has no {isa}")
    chosen = "test_matches_reference or test_equals_reference or test_same_bits or test_pooling"
    cells = "test_equals_the_reference or test_odd_shapes"
    ops = ("abs_cell", "absolute", "mixed_cell", "mixed_sum", "partial_channels", "relu_pointwise")
    files = [str(HERE / f"test_{op}.py") for op in ops]
    options = ["-q", "-p", "no:cacheprovider", "-k", f"(cpu and ({chosen})) or (native and ({cells}))"]
    done = python("-m", "pytest", *options, *files, cpu=isa)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
def test_one_can_be_forced(isa: str) -> None:
    done = python("-c", "from fastnas import _C; print(_C.build_info()['cpu_isa'])", cpu=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_name_is_an_error() -> None:
    done = python("-c", "from fastnas import _C; _C.build_info()", cpu="sse9")
    assert done.returncode != 0
    assert "FASTNAS_CPU=sse9: expected plain, avx2 or avx512" in done.stderr
