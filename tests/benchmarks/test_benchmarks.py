"""The benchmark files, run as they are on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import fastnas
from fastnas import _C

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_benchmarks_report_every_variant(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks", "--quick", "-p", "no:cacheprovider"),
            *("--benchmark-only", "--benchmark-quiet", f"--benchmark-json={path}"),
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["machine_info"]["fastnas"] == fastnas.__version__
    assert report["machine_info"]["cpu_isa"] == _C.build_info()["cpu_isa"]
    assert "node" not in report["machine_info"]  # no name of the host
    groups = defaultdict(dict)
    for bench in report["benchmarks"]:
        groups[bench["group"]][bench["extra_info"]["variant"]] = bench
    assert len(groups) == 13
    for name, variants in groups.items():
        search = name.startswith("SynFlow search")
        assert set(variants) == (
            {"fastnas", "eager float64"} if search else {"fastnas", "eager", "eager channels_last"}
        )
        assert name in done.stdout
        for bench in variants.values():
            assert bench["stats"]["rounds"] == len(bench["stats"]["data"]) == 3
            assert bench["stats"]["median"] > 0
            assert bench["extra_info"]["quick"]
            assert "compile_seconds" not in bench["extra_info"]
            held = 0 if search or name.startswith("evaluation") else 1
            assert bench["extra_info"]["peak_bytes"] >= bench["extra_info"]["held_bytes"] >= held
    mixed_op = groups["MixedOp (4, 16, 8, 8) stride 1"]
    saved = {name: bench["extra_info"]["saved_bytes"] for name, bench in mixed_op.items()}
    assert saved["fastnas"] <= saved["eager"] / 2
