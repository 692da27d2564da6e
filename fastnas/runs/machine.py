"""The machine that a run is on, and its seeds."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastnas import _C, __version__

AMP: dict[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16}
"""What ``amp`` may be, and the dtype of autocast; None is no autocast."""

GPU_READ_EVERY = 10
"""On a GPU, reading a loss back waits for the step to end; every tenth step is often enough for a progress bar."""


class DivergenceError(ArithmeticError):
    """The loss is no longer a number; the message says where and what helps."""


def describe(device: torch.device, threads: int) -> dict[str, str | int]:
    """Returns what the bits of a run depend on beside its options.

    Args:
        device: Where it runs.
        threads: CPU threads; 0 are those that torch has now.
    """
    return {
        "processor": platform.machine(),
        "instruction set": _C.build_info()["cpu_isa"],
        "torch": str(torch.__version__),
        "fastnas": __version__,
        "device": device.type,
        "threads": threads or torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> int:
    """Returns bytes: torch's largest allocation on a GPU, else this process' largest resident size; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seed_of(seed: int, purpose: str) -> int:
    """Returns the seed of one purpose of a run.

    Each has an independent stream: a change in one (another batch size, say) leaves the others alone.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "little") >> 1


@contextmanager
def settings(device: torch.device, threads: int) -> Iterator[None]:
    """Runs the block on this many threads (0: as it is); on a GPU, as the current one and with deterministic cuDNN."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        if device.type == "cuda":
            # as the current one: pinned memory and its thread are of that, not of the one that tensors name
            with (
                torch.cuda.device(device),
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
            ):
                yield
        else:
            yield
    finally:
        if threads:
            torch.set_num_threads(before)
