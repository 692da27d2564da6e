"""Whether a benchmark result is worse than the committed one of the same machine: ``python -m benchmarks.regressions``.

Times of two runs cannot be compared on a machine that others use as well; ratios of variants within one run can. What
is compared is how many times longer each variant takes than fastnas, and how many times more it saves for backward.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ("processor", "cores", "threads", "gpus", "cpu_isa")

Report = Mapping[str, Any]
Key = tuple[str, str, str]  # group, device, variant


@dataclass(frozen=True)
class Ratios:
    """A variant's median time and saved bytes, as multiples of fastnas' own."""

    time: float
    saved: float


def ratio(theirs: float, ours: float) -> float:
    return theirs / ours if ours else (math.inf if theirs else 1.0)


def ratios(report: Report) -> dict[Key, Ratios]:
    """Returns the ratios of every variant beside a fastnas; quick results are left out, their numbers mean nothing."""
    groups: dict[tuple[str, str], dict[str, tuple[float, float]]] = defaultdict(dict)
    for bench in report["benchmarks"]:
        info = bench["extra_info"]
        if not info["quick"]:
            found = bench["stats"]["median"], info["saved_bytes"]
            groups[bench["group"], info["device"]][info["variant"]] = found
    return {
        (*group, name): Ratios(*map(ratio, found, variants["fastnas"]))
        for group, variants in groups.items()
        for name, found in variants.items()
        if name != "fastnas" and "fastnas" in variants
    }


def committed(root: Path = ROOT) -> Iterator[tuple[str, Report]]:
    """Yields path and content of the benchmark results in the last commit; nothing where there is no repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    for path in git("ls-tree", "-r", "--name-only", "HEAD", "benchmarks/results").splitlines():
        if path.endswith(".json"):
            report = json.loads(git("show", f"HEAD:{path}"))
            if "benchmarks" in report:  # and no other kind of result
                yield path, report


def predecessor(new: Report, root: Path = ROOT) -> tuple[str, Report] | None:
    """Returns the committed result to compare with: this machine's, of this version, or else of the newest version."""
    facts = new["machine_info"]

    def order(found: tuple[str, Report]) -> tuple[bool, list[int]]:
        version = found[1]["machine_info"]["fastnas"]
        return version == facts["fastnas"], [int(part) for part in re.findall(r"\d+", version)]

    same = [f for f in committed(root) if all(f[1]["machine_info"].get(m) == facts[m] for m in MACHINE)]
    return max(same, key=order, default=None)


def compare(new: Report, old: Report, tolerance: float) -> tuple[list[str], int]:
    """Returns the lines of a table and how many ratios fell by more than ``tolerance``, a share."""
    after, before = ratios(new), ratios(old)
    fallen = 0
    lines = []
    group = ""
    for key in sorted(after.keys() & before.keys()):
        if key[0] != group:
            group = key[0]
            lines += ["", f"{group} ({key[1]})"]
        cells = ""
        for was, now in ((before[key].time, after[key].time), (before[key].saved, after[key].saved)):
            fell = now < was * (1 - tolerance)
            fallen += fell
            cells += f"{was:8.2f} -> {now:8.2f}{'  FELL' if fell else '      '}"
        lines.append(f"  {key[2]:24}{cells}".rstrip())
    if lines:
        lines.insert(0, f"{'':26}{'x time':>8}{'':18}{'x saved':>8}")
    for name, missing in (
        ("the committed result", after.keys() - before.keys()),
        ("this one", before.keys() - after.keys()),
    ):
        if missing:
            lines += ["", f"only compared where both have it; {name} lacks:"]
            lines += [f"  {group}, {variant} ({device})" for group, device, variant in sorted(missing)]
    return lines, fallen


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Prints the comparison; returns 1 where a ratio fell by more than the tolerance, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regressions", description=__doc__)
    parser.add_argument("new", type=Path, help="a result of make bench")
    parser.add_argument("--against", type=Path, help="another result, instead of the committed one of this machine")
    parser.add_argument("--tolerance", type=float, default=0.2, help="how far a ratio may fall (default: 0.2, 20 %%)")
    options = parser.parse_args(arguments)
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance={options.tolerance}: expected a share from 0 to below 1")
    new = json.loads(options.new.read_text())
    if not ratios(new):
        print(f"{options.new} has nothing to compare: no variant beside fastnas, or quick results only")
        return 0
    if options.against:
        found = str(options.against), json.loads(options.against.read_text())
    else:
        facts = new["machine_info"]
        chosen = predecessor(new, root)
        if chosen is None:
            gpus = "".join(f", {gpu}" for gpu in facts["gpus"])
            machine = (
                f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, {facts['cpu_isa']}{gpus}"
            )
            print(
                f"Nothing is committed for this machine ({machine}): regressions cannot "
                f"be seen. Commit {options.new} to compare with it from now on."
            )
            return 0
        found = chosen
    path, old = found
    versions = [f"fastnas {r['machine_info']['fastnas']}, torch {r['machine_info']['torch']}" for r in (old, new)]
    print(f"{path} ({versions[0]}) -> {options.new} ({versions[1]})")
    lines, fallen = compare(new, old, options.tolerance)
    print("\n".join(lines))
    print(f"\n{fallen or 'no'} ratio{'' if fallen == 1 else 's'} fell by more than {options.tolerance:.0%}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
