"""One edge of the DARTS space as variants: fastnas' and the plain one."""

from __future__ import annotations

import torch

import fastnas
from benchmarks import plain
from benchmarks.build import leaf, random, variant
from benchmarks.measure import Variant

Shape = tuple[int, int, int, int, int, int]  # N, C, H, W, stride, k


def title(shape: Shape) -> str:
    """Returns what a benchmark of this edge is called."""
    *size, stride, k = shape
    return f"MixedOp ({', '.join(map(str, size))}) stride {stride}{f', k={k}' if k > 1 else ''}"


def edge(shape: Shape, name: str, dtype: torch.dtype, device: str, mode: str | None = None) -> Variant:
    """Returns the variant ``name`` of an edge; ``mode`` is torch.compile's."""
    n, c, h, w, stride, k = shape
    torch.manual_seed(0)
    reference = plain.MixedOp(c, stride, k)
    x = leaf(random(n, c, h, w, seed=1, dtype=dtype, device=device), name)
    weights = leaf(random(len(plain.PRIMITIVES), seed=2, dtype=dtype, device=device).softmax(0), name)
    return variant(
        fastnas.MixedOp(c, stride, k) if name == "fastnas" else reference,
        {key: value.clone() for key, value in reference.state_dict().items()},
        name,
        dtype,
        device,
        arguments=(x, weights),
        inputs={"x": x},
        parameters={"weights": weights},
        grad=random(n, c, h // stride, w // stride, seed=3, dtype=dtype, device=device),
        mode=mode,
    )
