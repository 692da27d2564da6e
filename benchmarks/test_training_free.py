"""A training-free search by SynFlow: weights drawn, α drawn, scored, derived.

The reference evaluates every candidate by itself in plain PyTorch and in float64, which the range of R asks for; at
ImageNet's size, that needs more memory than the machine has. Cold is the first search of a process, the supernet's
construction included and the import not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import plain
from benchmarks.measure import in_turn, memory, replay, saved_bytes
from fastnas.saliency import Batch, FreeDarts
from fastnas.spaces import get_space

pytestmark = pytest.mark.benchmark(timer=replay)

# space, C, cells (of a stage in nb201), H = W, stem
SHAPES = [
    ("nb201", 16, 5, 32, "cifar"),
    ("darts", 16, 8, 32, "cifar"),
    ("darts", 16, 20, 32, "cifar"),
    ("darts", 48, 14, 224, "imagenet"),
]
QUICK = [("nb201", 4, 1, 8, "cifar"), ("darts", 4, 3, 8, "cifar")]
Shape = tuple[str, int, int, int, str]
NAMES = {"nb201": "NAS-Bench-201", "darts": "DARTS"}
SEARCHERS = ("fastnas", "eager float64")

COLD = """
import time, torch
from fastnas.saliency import Batch, FreeDarts
from fastnas.spaces import get_space
torch.set_num_threads({threads})
batch = Batch(torch.zeros(1, 3, {size}, {size}, device={device!r}), torch.zeros(1, dtype=torch.int64))
start = time.perf_counter()
FreeDarts(get_space({space!r}), device={device!r}, **{options!r}).search(0, batch)
print(time.perf_counter() - start)
"""


def title(shape: Shape) -> str:
    space, channels, cells, size, _ = shape
    what = f"3 x {cells} cells" if space == "nb201" else f"{cells} cells"
    return f"SynFlow search, {NAMES[space]}, C {channels}, {what}, {size}x{size}"


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, Any]]]:
    return {}


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_search(
    shape: Shape,
    searcher: str,
    device: str,
    measured: dict[str, dict[str, dict[str, Any]]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    quick = request.config.getoption("--quick")
    group = title(shape)
    if group not in measured:
        rounds = request.config.getoption("--rounds") or (3 if quick else 9)
        measured[group] = measure(shape, device, rounds, warmup=1 if quick else 2)
    if searcher not in measured[group]:
        pytest.skip("needs more memory than the machine has")
    result = measured[group][searcher]
    benchmark.group = group
    benchmark.extra_info.update(
        {k: v for k, v in result.items() if k != "seconds"},
        variant=searcher,
        device=device,
        held_bytes=0,
        interleaved=True,
        quick=quick,
    )
    replay.load(result["seconds"])
    benchmark.pedantic(lambda: None, rounds=len(result["seconds"]))


def measure(shape: Shape, device: str, rounds: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Returns what was measured of each searcher, after comparing their scores."""
    space_name, channels, cells, size, stem = shape
    space = get_space(space_name)
    options = {"channels": channels, "layers": cells} | ({"stem": stem} if space_name == "darts" else {})
    image = torch.zeros(1, 3, size, size, device=device)
    batch = Batch(image, torch.zeros(1, dtype=torch.int64, device=device))
    ours = FreeDarts(space, device=device, **options)
    seeds = iter(range(1, 1_000_000))

    def search() -> object:
        return ours.search(next(seeds), batch).genotype

    ours_alone = {"error": 0.0, "gradient_error": 0.0, "cold_seconds": cold(space_name, size, options, device)}
    if stem == "imagenet":
        (seconds,) = in_turn([search], rounds, warmup, device)
        return {"fastnas": {**ours_alone, **bytes_of(search, ours.supernet, device), "seconds": seconds}}
    other = plain.NASBench201Supernet(channels, cells) if space_name == "nb201" else plain.Supernet(channels, cells)
    other = other.to(device)
    found = ours.search(0, batch)
    other.load_state_dict(ours.supernet.state_dict())
    theirs = plain.SynFlow(other)

    def score(alphas: dict[str, Tensor]) -> dict[str, Tensor]:
        r, scores = theirs(alphas.get("cell", alphas), image)
        return {t: s / r for t, s in zip(alphas, scores, strict=True)}

    truth = score(found.alphas)
    error = max(float((found.scores[t] - s).norm() / s.norm()) for t, s in truth.items())
    worst = max(float((found.scores[t] / s - 1)[s > 0].abs().max()) for t, s in truth.items())
    assert worst <= 1e-5, f"{title(shape)}: a score's error is {worst:.1e}"
    assert space.derive(truth) == found.genotype

    def search_plainly() -> object:
        theirs.draw()
        generator = torch.Generator().manual_seed(next(seeds))
        return space.derive(score({t: a.detach() for t, a in space.init_alphas(generator, device=device).items()}))

    ours_seconds, plain_seconds = in_turn([search, search_plainly], rounds, warmup, device)
    return {
        "fastnas": {
            **ours_alone,
            **bytes_of(search, ours.supernet, device),
            "error": error,
            "gradient_error": worst,
            "seconds": ours_seconds,
        },
        "eager float64": {
            "error": 0.0,
            "gradient_error": 0.0,
            **bytes_of(search_plainly, theirs.net, device),
            "seconds": plain_seconds,
        },
    }


def bytes_of(step: Callable[[], object], net: torch.nn.Module, device: str) -> dict[str, int]:
    return {"peak_bytes": memory(step, device)[0], "saved_bytes": saved_bytes(step, list(net.parameters()))}


def cold(space: str, size: int, options: dict[str, object], device: str) -> float:
    """Returns the seconds of a fresh process' first search."""
    code = COLD.format(threads=torch.get_num_threads(), size=size, space=space, options=options, device=device)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)
