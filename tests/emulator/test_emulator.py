"""The emulator finds what it says it finds, and nothing where nothing is wrong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import libraries
import pytest

SOURCE = Path(__file__).with_name("selftest.cu")


def run(case: str, form: str, sanitize: bool = False, seed: int | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("FASTNAS_EMULATOR_SEED", "LD_PRELOAD")}
    if seed is not None:
        env["FASTNAS_EMULATOR_SEED"] = str(seed)
    program = libraries.build_program(SOURCE, sanitize)
    return subprocess.run([program, case, form], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "case", ["race", "diverge", "bounds", "shared_bounds", "blocks", "unwritten", "shuffles", "sums", "grid"]
)
@pytest.mark.parametrize("seed", [None, 1])
def test_correct_kernels_pass(case: str, seed: int | None) -> None:
    done = run(case, "correct", seed=seed)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr


@pytest.mark.parametrize("case", ["race", "blocks"])
def test_shuffled_order_shows_races(case: str) -> None:
    wrong = [int(run(case, "planted", seed=seed).stdout.split()[0]) for seed in range(3)]
    assert all(wrong)


def test_divergent_barrier_is_reported() -> None:
    done = run("diverge", "planted")
    assert done.returncode == 1
    assert "block (0, 0, 0) is stuck: 7 threads at __syncthreads, 25 at a warp primitive, 32 returned" in done.stdout


def test_unwritten_shared_memory_is_nan() -> None:
    assert run("unwritten", "planted").stdout == "32 wrong\n"


def test_impossible_grid_names_the_kernel() -> None:
    done = run("grid", "planted")
    assert (done.returncode, done.stdout) == (1, "selftest: invalid configuration argument\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind"), [("bounds", "heap-buffer-overflow"), ("shared_bounds", "global-buffer-overflow")]
)
def test_sanitizer_finds_accesses_out_of_bounds(case: str, kind: str) -> None:
    done = run(case, "planted", sanitize=True)
    assert done.returncode != 0
    assert kind in done.stderr or "out of bounds" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ["race", "diverge", "bounds", "shared_bounds", "sums"])
def test_sanitizer_accepts_correct_kernels(case: str) -> None:
    done = run(case, "correct", sanitize=True, seed=2)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr
