"""Builds the test-only libraries: the CUDA side compiled for the host, either side with sanitizers, both with nvcc.

Objects are kept in build/<library>/ under a hash of everything that they depend on, so a second build is quick.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulator"
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
Library = Literal["emulated", "native"]

NVCC = shutil.which("nvcc")

CXX = os.environ.get("CXX", "g++")
_FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-psabi"),
    "-Wno-maybe-uninitialized",  # GCC sees it where a loop always runs
    f"-I{CSRC}",
    *(f"-isystem{p}" for p in (TORCH / "include", sysconfig.get_paths()["include"])),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
_SANITIZE = [
    "-O0",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
_LINK = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
_EMULATED = [f"-I{HERE}", "-DFASTNAS_EMULATED", "-DFASTNAS_MODULE=_emulated"]


@functools.cache
def _dependencies(path: Path) -> frozenset[Path]:
    """Returns the file and every file of this repository that it includes."""
    found = {path}
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        for folder in (path.parent, CSRC, HERE):
            if (folder / name).is_file():
                found |= _dependencies((folder / name).resolve())
                break
    return frozenset(found)


@functools.cache
def _versions() -> str:
    compiler = subprocess.run([CXX, "--version"], check=True, capture_output=True, text=True).stdout
    return f"{compiler} {torch.__version__} {sys.version}"


def _key(source: Path, command: list[str]) -> str:
    digest = hashlib.sha256(f"{_versions()} {command} {source}".encode())
    for path in sorted(_dependencies(source)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _compile(folder: Path, source: Path, command: list[str]) -> Path:
    """Returns the object made from ``source``; what the compiler said lies beside it in a .log file."""
    target = folder / f"{source.name}.{_key(source, command)}.o"
    if not target.exists():
        partial = target.with_suffix(".partial")
        target.with_suffix(".log").write_text(_run([*command, "-c", str(source), "-o", str(partial)]))
        partial.replace(target)
    return target


def _link(folder: Path, name: str, objects: list[Path], command: list[str]) -> Path:
    key = hashlib.sha256(" ".join([*command, *(o.name for o in objects)]).encode()).hexdigest()[:20]
    target = folder / key / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        _run([command[0], *map(str, objects), *command[1:], "-o", str(partial)])
        partial.replace(target)
    return target


def _build(folder: Path, name: str, sources: list[tuple[Path, list[str]]], link: list[str]) -> Path:
    """Compiles (source, command) pairs in parallel and links the objects in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda pair: _compile(folder, *pair), sources))
        library = _link(folder, name, objects, link)
        for old in folder.glob("*.o"):
            if old not in objects:
                old.unlink()
                old.with_suffix(".log").unlink(missing_ok=True)
        for old in folder.glob("*/"):
            if old != library.parent:
                shutil.rmtree(old)
    return library


def _cxx(*flags: str, sanitize: bool) -> list[str]:
    return [CXX, *_FLAGS, *flags, *(_SANITIZE if sanitize else ["-O2", "-g0"]), "-x", "c++"]


def _with_bounds(kernels: list[Path], command: list[str]) -> list[tuple[Path, list[str]]]:
    """Puts the markers of the emulator's shared memory around the kernels."""
    begin, end = ([*command, f"-DEMULATOR_MARK=emulator_shared_{what}"] for what in ("begin", "end"))
    bounds = HERE / "shared_bounds.cpp"
    return [(bounds, begin), *((p, command) for p in kernels), (bounds, end)]


def _isa(source: Path) -> str | None:
    """Returns the instruction set that a source is compiled for, if it is one of the three."""
    last = source.stem.rsplit("_", 1)[-1]
    return last if last in ("plain", "avx2", "avx512") else None


def _cpu_sources() -> list[Path]:
    skip = set() if platform.machine().lower() in ("x86_64", "amd64") else {"avx2", "avx512"}
    return [p for p in sorted((CSRC / "cpu").glob("*.cpp")) if _isa(p) not in skip]


def build(library: Library = "emulated", sanitize: bool = False) -> Path:
    """Returns the path of the library, built if anything that it depends on has changed.

    Args:
        library: ``"emulated"``, the CUDA kernels for the host; or ``"native"``, the CPU side as in ``fastnas._C``.
        sanitize: compile with AddressSanitizer and UndefinedBehaviorSanitizer.
    """
    glue = sorted(CSRC.glob("*.cpp"))
    if library == "emulated":
        command = _cxx(*_EMULATED, sanitize=sanitize)
        shared = [p for p in _cpu_sources() if p.with_suffix(".h").exists()]  # no kernels
        sources = [(p, command) for p in [*glue, *shared]]
        sources += _with_bounds(sorted((CSRC / "cuda").glob("*.cu")), command)
    else:
        from fastnas import _C  # not above: under the sanitizers it is another library, imported by this module

        command = _cxx(sanitize=sanitize)
        unused = [CXX, *_FLAGS, "-O0", "-g0", "-x", "c++"]
        run = {None, "plain", _C.build_info()["cpu_isa"]}  # others would only take minutes to compile
        sources = [(p, command if _isa(p) in run or not sanitize else unused) for p in [*glue, *_cpu_sources()]]
    link = [CXX, "-shared", *_LINK, *(["-fsanitize=address,undefined"] if sanitize else [])]
    folder = ROOT / "build" / (f"{library}_sanitized" if sanitize else library)
    return _build(folder, "_emulated.so" if library == "emulated" else "_C.so", sources, link)


def build_cuda() -> Path:
    """Returns the path of fastnas._C with CUDA, built with nvcc for sm_80, sm_90 and PTX, warnings being errors.

    It also loads on a torch without CUDA. What ptxas says of each kernel lies beside the objects, in .log files.
    """
    top = re.search(r"TOP=(\S+)", _run([str(NVCC), "--dryrun", "-x", "cu", "/dev/null"]))
    assert top is not None
    home = Path(top[1]).resolve()
    defines = ["-DFASTNAS_CUDA", "-DUSE_CUDA", "-DFASTNAS_CUDA_VERSION=test", "-DFASTNAS_CUDA_ARCHS=8.0;9.0+PTX"]
    host = [CXX, *_FLAGS, *defines, f"-isystem{home / 'include'}", "-O0", "-g0"]  # it is loaded, hardly run
    device = [
        *(str(NVCC), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xptxas=-v"),
        *("-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Wno-unknown-pragmas"),
        *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)),
        *("-gencode=arch=compute_90,code=compute_90", f"-I{CSRC}", f"-isystem={TORCH / 'include'}", *defines),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    sources = [(p, host) for p in [*sorted(CSRC.glob("*.cpp")), *_cpu_sources()]]
    sources += [(p, device) for p in sorted((CSRC / "cuda").glob("*.cu"))]
    link = [CXX, "-shared", *_LINK, f"-L{home / 'lib64'}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return _build(ROOT / "build" / "cuda", "_C.so", sources, link)


def build_program(source: Path, sanitize: bool = False) -> Path:
    """Returns the path of a program made from one .cu file on the emulator."""
    command = _cxx(*_EMULATED, sanitize=sanitize)
    sources = [(CSRC / "counters.cpp", command), *_with_bounds([source], command)]
    folder = ROOT / "build" / f"{source.stem}{'_sanitized' if sanitize else ''}"
    return _build(folder, source.stem, sources, [CXX, *(["-fsanitize=address,undefined"] if sanitize else [])])


def import_library(name: str, path: Path) -> ModuleType:
    """Imports the extension module at ``path`` under ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@functools.cache
def load() -> ModuleType:
    """Returns the emulated library, built and loaded, with its ops under torch.ops.fastnas_emulated.

    Afterwards ``fastnas.use_backend("emulated")`` runs the CUDA kernels on CPU tensors; the module's ``counters()``
    and ``reset_counters()`` are those of this library. FASTNAS_TEST_EMULATED names a library that is built already.
    """
    built = os.environ.get("FASTNAS_TEST_EMULATED")
    module = import_library("_emulated", Path(built) if built else build())
    from fastnas.ops import _common

    _common.register_fakes_for("fastnas_emulated")
    return module
