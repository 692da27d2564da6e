"""The benchmarks' instruments, against independent measures and values known beforehand."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from benchmarks import measure, plain, supernets  # noqa: E402
from benchmarks.measure import MIB, Variant  # noqa: E402
from fastnas.nn import MixedOp, NASBench201Supernet, Supernet  # noqa: E402


def test_memory_of_known_allocations() -> None:
    def run() -> Tensor:
        first = torch.zeros(3 * MIB, dtype=torch.uint8)
        second = torch.zeros(5 * MIB, dtype=torch.uint8)
        del first
        third = torch.zeros(1 * MIB, dtype=torch.uint8)
        del third
        return second

    assert measure.memory(run) == (8 * MIB, 5 * MIB)


def test_memory_sees_inside_operators() -> None:
    x = torch.ones(MIB)
    _, held = measure.memory(lambda: x.var())  # a buffer or none inside: nothing is left but the scalar
    assert held <= 64
    peak, held = measure.memory(lambda: (x + x).sum())
    assert peak >= x.nbytes > held


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc and Linux' resident size")
@pytest.mark.parametrize("side", ["plain", "fastnas"])
def test_peak_memory_agrees_with_resident_size(side: str) -> None:
    """The allocator's peak of a step is what the process grows by, as the system's kernel reports it."""
    script = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import fastnas, torch
from benchmarks import measure, plain
torch.set_num_threads(1)

def step(n):
    torch.manual_seed(0)
    op, x, w = {side}.MixedOp(16, 1), torch.randn(n, 16, 32, 32, requires_grad=True), torch.full((8,), 0.125)
    y = op(x, w)
    return torch.autograd.grad(y, (x, *op.parameters()), torch.ones_like(y))

def highest():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

step(1)
before = highest()
step(48)
grown = highest() - before
print(grown, measure.memory(lambda: step(48))[0])
"""
    # Large blocks each in a mapping of their own: what is freed leaves the process, and no gaps stay behind.
    # And torch's own convolutions: others reserve what they never touch.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_MAX_CPU_ISA": ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    grown, peak = map(int, done.stdout.split()[-2:])
    assert 0.98 * peak < grown < 1.05 * peak


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    p = torch.ones(1000, requires_grad=True)
    assert measure.saved_bytes(lambda: x * p) == 8000
    assert measure.saved_bytes(lambda: x * p, [p]) == 4000
    assert measure.saved_bytes(lambda: x * p + x * p, [p]) == 4000
    assert measure.saved_bytes(lambda: (x[:10] * p[:10], x[10:] * p[10:]), [p]) == 4000
    assert measure.saved_bytes(lambda: x + p) == 0


def test_saved_bytes_of_temporaries_are_all_counted() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert measure.saved_bytes(lambda: [x.exp() for _ in range(7)]) == 7 * 4000


def test_saved_bytes_leaves_nothing_behind() -> None:
    x = torch.ones(1000, requires_grad=True)
    _, held = measure.memory(lambda: measure.saved_bytes(lambda: x.exp().exp()))
    assert held == 0


def _mixed_op(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Variant:
    module = module.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 6, 6, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(4, 8, 6, 6, generator=generator).to(dtype)
    weights = torch.linspace(0.1, 0.8, 8, dtype=dtype).requires_grad_()
    parameters = {"weights": weights, **dict(module.named_parameters())}
    buffers = dict(module.named_buffers())
    return Variant(lambda: module(x, weights), {"x": x}, parameters, grad, buffers)


@pytest.mark.parametrize("k", [1, 4])
def test_plain_and_fused_agree(k: int) -> None:
    sides = [plain.MixedOp(8, 1, k), MixedOp(8, 1, k)]
    sides[1].load_state_dict(sides[0].state_dict(), strict=True)
    plain_outcome, fused = (_mixed_op(side, torch.float64).outcome() for side in sides)
    assert max(measure.errors(fused, plain_outcome)) < 1e-9


SUPERNETS = {
    "DARTS": (plain.Supernet(4, 3), Supernet(4, 3)),
    "PC-DARTS": (plain.Supernet(8, 3, k=4), Supernet(8, 3, k=4)),
    "other nodes": (
        plain.Supernet(4, 3, steps=2, primitives=plain.PRIMITIVES[:3]),
        Supernet(4, 3, steps=2, multiplier=2, primitives=plain.PRIMITIVES[:3]),
    ),
    "NAS-Bench-201": (plain.NASBench201Supernet(4, 1), NASBench201Supernet(4, 1)),
}


@pytest.mark.parametrize("name", SUPERNETS)
def test_plain_supernet_has_the_same_state(name: str) -> None:
    theirs, ours = (net.state_dict() for net in SUPERNETS[name])
    assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about torch's own code
@pytest.mark.parametrize(
    ("name", "graphs"),
    [("DARTS", 5), ("PC-DARTS", 6), ("NAS-Bench-201", 3)],
)
def test_equal_parts_of_a_supernet_share_a_compiled_graph(
    name: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile sees one graph for each shape, however many MixedOps or cells there are."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    variant = supernets.loss_on_a_batch(
        *(supernets.SPACES[name], "compiled channels_last", torch.float32, "cpu"),
        **{"batch": 2, "channels": 8, "cells": 3, "size": 16},
        theirs={"k": 4} if name == "PC-DARTS" else {},
    )
    variant.step()
    variant.step()
    assert len(seen) == graphs


def test_contest_measures_all_variants() -> None:
    state = plain.MixedOp(8, 1).state_dict()

    def build(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Variant:
        module.load_state_dict(state)
        return _mixed_op(module, dtype)

    variants = {"eager": build(plain.MixedOp(8, 1)), "fastnas": build(MixedOp(8, 1))}
    exact = {"eager": build(plain.MixedOp(8, 1), torch.float64), "fastnas": build(MixedOp(8, 1), torch.float64)}
    results = measure.contest(exact, variants, rounds=3, warmup=1, tolerance=1e-4)
    assert list(results) == ["eager", "fastnas"]
    for result in results.values():
        assert len(result.seconds) == 3
        assert min(result.seconds) > 0
        assert result.first > 0
        assert 0 < result.error < 1e-5
        assert 0 < result.gradient_error < 1e-4
        assert result.peak >= result.held > 0
    assert results["fastnas"].saved < results["eager"].saved / 2


@pytest.mark.parametrize("wrong", ["output", "gradient", "buffer"])
def test_contest_fails_where_variants_differ(wrong: str) -> None:
    def build(dtype: torch.dtype, factor: float) -> Variant:
        x = torch.linspace(-1, 1, 5, dtype=dtype).requires_grad_()
        buffer = torch.full((2,), factor if wrong == "buffer" else 1.0, dtype=dtype)
        output = factor if wrong == "output" else 1.0
        slope = factor if wrong == "gradient" else 1.0
        return Variant(
            lambda: x * slope + (x * (output - slope)).detach(), {"x": x}, {}, torch.ones_like(x), {"running": buffer}
        )

    def compete(**factors: float) -> None:
        exact = {"eager": build(torch.float64, 1.0), "fastnas": build(torch.float64, factors["exact"])}
        variants = {"eager": build(torch.float32, 1.0), "fastnas": build(torch.float32, factors["timed"])}
        measure.contest(exact, variants, rounds=1, warmup=0, tolerance=1e-5)

    compete(exact=1.0, timed=1.0)
    what, limit = ("gradient", "1.0e-03") if wrong == "gradient" else ("output", "1.0e-05")
    with pytest.raises(AssertionError, match=rf"fastnas: {what} error 2\.0e-03, which is more than {limit}"):
        compete(exact=1.0, timed=1.002)
    with pytest.raises(
        AssertionError, match=rf"fastnas in float64: {what} error 1\.0e-06, which is more than 1\.0e-09"
    ):
        compete(exact=1.000001, timed=1.0)


def test_rounds_are_taken_in_turn() -> None:
    calls: list[str] = []
    seconds = measure.in_turn([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(s) for s in seconds] == [3, 3]
    (slept,) = measure.in_turn([lambda: time.sleep(0.02)], rounds=2, warmup=0)
    assert min(slept) >= 0.02


def test_replay_tells_the_durations_again() -> None:
    measure.replay.load([0.25, 0.5])
    times = [measure.replay() for _ in range(4)]
    assert [times[1] - times[0], times[3] - times[2]] == [0.25, 0.5]
