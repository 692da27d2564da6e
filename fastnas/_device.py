"""The device that a name stands for."""

from __future__ import annotations

import torch


def as_device(name: str) -> torch.device:
    """Returns the device called ``name``; ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        ValueError: where there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is no device; use cpu, cuda, cuda:1 ... or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs here; use cpu or auto")
    return device
