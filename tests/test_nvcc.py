"""The CUDA side compiles with nvcc, without warnings or spills, and its library loads on any torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import libraries
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(libraries.NVCC is None, reason="nvcc is not on the path"),
]

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def library() -> Path:
    return libraries.build_cuda()


@pytest.mark.parametrize("source", sorted((libraries.CSRC / "cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_kernels_keep_to_registers(library: Path, source: Path) -> None:
    (log,) = (p for p in library.parents[1].glob(f"{source.name}.*.log"))
    kernels = [m.groupdict() for m in KERNEL.finditer(log.read_text())]
    assert {k["arch"] for k in kernels} == {"sm_80", "sm_90"}
    names = subprocess.run(
        ["c++filt", *(k["name"] for k in kernels)], capture_output=True, text=True, check=True
    ).stdout
    for name, k in zip(names.splitlines(), kernels, strict=True):
        print(f"{k['arch']} {k['registers']:>4} registers {k['stack']:>4} stack {name}")
    spilled = [k for k in kernels if k["stack"] != "0" or k["stores"] != "0" or k["loads"] != "0"]
    assert not spilled


def test_library_with_cuda_loads_and_registers_both_devices(library: Path) -> None:
    script = f"""
import sys, torch
sys.path.insert(0, {str(libraries.HERE)!r})
import libraries
module = libraries.import_library("fastnas._C", {str(library)!r})
from fastnas.ops import mixed_sum
assert module.build_info()["cuda"] == "test"
assert mixed_sum([torch.ones(3), torch.ones(3)], torch.ones(2)).tolist() == [2, 2, 2]
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastnas::")]
for name in names:
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6
