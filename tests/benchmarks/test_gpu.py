"""The script for GPU machines, as far as it can be held without one: its logic, and all of its parts on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fastnas import _C

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from benchmarks import edges, gpu, measure  # noqa: E402
from benchmarks.measure import Variant  # noqa: E402


def test_a_command_and_its_children_are_killed_when_their_time_is_up() -> None:
    done = gpu.run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 1.0)
    assert done.code is None
    assert done.seconds < 30
    assert done.entry()["status"] == "time up"
    assert done.entry()["output"] == ["begun"]


def test_what_a_command_says_when_it_fails_names_no_folder_of_the_machine() -> None:
    done = gpu.run(["sh", "-c", f"echo in {ROOT}/csrc; echo $WORD; exit 3"], 60, {"WORD": "given"})
    assert done.code == 3
    assert done.entry(more=1) == {
        "status": "failed",
        "seconds": round(done.seconds, 1),
        "more": 1,
        "output": ["in ./csrc", "given"],
    }
    assert gpu.run(["true"], 60).entry().keys() == {"status", "seconds"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("....\n3 passed in 2.36s\n", {"passed": 3}),
        ("1 failed, 2 passed, 4 deselected in 0.01s", {"failed": 1, "passed": 2, "deselected": 4}),
        ("1 passed, 2 errors in 61.20s (0:01:01)", {"passed": 1, "errors": 2}),
        ("Segmentation fault", {}),
    ],
)
def test_counts(output: str, expected: dict[str, int]) -> None:
    assert gpu.counts(output) == expected


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "2 passed in 1.0s\n========= ERROR SUMMARY: 0 errors", "clean"),
        (gpu.FOUND, "2 passed in 1.0s\n========= ERROR SUMMARY: 3 errors", "found errors"),
        (gpu.FOUND, "========= Invalid __global__ read of size 4 bytes", "found errors"),
        (1, "1 failed in 1.0s\n========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "========= Error: Device not supported. Please refer to the documentation", "refused"),
        (255, "========= Error: Target application terminated before first instrumented API call", "refused"),
        (0, "3 deselected in 0.1s", "failed"),
        (None, "========= COMPUTE-SANITIZER", "time up"),
    ],
)
def test_verdict(code: int | None, output: str, expected: str) -> None:
    assert gpu.verdict(gpu.Done(code, 1.0, output)) == expected


@pytest.mark.parametrize(
    ("script", "statuses", "whole"),
    [
        ("echo '========= Error: Device not supported'; exit 1", ("refused", "refused"), "done"),
        ("echo '2 passed in 0.10s'", ("clean", "clean"), "done"),
        (
            '[ "$2" = memcheck ] && { echo "2 passed in 0.10s"; exit 0; }; exit 86',
            ("clean", "found errors"),
            "failed",
        ),
        ('[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 86; echo "1 passed in 0.1s"', ("clean", "clean"), "done"),
    ],
)
def test_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, statuses: tuple[str, str], whole: str
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu.sanitizer("cuda", True, 60)
    assert tuple(found[tool]["status"] for tool in ("memcheck", "racecheck")) == statuses
    assert found["status"] == whole


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.sanitizer("cuda", True, 60) == {"status": "absent"}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void fastnas::cuda::(anonymous namespace)::sum_kernel<float, 4>(fastnas::MixedOp)", "sum"),
        ("void fastnas::cuda::mixed_sum_backward_kernel<double, 1>(fastnas::Args<8>)", "mixed_sum_backward"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)", None),
        ("Memcpy DtoD (Device -> Device)", None),
    ],
)
def test_stem(kernel: str, expected: str | None) -> None:
    assert gpu.stem(kernel) == expected


def test_kernels_are_attributed_to_counters() -> None:
    kernels = {"sum": (10, 2.0), "sum_backward_reduce": (10, 4.0), "pointwise_backward": (20, 1.0), "shared": (30, 8.0)}
    counters = {
        "mixed_op_sum": (10, 100),
        "mixed_op_sum_backward_reduce": (10, 400),
        "mixed_op_stages_backward_pointwise": (20, 50),
        "mixed_op_shared_x": (10, 30),  # one kernel serves both
        "mixed_op_shared_y": (20, 60),
    }
    found = gpu.attribute(kernels, counters, bandwidth=200.0)
    rows = {row["counter"]: row for row in found["kernels"]}
    assert rows["mixed_op_sum"] == {
        **{"counter": "mixed_op_sum", "launches": 10, "bytes": 100},
        **{"kernel": "sum", "seconds": 2.0, "share": 0.25},
    }
    assert rows["mixed_op_sum_backward_reduce"]["kernel"] == "sum_backward_reduce"
    assert rows["mixed_op_stages_backward_pointwise"]["kernel"] == "pointwise_backward"
    assert "kernel" not in rows["mixed_op_shared_x"]
    assert "kernel" not in rows["mixed_op_shared_y"]
    assert found["kernels_without_counter"] == {"shared": {"launches": 30, "seconds": 8.0}}
    assert found["share"] == pytest.approx(640 / 15 / 200)
    assert gpu.attribute({}, counters, 200.0)["share"] is None


def test_groups_that_fail_or_do_not_fit_are_recorded(tmp_path: Path) -> None:
    session = gpu.Session("cpu", True, 60, tmp_path / "part.json")
    session.measure("first", lambda: {"value": 1})
    session.measure("second", lambda: {}["gone"])
    read = json.loads((tmp_path / "part.json").read_text())
    assert read["machine_info"]["torch"] == torch.__version__
    assert [group["group"] for group in read["groups"]] == ["first", "second"]
    assert read["groups"][0]["value"] == 1
    assert read["groups"][1]["why"] == "KeyError: 'gone'"
    assert read["status"] == "failed"
    session.longest = 100.0
    session.measure("third", lambda: {"value": 3})
    assert json.loads((tmp_path / "part.json").read_text())["left_out"] == ["third"]


@pytest.mark.parametrize(
    ("variants", "seconds", "expected"),
    [
        ({"fastnas": {"status": "measured"}, "eager": {"status": "failed"}}, 60, "passed"),
        ({"fastnas": {"status": "failed"}, "eager": {"status": "measured"}}, 60, "failed"),
        ({}, -1, "time up"),
    ],
)
def test_status_of_a_measuring_part(tmp_path: Path, variants: dict[str, object], seconds: float, expected: str) -> None:
    session = gpu.Session("cpu", True, seconds, tmp_path / "part.json")
    session.measure("group", lambda: {"variants": variants})
    assert session.result["status"] == expected


@pytest.mark.parametrize(
    ("device", "line", "expected"),
    [
        ("cuda", "3 passed, 1 skipped in 1.0s", "passed"),
        ("cuda", "4 skipped in 1.0s", "failed"),
        ("cpu", "4 skipped in 1.0s", "passed"),
    ],
)
def test_skipped_tests_pass_only_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, line: str, expected: str
) -> None:
    monkeypatch.setattr(gpu, "run", lambda command, seconds: gpu.Done(0, 1.0, line))
    assert gpu.tests(device, False, 60)["status"] == expected


def test_a_variant_that_cannot_run_or_is_wrong_is_not_timed() -> None:
    def make(name: str, dtype: torch.dtype) -> Variant:
        if name == "broken":
            raise RuntimeError("no such thing")
        x = torch.linspace(-1, 1, 5, dtype=dtype).requires_grad_()
        factor = 1.1 if name == "wrong" else 1.0
        return Variant(lambda: x * factor, {"x": x}, {}, torch.ones_like(x))

    names = ["fastnas", "broken", "wrong"]
    found = gpu.contest(make, names, rounds=2, tolerance=1e-4, device="cpu")["variants"]
    assert found["fastnas"]["status"] == "measured"
    assert len(found["fastnas"]["seconds"]) == 2
    assert found["broken"] == {"status": "failed", "why": "RuntimeError: no such thing"}
    assert found["wrong"]["why"].startswith("AssertionError: wrong: output error 1.0e-01")
    assert "median" not in found["wrong"]


def test_a_part_whose_time_is_up_leaves_the_rest_alone() -> None:
    found = gpu.measured("edges", "cpu", True, 0.2)
    assert found["status"] == "time up"


def test_no_gpu_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is at hand" in capsys.readouterr().err


@pytest.mark.slow
def test_all_parts_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    parts = ["tests", "edges", "kernels", "supernets"]
    assert gpu.main(["--device", "cpu", "--quick", "--json", str(path), "--parts", *parts, "--seconds", "6000"]) == 0
    report = json.loads(path.read_text())
    assert list(report["parts"]) == parts
    assert report["machine_info"]["cpu_isa"] == _C.build_info()["cpu_isa"]
    assert report["parts"]["tests"]["tests"]["skipped"] > 0
    for part in ("edges", "supernets"):
        (group,) = report["parts"][part]["groups"]
        assert group["variants"].keys() == {"fastnas", "eager", "eager channels_last"}
        for found in group["variants"].values():
            assert found["status"] == "measured"
            assert found["median"] > 0
            assert found["peak_bytes"] > 0
        assert group["variants"]["fastnas"]["saved_bytes"] < group["variants"]["eager"]["saved_bytes"]
    (group,) = report["parts"]["kernels"]["groups"]
    assert report["parts"]["kernels"]["copy_bytes_per_second"] > 1e8
    assert group["share_of_step"] > 0
    assert all(row["launches"] >= group["steps"] and row["bytes"] > 0 for row in group["kernels"])
    assert group["group"] in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["fastnas", "eager channels_last"])
def test_a_graph_computes_what_the_first_step_computes(name: str) -> None:
    shape = (4, 16, 8, 8, 1, 1)
    expected = edges.edge(shape, name, torch.float64, "cuda").outcome()
    v = gpu.graphed(edges.edge(shape, name, torch.float64, "cuda"))
    assert max(measure.errors(v.outcome(), expected)) < 1e-9
    again = v.outcome()
    assert torch.equal(again["output"], v.outcome()["output"])
    assert not torch.equal(again["_ops.1.1.running_mean"], expected["_ops.1.1.running_mean"])
