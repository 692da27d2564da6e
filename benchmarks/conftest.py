"""Options, the contest of each group, and the table."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.facts import facts
from benchmarks.measure import MIB, Result, Variant, contest, replay

VARIANTS = ("fastnas", "eager", "eager channels_last", "compiled channels_last")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastnas benchmarks")
    group.addoption(
        "--compile",
        default="none",
        choices=["none", "ops", "all"],
        help="Also measure plain PyTorch under torch.compile: nothing of it, all but the supernets (minutes), or those "
        "too, a MixedOp or a cell at a time (some minutes more for each). (default: none)",
    )
    group.addoption("--quick", action="store_true", help="Tiny shapes and few rounds: checks, and numbers of no worth.")
    group.addoption("--rounds", type=int, help="Rounds of every group, instead of each group's own number.")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="Where to run. (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--compile") != "none":  # torch.compile warns about torch's own code
        config.addinivalue_line("filterwarnings", "default")


def variants(config: pytest.Config, module: Any) -> list[str]:
    """Returns the names of the variants that a benchmark file measures."""
    compiled = {"none": False, "ops": not getattr(module, "SLOW_TO_COMPILE", False), "all": True}
    return [v for v in VARIANTS if compiled[config.getoption("--compile")] or not v.startswith("compiled")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", variants(metafunc.config, metafunc.module))
    if "shape" in metafunc.fixturenames:
        shapes = metafunc.module.QUICK if metafunc.config.getoption("--quick") else metafunc.module.SHAPES
        metafunc.parametrize("shape", shapes, ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _cold_compiler(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile times are those of a first compilation, whatever earlier runs have left in a cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def _results() -> dict[str, dict[str, Result]]:
    return {}


@pytest.fixture
def compete(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    device: str,
    variant: str,
    _results: dict[str, dict[str, Result]],
) -> Callable[..., None]:
    """Reports one variant of a group; the first call of a group measures all of its variants.

    ``region`` says what torch.compile was given at a time.
    """

    def run(
        group: str,
        build: Callable[[str, torch.dtype], Variant],
        *,
        rounds: int,
        tolerance: float = 1e-4,
        region: str = "all of it",
    ) -> None:
        config = request.config
        quick = config.getoption("--quick")
        if group not in _results:
            torch._dynamo.reset()  # the graphs of earlier groups, whose guards would be tried first
            _results[group] = contest(
                {name: build(name, torch.float64) for name in ("eager", "fastnas")},
                {name: build(name, torch.float32) for name in variants(config, request.module)},
                rounds=config.getoption("--rounds") or (3 if quick else rounds),
                warmup=1 if quick else 3,
                tolerance=tolerance,
                device=device,
            )
        result = _results[group][variant]
        benchmark.group = group
        benchmark.extra_info.update(
            variant=variant,
            device=device,
            peak_bytes=result.peak,
            held_bytes=result.held,
            saved_bytes=result.saved,
            error=result.error,
            gradient_error=result.gradient_error,
            interleaved=True,
            quick=quick,
        )
        if variant.startswith("compiled"):
            benchmark.extra_info.update(compile_seconds=result.first, compiled_region=region)
        replay.load(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds))

    return run


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return facts()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = defaultdict(list)
    for bench in session.benchmarks if session else []:
        if bench and "variant" in bench.extra_info and not bench.has_error:
            groups[bench.group].append(bench)
    if not groups:
        return
    terminalreporter.section("fastnas and plain PyTorch, forward + backward")
    for name, value in facts().items():
        terminalreporter.write_line(f"{name:10} {value}")
    columns = ("median ms", 10), ("IQR ms", 9), ("x time", 8), ("peak MiB", 10), ("saved MiB", 11), ("x saved", 9)
    header = " " * 26 + "".join(
        f"{name:>{width}}" for name, width in (*columns, ("error", 9), ("of grads", 9), ("compile s", 11))
    )
    for group, benches in groups.items():
        terminalreporter.write_line(f"\n{group} ({benches[0].stats.rounds} rounds)\n{header}")
        ours = next((b for b in benches if b.extra_info["variant"] == "fastnas"), None)
        for b in benches:
            info, stats = b.extra_info, b.stats
            base = ours.extra_info["saved_bytes"] if ours else 0
            slower = f"{stats.median / ours.stats.median:.2f}" if ours else "-"
            larger = f"{info['saved_bytes'] / base:.2f}" if base else "-"
            terminalreporter.write_line(
                f"  {info['variant']:24}{stats.median * 1e3:10.2f}{stats.iqr * 1e3:9.2f}{slower:>8}"
                f"{info['peak_bytes'] / MIB:10.1f}{info['saved_bytes'] / MIB:11.2f}{larger:>9}"
                f"{info['error']:9.0e}{info['gradient_error']:9.0e}"
                + (f"{info['compile_seconds']:11.1f}" if "compile_seconds" in info else "")
            )
    terminalreporter.write_line(
        "\nx time, x saved: times fastnas' own; above 1, fastnas is faster, or saves fewer bytes for backward"
    )
