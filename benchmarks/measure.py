"""Time, memory and agreement of things that compute the same.

The rules behind every published number: all variants in one process; outputs, gradients and running statistics compared
with plain PyTorch in float64 before anything is timed, ours in float64 too; warm-up; rounds in turn (a, b, c, a, b, c,
...), so that whatever the machine does hits all alike; median and interquartile range; on CUDA the device is waited for
inside the timed region.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from fastnas import _C

MIB = 2**20


@dataclass(frozen=True)
class Variant:
    """One way to compute something, forward and backward.

    Attributes:
        forward: returns the output.
        inputs: activations, by name; gradients are taken with respect to these and to the parameters.
        parameters: by name; these are in memory whether autograd saves them or not.
        grad: of the output.
        buffers: what the forward updates, by name; compared as well.
    """

    forward: Callable[[], Tensor]
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    grad: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def step(self) -> tuple[Tensor, ...]:
        """Returns the output and the gradients."""
        y = self.forward()
        return y, *torch.autograd.grad(y, (*self.inputs.values(), *self.parameters.values()), self.grad)

    def outcome(self) -> dict[str, Tensor]:
        """Returns everything that a step computes, by name."""
        y, *grads = self.step()
        names = [f"gradient of {name}" for name in (*self.inputs, *self.parameters)]
        named = dict(zip(names, grads, strict=True))
        return {name: t.detach().double() for name, t in {"output": y, **named, **self.buffers}.items()}


@dataclass(frozen=True)
class Result:
    """What was measured of one variant: seconds of its first step and of each round, bytes, and its largest errors."""

    first: float
    seconds: list[float]
    peak: int
    held: int
    saved: int
    error: float  # of the output and the buffers
    gradient_error: float


class Replay:
    """A timer that tells durations which were measured before.

    pytest-benchmark times one function after the other. The rounds here are taken in turn, so they are measured first
    and then told to pytest-benchmark through this.
    """

    __name__ = "interleaved_perf_counter"

    def __init__(self) -> None:
        self._times: list[float] = []

    def load(self, seconds: Iterable[float]) -> None:
        """Makes the next pairs of calls differ by these durations."""
        self._times = [t for s in seconds for t in (0.0, s)][::-1]

    def __call__(self) -> float:
        return self._times.pop()


replay = Replay()


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
    """Returns the largest ``‖got - expected‖ / ‖expected‖`` (‖got‖ where 0 is expected): of gradients, and of the rest.

    Raises:
        AssertionError: where names or shapes differ.
    """
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    rest = gradients = 0.0
    for name, reference in expected.items():
        assert got[name].shape == reference.shape, f"{name}: {got[name].shape} and {reference.shape}"
        difference = (got[name] - reference).norm() / (reference.norm() or 1.0)
        found = float("inf") if difference.isnan() else difference.item()
        if name.startswith("gradient of "):
            gradients = max(gradients, found)
        else:
            rest = max(rest, found)
    return rest, gradients


def saved_bytes(forward: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Returns the bytes that autograd saves for backward: distinct storages, without those of ``besides``."""
    known = {t.untyped_storage().data_ptr() for t in besides}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        t = t.detach()  # an output of the node that saves it would keep the node, and itself, alive for ever
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # kept alive, and so all that is saved: no address can come twice
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)
    del result
    return total


def memory(run: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Returns (peak, held): the most bytes that were allocated during ``run``, and those when it has returned.

    Both are relative to before; the result of ``run`` counts as held. On the CPU torch's allocator is watched, inside
    operators too, and all that fastnas' own arena ever took is added to the peak, as if it were taken at that moment.
    Memory that other libraries take from elsewhere is not seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return peak, held
    limit, lent = _C.arena()["limit"], _C.arena()["lent"]
    _C.arena_set_limit(0)  # empties it
    _C.arena_set_limit(limit)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watch:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        watch.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    arena = _C.arena()
    del result
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["args"]["Ev Idx"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak + arena["kept"] + arena["lent"] - lent, live + arena["lent"] - lent


def in_turn(steps: Sequence[Callable[[], object]], rounds: int, warmup: int, device: str = "cpu") -> list[list[float]]:
    """Returns seconds, one list a step and one entry a round; in each round every step runs once."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds: list[list[float]] = [[] for _ in steps]
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            for times, step in zip(seconds, steps, strict=True):
                wait()
                start = time.perf_counter()
                result = step()
                wait()
                end = time.perf_counter()
                del result
                if index >= warmup:
                    times.append(end - start)
    finally:
        if enabled:
            gc.enable()
    return seconds


def check(name: str, found: tuple[float, float], allowed: tuple[float, float]) -> None:
    for what, worst, limit in zip(("output", "gradient"), found, allowed, strict=True):
        assert worst <= limit, f"{name}: {what} error {worst:.1e}, which is more than {limit:.1e}"


def contest(
    exact: Mapping[str, Variant],
    variants: Mapping[str, Variant],
    *,
    rounds: int,
    warmup: int,
    tolerance: float,
    device: str = "cpu",
) -> dict[str, Result]:
    """Returns what was measured of each of ``variants``.

    Args:
        exact: variants in float64. "eager" is the truth, the others must agree with it to 1e-9.
        variants: as they are timed, by name.
        rounds: how often each is timed.
        warmup: rounds that are not counted.
        tolerance: the largest error of outputs and buffers. Gradients may have 100 times that: where a ReLU's input is
            almost 0, rounding decides whether it passes a gradient, for every variant differently.
        device: "cpu" or "cuda".

    Raises:
        AssertionError: where a variant's output, gradients or buffers differ from the truth by more.
    """
    truth = exact["eager"].outcome()
    for name, v in exact.items():
        if name != "eager":
            check(f"{name} in float64", errors(v.outcome(), truth), (1e-9, 1e-9))
    found, first = {}, {}
    for name, v in variants.items():
        start = time.perf_counter()
        outcome = v.outcome()
        first[name] = time.perf_counter() - start
        found[name] = errors(outcome, truth)
        del outcome
    del truth
    for name, worst in found.items():
        check(name, worst, (tolerance, 100 * tolerance))
    sizes = {}
    for name, v in variants.items():
        peak, _ = memory(v.step, device)
        _, held = memory(v.forward, device)
        sizes[name] = {"peak": peak, "held": held, "saved": saved_bytes(v.forward, v.parameters.values())}
    times = in_turn([v.step for v in variants.values()], rounds, warmup, device)
    return {
        name: Result(first[name], seconds, error=found[name][0], gradient_error=found[name][1], **sizes[name])
        for name, seconds in zip(variants, times, strict=True)
    }
