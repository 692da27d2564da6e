"""The machine and the versions that a result belongs to; as a program, prints where its results are kept."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path

import torch


def processor() -> str:
    """Returns the CPU's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def hardware() -> dict[str, object]:
    """Returns the part of the facts that needs no fastnas."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def facts() -> dict[str, object]:
    """Returns what a reader needs to judge a result by; no host or user name."""
    import fastnas
    from fastnas import _C

    build = {name: value for name, value in _C.build_info().items() if name != "cxx_standard"}
    return {**hardware(), "fastnas": fastnas.__version__, **build}


def machine() -> str:
    """Returns the machine's name in results: its GPU, or its CPU, how many cores of it and their vectors."""
    known = hardware()
    gpus = known["gpus"]
    cpu = f"{known['processor']} {known['cores']} cores {torch.backends.cpu.get_cpu_capability()}"
    name = str(gpus[0]) if isinstance(gpus, list) and gpus else cpu
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu", "", name.lower())).strip("-")


def folder() -> Path:
    """Returns where results of this version are kept; found without importing fastnas, which may not be built yet."""
    source = Path(__file__).resolve().parents[1] / "fastnas" / "__init__.py"
    version = re.search(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE)
    assert version is not None
    return Path("benchmarks", "results", version[1])


def write(path: Path, content: object) -> None:
    """Writes ``content`` as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    print(folder() / f"{machine()}.json")
