"""The checkpoints of searches."""

from __future__ import annotations

from fastnas.runs.checkpoint import CheckpointError, Checkpoints

CHECKPOINTS = Checkpoints("search", 2)
FORMAT = CHECKPOINTS.format
save, load = CHECKPOINTS.save, CHECKPOINTS.load

__all__ = ["CHECKPOINTS", "FORMAT", "CheckpointError", "load", "save"]
