"""The regression check, on results that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from benchmarks import regressions  # noqa: E402


def report(
    groups: dict[str, dict[str, tuple[float, float]]],
    *,
    version: str = "0.2.0",
    processor: str = "Some CPU",
    threads: int = 2,
    isa: str = "avx2",
    quick: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """A result with (median, saved bytes) of each variant of each group."""
    info = {"processor": processor, "cores": 2, "threads": threads, "gpus": [], "cpu_isa": isa}
    info |= {"fastnas": version, "torch": "2.13.0"}
    benchmarks = [
        {
            "group": group,
            "stats": {"median": median},
            "extra_info": {"variant": name, "device": device, "saved_bytes": saved, "quick": quick},
        }
        for group, variants in groups.items()
        for name, (median, saved) in variants.items()
    ]
    return {"machine_info": info, "benchmarks": benchmarks}


def edge(eager: float, saved: float = 400) -> dict[str, dict[str, tuple[float, float]]]:
    return {"edge": {"fastnas": (2.0, 100), "eager": (eager, saved)}}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose last commit has results of some versions and machines, and one of another kind."""
    root = tmp_path / "repository"
    results = root / "benchmarks" / "results"
    write(results / "0.1.0" / "some-cpu.json", report(edge(8.0), version="0.1.0"))
    write(results / "0.10.0" / "some-cpu.json", report(edge(16.0), version="0.10.0"))
    write(results / "0.9.0" / "some-cpu.json", report(edge(32.0), version="0.9.0"))
    write(results / "0.2.0" / "other-cpu.json", report(edge(64.0), processor="Other CPU"))
    write(results / "0.12.0" / "some-cpu.json", report(edge(128.0), version="0.12.0", isa="avx512"))
    write(results / "0.13.0" / "some-cpu.json", report(edge(256.0), version="0.13.0", threads=1))
    write(results / "0.2.0" / "scaling-some-cpu.json", {"machine_info": {}, "curves": []})
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "results"]):
        subprocess.run([*git, *arguments], check=True)
    return root


@pytest.mark.parametrize(
    ("eager", "saved", "code", "fell"),
    [
        (8.0, 400, 0, 0),
        (6.41, 400, 0, 0),  # 4.0 -> 3.2 is the limit
        (6.39, 400, 1, 1),
        (8.0, 319, 1, 1),
        (6.0, 300, 1, 2),
        (80.0, 4000, 0, 0),
    ],
)
def test_a_ratio_that_fell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], eager: float, saved: float, code: int, fell: int
) -> None:
    old, new = write(tmp_path / "old.json", report(edge(8.0))), write(tmp_path / "new.json", report(edge(eager, saved)))
    assert regressions.main([str(new), "--against", str(old)]) == code
    printed = capsys.readouterr().out
    assert printed.count("FELL") == fell
    assert f"{fell or 'no'} ratio" in printed
    assert f"4.00 -> {eager / 2:8.2f}" in printed


def test_slower_machines_are_no_regression(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", report(edge(8.0)))
    slow = {"edge": {"fastnas": (20.0, 100), "eager": (80.0, 400)}}
    assert regressions.main([str(write(tmp_path / "new.json", report(slow))), "--against", str(old)]) == 0


def test_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write(tmp_path / "old.json", report(edge(8.0))), write(tmp_path / "new.json", report(edge(7.0)))
    arguments = [str(new), "--against", str(old), "--tolerance"]
    assert regressions.main([*arguments, "0.1"]) == 1
    assert regressions.main([*arguments, "0.15"]) == 0
    with pytest.raises(SystemExit):
        regressions.main([*arguments, "20"])
    assert "--tolerance=20.0: expected a share" in capsys.readouterr().err


def test_nothing_saved_is_better_than_any_ratio(tmp_path: Path) -> None:
    none, some = ({"ends": {"fastnas": (1.0, ours), "eager": (1.0, 40)}} for ours in (0, 8))
    old, new = write(tmp_path / "none.json", report(none)), write(tmp_path / "some.json", report(some))
    assert regressions.main([str(old), "--against", str(old)]) == 0
    assert regressions.main([str(old), "--against", str(new)]) == 0
    assert regressions.main([str(new), "--against", str(old)]) == 1


def test_groups_and_devices_of_one_side_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", report({**edge(8.0), "sum": {"fastnas": (1, 1), "eager": (9, 9)}}))
    on_cuda = report(edge(2.0), device="cuda")
    new = report(edge(8.0))
    new["benchmarks"] += on_cuda["benchmarks"]
    assert regressions.main([str(write(tmp_path / "new.json", new)), "--against", str(old)]) == 0
    printed = capsys.readouterr().out
    assert "the committed result lacks:\n  edge, eager (cuda)" in printed
    assert "this one lacks:\n  sum, eager (cpu)" in printed


def test_quick_results_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", report(edge(8.0)))
    new = write(tmp_path / "new.json", report(edge(1.0), quick=True))
    assert regressions.main([str(new), "--against", str(old)]) == 0
    assert "nothing to compare" in capsys.readouterr().out
    mixed = report(edge(1.0), quick=True)
    mixed["benchmarks"] += report({"sum": {"fastnas": (1, 1), "eager": (9, 9)}})["benchmarks"]
    assert regressions.ratios(mixed).keys() == {("sum", "cpu", "eager")}


@pytest.mark.parametrize(("version", "expected"), [("0.1.0", "0.1.0"), ("0.9.0", "0.9.0"), ("0.11.0", "0.10.0")])
def test_the_committed_result_of_this_version_or_else_the_newest(
    repository: Path, version: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read from the commit: the new result lies at the committed one's path."""
    path = repository / "benchmarks" / "results" / version / "some-cpu.json"
    new = write(path, report(edge(1.0), version=version))
    assert regressions.main([str(new)], repository) == 1
    assert f"benchmarks/results/{expected}/some-cpu.json (fastnas {expected}, torch 2.13.0)" in capsys.readouterr().out


def test_nothing_committed_for_this_machine(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = write(tmp_path / "new.json", report(edge(8.0), processor="New CPU"))
    assert regressions.main([str(new)], repository) == 0
    assert "Nothing is committed for this machine (New CPU, 2 cores, 2 threads, avx2)" in capsys.readouterr().out
    assert regressions.main([str(new)], tmp_path) == 0  # not even a repository
    assert "Nothing is committed" in capsys.readouterr().out


def test_the_published_results_can_be_read() -> None:
    contents = {p: json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").rglob("*.json")}
    published = {path: content for path, content in contents.items() if "benchmarks" in content}
    assert published
    for path, content in published.items():
        found = regressions.ratios(content)
        assert found, path
        assert all(r.time > 0 and r.saved > 0 for r in found.values()), path
