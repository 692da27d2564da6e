from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastnas.genotype import NASBench201Genotype
from fastnas.saliency import SCORES, Batch, get_score
from fastnas.saliency.rank import Networks, RankOptions, Scored, ScoreLog, compare, rank, sample
from fastnas.spaces import get_space
from fastnas.tabular import Table

SPACE = get_space("nb201")
NETWORKS = Networks(channels=4, layers=1, classes=3, seed=7)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.fixture(scope="module")
def genotypes() -> list[NASBench201Genotype]:
    return sample(SPACE, 7, seed=1)


def values(rows: list[Scored]) -> list[tuple[int, str, float]]:
    return [(r.index, r.architecture, r.score) for r in rows]


def lines(folder: Path) -> list[list[str]]:
    """Returns the rows of a file without their seconds."""
    return [line.split(",")[:-1] for line in (folder / "scores.csv").read_text().splitlines()]


def test_the_scores_are_those_of_networks_built_by_hand(batch: Batch, genotypes: list[NASBench201Genotype]) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    rows = rank("nb201", "snip", genotypes, batch, NETWORKS)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [r.architecture for r in rows] == [g.to_text() for g in genotypes]
    assert all(r.seconds > 0 for r in rows)
    for i, (row, genotype) in enumerate(zip(rows, genotypes, strict=True)):
        torch.manual_seed(7 + i)
        network = SPACE.network(genotype, 4, 1, 3, 2)
        assert row.score == float(get_score("snip")(network, batch))
        assert row.index == i


def test_darts_networks(batch: Batch) -> None:
    space = get_space("darts")
    rows = rank(space, "naswot", sample(space, 2), batch, Networks(channels=4, layers=3, classes=3))
    assert all(math.isfinite(r.score) for r in rows)
    assert rows[0].score != rows[1].score


def test_a_run_that_stopped_goes_on_bit_for_bit(
    batch: Batch, genotypes: list[NASBench201Genotype], tmp_path: Path
) -> None:
    whole = rank(SPACE, "jacob_cov", genotypes, batch, NETWORKS, folder=tmp_path / "whole")

    class Stop(BaseException):
        pass

    def stop(row: Scored) -> None:
        if row.index == 3:
            raise Stop

    part = tmp_path / "part"
    with pytest.raises(Stop):
        rank(SPACE, "jacob_cov", genotypes, batch, NETWORKS, folder=part, on_score=stop)
    assert lines(part) == lines(tmp_path / "whole")[:5]
    # as a process that was killed while it wrote leaves it
    with (part / "scores.csv").open("a") as file:
        file.write('4,"|nor_co')
    kept = (part / "scores.csv").read_text().splitlines()[:5]
    seen: list[Scored] = []
    again = rank(SPACE, "jacob_cov", genotypes, batch, NETWORKS, folder=part, on_score=seen.append)
    assert values(again) == values(whole)
    assert seen == again
    assert lines(part) == lines(tmp_path / "whole")
    assert (part / "scores.csv").read_text().splitlines()[:5] == kept, "what was there is not computed again"


def test_a_finished_run_can_be_extended(batch: Batch, genotypes: list[NASBench201Genotype], tmp_path: Path) -> None:
    first = rank(SPACE, "naswot", genotypes[:3], batch, NETWORKS, folder=tmp_path)
    more = rank(SPACE, "naswot", genotypes, batch, NETWORKS, folder=tmp_path)
    assert values(more[:3]) == values(first)
    assert len(more) == 7
    assert rank(SPACE, "naswot", genotypes[:2], batch, NETWORKS, folder=tmp_path) == more[:2]


def test_special_values_survive_the_file(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([math.nan, -math.inf, 0.1 + 0.2, -1e-300])
    monkeypatch.setitem(SCORES, "special", lambda network, batch: torch.tensor(next(found), dtype=torch.float64))
    genotypes = sample(SPACE, 4)
    once = rank(SPACE, "special", genotypes, batch, NETWORKS, folder=tmp_path)
    again = rank(SPACE, "special", genotypes, batch, NETWORKS, folder=tmp_path)
    assert [repr(r.score) for r in again] == [repr(r.score) for r in once]
    assert [repr(r.score) for r in once] == ["nan", "-inf", repr(0.1 + 0.2), "-1e-300"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": Networks(channels=8, layers=1, classes=3, seed=7)}, "channels=4, not 8"),
        ({"networks": Networks(channels=4, layers=1, classes=3, seed=8)}, "seed=7, not 8"),
        ({"score": "jacob_cov"}, "score=naswot, not jacob_cov"),
        ({"threads": 2}, "threads=1, not 2"),
        ({"images": 1.0}, "batch="),
        ({"labels": 1}, "batch="),
        ({"first": 1}, r"row 0 is of \|.*, not of \|"),
    ],
)
def test_other_settings_are_refused(
    change: dict, message: str, batch: Batch, genotypes: list[NASBench201Genotype], tmp_path: Path
) -> None:
    rank(SPACE, "naswot", genotypes[:2], batch, NETWORKS, folder=tmp_path)
    before = (tmp_path / "scores.csv").read_bytes()
    other = Batch(batch.images + change.get("images", 0), (batch.labels + change.get("labels", 0)) % 3)
    with pytest.raises(ValueError, match=message):
        rank(
            SPACE,
            change.get("score", "naswot"),
            genotypes[change.get("first", 0) :],
            other,
            change.get("networks", NETWORKS),
            folder=tmp_path,
            threads=change.get("threads", 1),
        )
    assert (tmp_path / "scores.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", None, "settings.json is missing"),
        ("settings.json", "{", "settings.json is damaged"),
        ("settings.json", "[]", "holds no settings"),
        ("scores.csv", "a,b\n", "its first line is a,b"),
        ("scores.csv", "index,architecture,score,seconds\n0,x\n", "is damaged"),
        ("scores.csv", "index,architecture,score,seconds\n0,x,much,1\n", "is damaged"),
        ("scores.csv", "index,architecture,score,seconds\n0,x,1,1\n", "row 0 is of x"),
    ],
)
def test_damaged_folders(
    file: str, content: str | None, message: str, batch: Batch, genotypes: list[NASBench201Genotype], tmp_path: Path
) -> None:
    rank(SPACE, "params", genotypes[:2], batch, NETWORKS, folder=tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        rank(SPACE, "params", genotypes[:2], batch, NETWORKS, folder=tmp_path)


@pytest.mark.slow
def test_two_runs_in_one_folder(batch: Batch, genotypes: list[NASBench201Genotype], tmp_path: Path) -> None:
    with ScoreLog(tmp_path, {"of": 1}, ["a"]) as log:
        log.append(Scored(0, "a", 1.0, 0.1))
        with pytest.raises(ValueError, match="written by another process"):
            ScoreLog(tmp_path, {"of": 1}, ["a"])
    with ScoreLog(tmp_path, {"of": 1}, ["a"]) as log:
        assert [r.score for r in log.rows] == [1.0]


def test_processes_give_the_same_scores(batch: Batch, genotypes: list[NASBench201Genotype], tmp_path: Path) -> None:
    channels_last = Batch(batch.images.contiguous(memory_format=torch.channels_last), batch.labels)
    alone = rank(SPACE, "naswot", genotypes, channels_last, NETWORKS, folder=tmp_path / "1")
    seen: list[Scored] = []
    together = rank(
        SPACE, "naswot", genotypes, channels_last, NETWORKS, folder=tmp_path / "2", jobs=2, on_score=seen.append
    )
    assert values(together) == values(alone)
    assert seen == together
    assert lines(tmp_path / "1") == lines(tmp_path / "2")


def kill(network: nn.Module, batch: Batch) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_is_killed(
    batch: Batch, genotypes: list[NASBench201Genotype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORES, "kill", kill)
    with pytest.raises(ChildProcessError, match="fewer jobs need less"):
        rank(SPACE, "kill", genotypes, batch, NETWORKS, jobs=2)


def test_a_failing_architecture_is_named(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: nn.Module, batch: Batch) -> Tensor:
        raise ValueError("too small")

    monkeypatch.setitem(SCORES, "fail", fail)
    genotype = SPACE.sample()
    with pytest.raises(ValueError, match=r"architecture .*: too small") as info:
        rank(SPACE, "fail", [genotype], batch, NETWORKS)
    assert genotype.to_text() in str(info.value)


def test_sample() -> None:
    some = sample(SPACE, 200, seed=3)
    assert len({g.to_text() for g in some}) == 200
    assert sample(SPACE, 50, seed=3) == some[:50]
    assert sample(SPACE, 50, seed=4) != some[:50]
    everything = sample(SPACE, None)
    assert len({g.to_text() for g in everything}) == len(everything) == 5**6
    with pytest.raises(ValueError, match="sample=all"):
        sample(get_space("darts"), None)


def test_more_architectures_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnas.spaces.nasbench201 import NASBench201Space

    monkeypatch.setattr("fastnas.saliency.rank._DUPLICATES", 200)
    small = NASBench201Space("small", nodes=2)
    assert len(sample(small, 5)) == 5
    with pytest.raises(ValueError, match="has but 5 architectures"):
        sample(small, 6)


def test_compare() -> None:
    scores = [1, 3, math.nan, 2, -math.inf]
    rows = [Scored(i, "abcde"[i], score, 0.0) for i, score in enumerate(scores)]
    table = Table(list("edcba"), {"accuracy": [10.0, math.nan, 30.0, 50.0, 20.0], "other": [0.0] * 5})
    correlations, known = compare(rows, table, "accuracy")
    np.testing.assert_equal(known, [20.0, 50.0, 30.0, math.nan, 10.0])
    assert correlations.count == 3
    assert correlations.kendall.value == 1
    with pytest.raises(ValueError, match="no column 'error': those there are accuracy, other"):
        compare(rows, table, "error")
    with pytest.raises(ValueError, match="2 architectures have a score and a value"):
        compare(rows[:2], table, "accuracy")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"score": "magic"}, "score='magic': expected one of .*naswot"),
        ({"sample": "some"}, "sample='some'"),
        ({"sample": "0"}, "sample='0'"),
        ({"jobs": 0}, "jobs=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankOptions(**option)


TABLE = Path(__file__).parents[3] / "shared" / "data" / "nb201" / "nb201_accuracy.csv.gz"


@pytest.mark.skipif(not TABLE.exists(), reason="needs a table of NAS-Bench-201, which is not shipped")
def test_parameters_rank_nas_bench_201_as_published(batch: Batch) -> None:
    table = Table.load(TABLE)
    genotypes = sample(SPACE, 100)
    rows = rank(SPACE, "params", genotypes, Batch(torch.zeros(1, 3, 8, 8), batch.labels), Networks())
    assert [r.score for r in rows] == [table.find(g)["params_c10"] for g in genotypes]
    correlations, _ = compare(rows, table, "c10_test_e200")
    assert 0.6 < correlations.spearman.value < 0.85
    assert correlations.count == 100


@pytest.mark.parametrize("name", ["nb1shot1-s1", "nb1shot1-s2", "nb1shot1-s3"])
def test_networks_of_nas_bench_1shot1(name: str, batch: Batch, tmp_path: Path) -> None:
    space = get_space(name)
    networks = Networks(channels=4, layers=3, classes=3)
    rows = rank(space, "naswot", sample(space, 3), batch, networks, folder=tmp_path)
    assert all(math.isfinite(r.score) for r in rows)
    again = rank(space, "naswot", sample(space, 4), batch, networks, folder=tmp_path)
    assert values(again[:3]) == values(rows)
    assert len(lines(tmp_path)) == 5
