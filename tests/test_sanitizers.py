"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer: CPU kernels, CUDA kernels emulated, glue."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import libraries
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers' runtime is preloaded as on Linux"),
]

# The tests that reach every kernel and every check; tracing and compiling add nothing here but time.
TESTS = (
    "matches_reference or mixed_layouts or unaligned or any_number or equals_reference or one_end_alone or raw_op or "
    "same_bits or equals_the_reference or low_precision or pooling or each_gradient_alone or first_pixel or "
    "odd_shapes"
)
# Emulated, large shapes take minutes; the others reach every branch but abs_cell's second band. One half precision is
# loaded and stored like the other; a mixed cell runs mixed_op's kernels, which have those tests themselves.
SLOW = "large or bfloat16 or (test_abs_cell and float16) or (test_mixed_cell and not odd_shapes)"
TESTS = f"({TESTS}) and not (emulated and ({SLOW}))"


def runtime(name: str) -> str:
    return subprocess.check_output([libraries.CXX, f"-print-file-name={name}"], text=True).strip()


def environment(isa: str = "") -> dict[str, str]:
    return {
        **os.environ,
        "FASTNAS_TEST_NATIVE": str(libraries.build("native", sanitize=True)),
        "FASTNAS_TEST_EMULATED": str(libraries.build("emulated", sanitize=True)),
        "FASTNAS_CPU": isa,
        # Python is linked with neither: the sanitizer must come first, and looks for C++ exceptions at once.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(libraries.ROOT), str(libraries.HERE), os.environ.get("PYTHONPATH", "")]),
    }


def python(*arguments: str, isa: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(isa), cwd=libraries.ROOT, capture_output=True, text=True)


START = """
import os, sys, libraries
from pathlib import Path
libraries.import_library("fastnas._C", Path(os.environ["FASTNAS_TEST_NATIVE"]))
"""
PYTEST = """
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
# Reads one float past the end of 100.
OVERRUN = """
import ctypes, torch
from fastnas.ops import mixed_sum
libraries.load()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = (ctypes.c_float * 101).from_address(libc.malloc(400))
mixed_sum([torch.frombuffer(memory, dtype=torch.float32)], torch.ones(1), backend=sys.argv[1])
"""


@pytest.mark.parametrize("isa", ["", "plain"])
def test_ops_pass_under_the_sanitizers(isa: str) -> None:
    tests = f"({TESTS}) and not emulated" if isa else TESTS  # the CUDA kernels know no instruction sets of the CPU
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not cuda", "-k", tests]
    done = python("-c", START + PYTEST, *options, "tests/ops", isa=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("backend", ["native", "emulated"])
def test_sanitizers_are_at_work(backend: str) -> None:
    done = python("-c", START + OVERRUN, backend)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
