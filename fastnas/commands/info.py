"""``fastnas info``."""

from __future__ import annotations

import platform
from typing import Any

import torch
from jsonargparse import Namespace

import fastnas
from fastnas import _C
from fastnas._library import current_backend
from fastnas.commands._common import Again, Parser

HELP = "versions, compiler, instruction sets, backends"


def parser(defaults: dict[str, Any] | None = None) -> Parser:
    """Returns the parser of its options."""
    return Parser(prog="fastnas info", usage="fastnas info", description="Prints versions and how fastnas was built.")


def run(options: Namespace, again: Again) -> int:
    """Returns the exit status after the facts were printed."""
    build = _C.build_info()
    rows = {
        "fastnas": fastnas.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": build["compiler"],
        "cuda": f"{build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "not built",
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "cpu instruction set": f"{build['cpu_isa']} (of {', '.join(build['cpu_isas'])}; FASTNAS_CPU chooses)",
        "threads": str(torch.get_num_threads()),
        "backends": f"native, reference; in use: {current_backend()} (FASTNAS_BACKEND chooses)",
        "library": _C.__file__,
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    return 0
