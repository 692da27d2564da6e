"""All that a GPU is needed for, in a few minutes: ``python -m benchmarks.gpu``.

Builds fastnas, runs the tests that need a GPU, measures edges and supernets against plain PyTorch (eager, compiled,
replayed as a CUDA graph), what share of the device's copy bandwidth each kernel reaches, and runs some tests under
compute-sanitizer. Each part is a process of its own with a time limit, and the result is written after each: a part
that crashes the device or does not end takes nothing with it. All is float32, TF32 off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.facts import folder, hardware, machine, write

ROOT = Path(__file__).resolve().parents[1]

PARTS = {"build": 220.0, "tests": 80.0, "edges": 120.0, "kernels": 25.0, "supernets": 70.0, "sanitizer": 80.0}
"""The parts in order, with the most seconds that each may take. fastnas is imported in the measuring ones alone."""
TOTAL = 465.0  # less than their sum: a part seldom needs all of its own
MEASURED = ("edges", "kernels", "supernets")

# The tests that reach every kernel; racecheck slows each down a hundredfold.
SANITIZED = {
    "memcheck": "equals_the_reference or layouts or each_gradient_alone",
    "racecheck": "each_gradient_alone or one_launch",
}
FOUND = 86  # the exit code that compute-sanitizer is told to use for what it finds
REFUSED = re.compile(
    r"not supported|unsupported|unable to|failed to init|insufficient permission|terminated before", re.I
)


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (None where its time was up), seconds, and what it printed."""

    code: int | None
    seconds: float
    output: str

    def entry(self, **more: object) -> dict[str, Any]:
        """Returns it as a part of the result, with the end of the output where it failed."""
        status = "time up" if self.code is None else "failed" if self.code else "passed"
        found = {"status": status, "seconds": round(self.seconds, 1), **more}
        return found if found["status"] in ("passed", "clean") else {**found, "output": tail(self.output)}


def tail(text: str, lines: int = 15) -> list[str]:
    """Returns the last lines, without the folders of this machine."""
    for path, name in ((ROOT, "."), (sys.prefix, "<python>"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text.strip().splitlines()[-lines:]


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Done:
    """Runs a command in the root; kills it and all that it started when its time is up."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = None
    return Done(code, time.perf_counter() - start, output)


def build(device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Installs fastnas in place into the environment at hand; nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--editable", "."]
    return run(command, seconds, {"FASTNAS_CUDA": "1" if device == "cuda" else "0"}).entry()


def counts(output: str) -> dict[str, int]:
    """Returns what pytest's last line says: ``{"passed": 3, "skipped": 1}``."""
    last = ([""] + [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)])[-1]
    return {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", last)}


def tests(device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Runs the tests that need a GPU. Without one they are skipped, which passes only there."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    done = run([*command, "tests/ops/test_mixed_sum.py"] if quick else command, seconds)
    found = counts(done.output)
    if device == "cuda" and done.code == 0 and not found.get("passed"):
        return done.entry(status="failed", tests=found)
    return done.entry(tests=found)


def verdict(done: Done) -> str:
    """Returns what a run under compute-sanitizer comes to."""
    said = "\n".join(line for line in done.output.splitlines() if line.startswith("========="))
    if done.code is None:
        return "time up"
    if not counts(done.output) and REFUSED.search(said):
        return "refused"
    if done.code == FOUND:
        return "found errors"
    return "clean" if done.code == 0 and counts(done.output).get("passed") else "failed"


def sanitizer(device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Runs tests of the ops under compute-sanitizer; says so where there is none, or it refuses the device."""
    places = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if program is None:
        return {"status": "absent"}
    found: dict[str, Any] = {}
    for index, (tool, chosen) in enumerate(SANITIZED.items()):
        start = time.perf_counter()
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "pytest", "tests/ops"]
        command += ["-m", "cuda", "-k", chosen, "-x", "-q", "-p", "no:cacheprovider"]
        # torch's caching allocator hides what lies beyond a tensor
        done = run(command, seconds / (len(SANITIZED) - index), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        found[tool] = done.entry(status=verdict(done), tests=counts(done.output))
        seconds -= time.perf_counter() - start
    bad = {"found errors", "failed"} & {entry["status"] for entry in found.values()}
    return {"status": "failed" if bad else "done", **found}


class Session:
    """A measuring part: what it has found so far is on disk, and it starts nothing that its time does not allow."""

    def __init__(self, device: str, quick: bool, seconds: float, path: Path) -> None:
        from benchmarks.facts import facts

        self.device, self.quick, self.path = device, quick, path
        self.end = time.perf_counter() + seconds
        self.longest = 0.0
        self.result: dict[str, Any] = {"machine_info": facts(), "status": "passed", "groups": []}
        write(path, self.result)

    def measure(self, title: str, work: Callable[[], dict[str, Any]]) -> None:
        """Adds what ``work`` returns, or why it failed; leaves it out where it may not fit into the time."""
        start = time.perf_counter()
        if start + self.longest > self.end:
            self.result.setdefault("left_out", []).append(title)
            if self.result["status"] == "passed":
                self.result["status"] = "time up"
        else:
            try:
                found = work()
            except Exception as error:  # a group that fails is a finding, and the others may not
                found = {"status": "failed", "why": reason(error)}
            if "failed" in (found.get("status"), found.get("variants", {}).get("fastnas", {}).get("status")):
                self.result["status"] = "failed"
            seconds = time.perf_counter() - start
            self.longest = max(self.longest, seconds)
            self.result["groups"].append({"group": title, "seconds": round(seconds, 1), **found})
        write(self.path, self.result)


def reason(error: Exception) -> str:
    """Returns an error as a line."""
    return " ".join([f"{type(error).__name__}:", *tail(str(error), 4)])[:400]


def contest(
    make: Callable[[str, torch.dtype], Any], names: Sequence[str], *, rounds: int, tolerance: float, device: str
) -> dict[str, Any]:
    """Returns what was measured of each variant; one that cannot run, or computes something else, says why."""
    from benchmarks import measure

    truth = make("eager", torch.float64).outcome()
    measure.check("fastnas in float64", measure.errors(make("fastnas", torch.float64).outcome(), truth), (1e-9, 1e-9))
    variants, found = {}, {}
    for name in names:
        start = time.perf_counter()
        try:
            v = make(name, torch.float32)
            worst = measure.errors(v.outcome(), truth)
            measure.check(name, worst, (tolerance, 100 * tolerance))
            entry = {"first_seconds": time.perf_counter() - start, "error": worst[0], "gradient_error": worst[1]}
            if not name.startswith("graphed"):  # whose memory belongs to the graph
                entry["peak_bytes"], _ = measure.memory(v.step, device)
                entry["saved_bytes"] = measure.saved_bytes(v.forward, v.parameters.values())
        except Exception as error:
            found[name] = {"status": "failed", "why": reason(error)}
        else:
            variants[name], found[name] = v, {"status": "measured", **entry}
    times = measure.in_turn([v.step for v in variants.values()], rounds, 1 if rounds < 5 else 3, device)
    for name, seconds in zip(variants, times, strict=True):
        found[name] |= {"seconds": seconds, "median": statistics.median(seconds)}
    return {"variants": found}


def graphed(v: Any) -> Any:
    """Returns the variant whose step is a replay of ``v``'s as a CUDA graph."""
    from benchmarks.measure import Variant

    @dataclass(frozen=True)
    class Graphed(Variant):
        def step(self) -> tuple[Tensor, ...]:
            graph.replay()
            return results

    before = {name: t.clone() for name, t in v.buffers.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms and allocate outside of the graph
            v.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = v.step()
    for name, t in v.buffers.items():
        t.copy_(before[name])  # the warm-up has moved the running statistics
    return Graphed(v.forward, v.inputs, v.parameters, v.grad, v.buffers)


def variants(device: str, compiled: bool) -> list[str]:
    """Returns what is measured; CUDA graphs need CUDA."""
    names = ["fastnas", "eager", "eager channels_last"]
    if compiled:
        names.append("compiled channels_last")
    return names + (["graphed eager channels_last", "graphed fastnas"] if device == "cuda" else [])


def edges(session: Session) -> None:
    """Measures edges; two of them under torch.compile too, last, since autotuning takes a minute."""
    from benchmarks import test_mixed_op
    from benchmarks.edges import Shape, edge, title

    def make(shape: Shape) -> Callable[[str, torch.dtype], Any]:
        def one(name: str, dtype: torch.dtype) -> Any:
            plain_name = name.removeprefix("graphed ")
            mode = "max-autotune" if name.startswith("compiled") else None
            v = edge(shape, plain_name, dtype, session.device, mode)
            return graphed(v) if plain_name != name else v

        return one

    shapes = test_mixed_op.QUICK[:1] if session.quick else test_mixed_op.SHAPES
    todo = [(shape, False) for shape in shapes]
    if not session.quick:
        todo += [(shape, True) for shape in (shapes[0], shapes[-1])]
    for shape, compiled in todo:
        names = variants(session.device, compiled)
        options = {"rounds": 2 if session.quick else 50, "tolerance": 1e-4, "device": session.device}
        session.measure(
            title(shape) + (", max-autotune" if compiled else ""),
            lambda shape=shape, names=names, options=options: contest(make(shape), names, **options),
        )


def supernets(session: Session) -> None:
    """Measures supernets, eager and as CUDA graphs."""
    from benchmarks import test_supernet
    from benchmarks.supernets import SPACES, loss_on_a_batch

    def make(shape: tuple[Any, ...]) -> Callable[[str, torch.dtype], Any]:
        space, batch, channels, cells, size, k = shape
        sizes = {"batch": batch, "channels": channels, "cells": cells, "size": size}
        options = {"k": k} if k > 1 else {}

        def one(name: str, dtype: torch.dtype) -> Any:
            plain_name = name.removeprefix("graphed ")
            v = loss_on_a_batch(
                *(SPACES[space], plain_name, dtype, session.device), **sizes, ours=options, theirs=options
            )
            return graphed(v) if plain_name != name else v

        return one

    for shape in test_supernet.QUICK[:1] if session.quick else test_supernet.SHAPES:
        names = variants(session.device, compiled=False)
        options = {"rounds": 2 if session.quick else 10, "tolerance": 1e-3, "device": session.device}
        session.measure(
            test_supernet.title(shape),
            lambda shape=shape, names=names, options=options: contest(make(shape), names, **options),
        )


def copy_bandwidth(device: str, size: int) -> float:
    """Returns bytes read and written a second by a copy of ``size`` bytes."""
    from benchmarks.measure import in_turn

    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    (seconds,) = in_turn([lambda: target.copy_(source)], 10, 3, device)
    return 2 * size / statistics.median(seconds)


def stem(kernel: str) -> str | None:
    """Returns ``sum`` for ``void fastnas::cuda::...::sum_kernel<float, 4>(...)``; None for kernels of others."""
    found = re.search(r"\bfastnas::.*?(\w+)_kernel\b", kernel)
    return found[1] if found else None


def attribute(
    kernels: Mapping[str, tuple[int, float]], counters: Mapping[str, tuple[int, int]], bandwidth: float
) -> dict[str, Any]:
    """Returns each counter with its kernel's time, and the share of ``bandwidth`` that its bytes a second are.

    Maps that stay in the device's cache from one kernel to the next can make a share larger than 1.

    A counter's name has all words of its kernel's, and the kernel was launched as often. Where a kernel serves several
    counters, or a name says nothing, both are listed without the other.

    Args:
        kernels: launches and seconds, by stem.
        counters: launches and bytes, by name.
        bandwidth: bytes a second.
    """
    rows, free = [], dict(kernels)
    for name, (launches, size) in sorted(counters.items(), key=lambda item: -item[1][1]):
        words = set(name.split("_"))
        fitting = [k for k, (n, _) in free.items() if n == launches and set(k.split("_")) <= words]
        row: dict[str, Any] = {"counter": name, "launches": launches, "bytes": size}
        if fitting:
            kernel = max(fitting, key=lambda k: (len(k.split("_")), k))
            seconds = free.pop(kernel)[1]
            row |= {"kernel": kernel, "seconds": seconds, "share": size / seconds / bandwidth}
        rows.append(row)
    size, seconds = sum(n for _, n in counters.values()), sum(t for _, t in kernels.values())
    return {
        "kernels": rows,
        "kernels_without_counter": {k: {"launches": n, "seconds": t} for k, (n, t) in free.items()},
        "bytes": size,
        "kernel_seconds": seconds,
        "share": size / seconds / bandwidth if seconds else None,
    }


def profiled(step: Callable[[], object], steps: int) -> dict[str, tuple[int, float]]:
    """Returns launches and seconds of fastnas' kernels on the device, by stem."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as place:
        trace = Path(place, "trace.json")
        watch.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        name = stem(event.get("name", "")) if event.get("cat") == "kernel" else None
        if name is not None:
            launches, seconds = found.get(name, (0, 0.0))
            found[name] = launches + 1, seconds + event["dur"] * 1e-6
    return found


def kernels(session: Session) -> None:
    """Measures what share of the copy bandwidth the kernels of an edge reach; on the CPU, the whole step."""
    from benchmarks import test_mixed_op
    from benchmarks.edges import Shape, edge, title
    from benchmarks.measure import in_turn
    from fastnas import _C

    size = 2**20 if session.quick else 2**30 if session.device == "cuda" else 2**28
    bandwidth = copy_bandwidth(session.device, size)
    session.result["copy_bytes_per_second"] = bandwidth
    steps = 2 if session.quick else 20

    def one(shape: Shape) -> dict[str, Any]:
        v = edge(shape, "fastnas", torch.float32, session.device)
        (seconds,) = in_turn([v.step], steps, 3, session.device)
        _C.reset_counters()
        if session.device == "cuda":
            found = profiled(v.step, steps)
        else:
            found = {}
            for _ in range(steps):
                v.step()
        result = attribute(found, _C.counters(), bandwidth)
        whole = result["bytes"] / steps / statistics.median(seconds) / bandwidth
        return {"steps": steps, **result, "step_seconds": statistics.median(seconds), "share_of_step": whole}

    for shape in test_mixed_op.QUICK[:1] if session.quick else test_mixed_op.SHAPES:
        session.measure(title(shape), lambda shape=shape: one(shape))


def measured(part: str, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Runs a measuring part in a process of its own; returns what it had found by the end of its time."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "part.json")
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", part, "--device", device, "--json", str(path)]
        # what is left of its time when it starts no more groups is for the one under way
        done = run([*command, "--seconds", str(0.9 * seconds), *(["--quick"] if quick else [])], seconds)
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if done.code == 0:
        return {**found, "seconds": round(done.seconds, 1)}
    return {**found, **done.entry()}


def child(part: str, device: str, quick: bool, seconds: float, path: Path) -> None:
    """Measures one part in this process."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    {"edges": edges, "kernels": kernels, "supernets": supernets}[part](Session(device, quick, seconds, path))


def summary(report: Mapping[str, Any]) -> list[str]:
    """Returns a few lines a part."""
    lines = []
    for name, part in report["parts"].items():
        lines.append(f"{name}: {part.get('status', '')} {part.get('tests', '')}".rstrip())
        if name == "sanitizer":
            lines += [f"  {tool}: {found['status']}" for tool, found in part.items() if tool in SANITIZED]
        for group in part.get("groups", []):
            share = group.get("share") or group.get("share_of_step")
            note = f": {share:.0%} of the copy bandwidth" if share else f": {group['why']}" if "why" in group else ""
            lines.append(f"  {group['group']}{note}")
            ours = group.get("variants", {}).get("fastnas", {}).get("median")
            for variant, found in group.get("variants", {}).items():
                times = f", {found['median'] / ours:.2f} x" if ours and "median" in found else ""
                what = f"{found['median'] * 1e3:9.3f} ms{times}" if "median" in found else found["why"]
                lines.append(f"    {variant:30}{what}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts and writes the result after each; returns 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a check of this script")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all, in order")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"of all parts; default: {TOTAL:.0f}")
    parser.add_argument("--json", type=Path, default=folder() / f"gpu-{machine()}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a check, and numbers of no worth")
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand, or this torch has no CUDA: --device cpu --quick checks the script without one")
    if options.child:
        child(options.child, options.device, options.quick, options.seconds, options.json)
        return 0
    end = time.perf_counter() + options.seconds
    report: dict[str, Any] = {"machine_info": hardware(), "device": options.device, "quick": options.quick, "parts": {}}
    commands = {"build": build, "tests": tests, "sanitizer": sanitizer}
    for part, limit in PARTS.items():
        if part not in options.parts:
            continue
        seconds = min(limit * options.seconds / TOTAL, end - time.perf_counter())
        if seconds <= 0:
            found: dict[str, Any] = {"status": "time up"}
        elif part in commands:
            found = commands[part](options.device, options.quick, seconds)
        else:
            found = measured(part, options.device, options.quick, seconds)
            report["machine_info"] = found.pop("machine_info", report["machine_info"])
        report["parts"][part] = found
        write(options.json, report)
        print(f"{part}: {found.get('status', 'done')}", flush=True)
    print("\n".join(["", *summary(report), str(options.json)]))
    return int(any(part.get("status") == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
