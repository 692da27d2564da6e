"""Memory of the stages of a progressive search: ``python -m benchmarks.progressive [--json FILE]``.

Forward and backward of NAS-Bench-201's supernet (C 16, N 5, batch 64, 32x32) at k = 1, 2 and 4, and in DrNAS' two
stages: k = 4 with five operations, k = 2 with three. Beside fastnas, plain PyTorch with the same modules, in which an
edge adds up its operations one by one. Both leave out operations that were pruned.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import memory, saved_bytes
from benchmarks.plain import mixed_sum, shuffled
from fastnas import use_backend
from fastnas.nn import NASBench201Supernet
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import Zero
from fastnas.search.stages import reshape

CHANNELS, CELLS, BATCH, SIZE = 16, 5, 64, 32
MIB = 2**20


class PlainEdge(nn.Module):
    """The same candidates as a MixedOp's, one after the other."""

    def __init__(self, edge: MixedOp) -> None:
        super().__init__()
        self.k, self._ops = edge.k, edge._ops

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        active = x[:, : x.shape[1] // self.k]
        alive = [o for o, op in enumerate(self._ops) if not isinstance(op, Zero)]
        mixed = mixed_sum([self._ops[o](active) for o in alive], weights[alive])
        return mixed if self.k == 1 else shuffled(mixed, x, self.k, 1)


def plain(supernet: NASBench201Supernet) -> NASBench201Supernet:
    supernet = copy.deepcopy(supernet)
    for cell in supernet.cells:
        if hasattr(cell, "_ops"):
            for i, edge in enumerate(cell._ops):
                cell._ops[i] = PlainEdge(edge)
    return supernet


def stage(k: int, ops: int, before: int | None = None) -> tuple[NASBench201Supernet, Tensor]:
    """Returns the supernet of a stage, which the one before reached with k = ``before``, and weights."""
    torch.manual_seed(0)
    supernet = NASBench201Supernet(CHANNELS, CELLS, k=before or k)
    alphas = torch.randn(6, 5)
    kept = alphas.topk(ops, dim=1).indices.sort(dim=1).values
    reshape(supernet, {"cell": kept} if ops < 5 else {}, k)
    weights = torch.zeros(6, 5).scatter(1, kept, torch.softmax(alphas.gather(1, kept), 1))
    return supernet, weights


def measure(supernet: NASBench201Supernet, weights: Tensor) -> dict[str, float]:
    supernet.train()
    x = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    leaf = weights.clone().requires_grad_()

    def forward() -> Tensor:
        return supernet(x, {"cell": leaf}).logsumexp(1).sum()

    saved = saved_bytes(forward, [x, *supernet.parameters()])
    peak, _ = memory(lambda: forward().backward())
    return {"saved MiB": saved / MIB, "peak MiB": peak / MIB}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.progressive", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {}
    print("| stage | saved, MiB | peak, MiB | plain PyTorch: saved | peak |\n| --- | --- | --- | --- | --- |")
    for name, facts in {
        "k = 1, 5 operations": (1, 5),
        "k = 2, 5 operations": (2, 5),
        "k = 4, 5 operations (stage 1)": (4, 5),
        "k = 2, 3 operations (stage 2)": (2, 3, 4),
    }.items():
        supernet, weights = stage(*facts)
        ours = measure(supernet, weights)
        with use_backend("reference"):
            theirs = measure(plain(supernet), weights)
        results[name] = {"fastnas": ours, "plain": theirs}
        numbers = (f"{row[key]:.0f}" for row in (ours, theirs) for key in ("saved MiB", "peak MiB"))
        print(f"| {name} | {' | '.join(numbers)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
