from __future__ import annotations

import csv
import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastnas.cli import main
from fastnas.data import ImageData
from fastnas.genotype import ChainGenotype
from fastnas.nn.chain import Skeleton
from fastnas.report.study import write_comparison, write_study_page
from fastnas.runs.checkpoint import CheckpointError
from fastnas.saliency.rank import sample
from fastnas.saliency.statistics import correlate
from fastnas.search import Search
from fastnas.spaces import SPACES, ChainSpace, get_space, register
from fastnas.study import StudyOptions, Subnets, bottom_k, ranking, study
from fastnas.study.architectures import best, known
from fastnas.study.evaluation import batches
from fastnas.tabular import Table

SPACE = get_space("nb201")
OPTIONS = {"sample": "9", "channels": 4, "layers": 1, "epochs": 2, "batch_size": 16, "images": 30, "image_batch": 11}
OPTIONS |= {"key": "cell", "column": "accuracy", "device": "cpu", "calibration": 2}


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Kendall's correlation of a thousand resamples takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastnas.study.results.ranking", partial(ranking, resamples=20))
        yield


def worth(genotype) -> float:
    return 10 * sum("conv" in op for op in genotype.ops) - genotype.ops.count("none")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of the whole space, which values a cell by its convolutions."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["cell", "accuracy"])
        rows.writerows([g.to_text(), worth(g)] for g in sample(SPACE, None))
    return str(path)


def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (96, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(96) % 3
    x[labels == 1, :, :4] //= 4
    x[labels == 2, :, 4:] //= 4
    return ImageData(
        name="digits", images=x, labels=labels, classes=("a", "b", "c"), mean=(0.4,), std=(0.3,), test_images=None,
        test_labels=None,
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(table: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    options = StudyOptions(
        table=table,
        checkpoints="0,1,2",
        bn="batch,recalibrated",
        prune="optimistic,supernet,naswot",
        keep="0.5",
        **OPTIONS,
    )
    study(options, folder, data=images())
    return folder


def test_subnets_are_those_of_the_snapshots(done: Path, table: str) -> None:
    found = rows(done / "subnets.csv")
    genotypes = known(SPACE, Table.load(table, "cell"), "accuracy", 9).genotypes
    assert [row["architecture"] for row in found] == [g.to_text() for g in genotypes]
    assert [float(row["truth"]) for row in found] == [worth(g) for g in genotypes]
    sizes = [(sum(p.numel() for p in SPACE.network(g, 4, 1, 3, 1).parameters())) for g in genotypes]
    assert [int(row["params"]) for row in found] == sizes

    options = StudyOptions(table=table, **OPTIONS)
    search = Search(options.search(), data=images())
    search.run()  # the same training, without a study
    chosen = search.parts[1][:30]
    data = images()
    pixels = (data.images[chosen].float() / 255 - 0.4) / 0.3
    subnets = Subnets(SPACE, search.supernet, batches(pixels, data.labels[chosen], 11, torch.device("cpu")))
    assert [float(row["epoch2_batch"]) for row in found] == [subnets.accuracy(g) for g in genotypes]
    assert [row["epoch0_batch"] for row in found] != [row["epoch2_batch"] for row in found]


def test_the_summary_is_of_the_subnets(done: Path) -> None:
    found, subnets = rows(done / "summary.csv"), rows(done / "subnets.csv")
    assert [(row["epoch"], row["bn"]) for row in found] == [(e, bn) for e in "012" for bn in ("batch", "recalibrated")]
    truth = np.array([float(row["truth"]) for row in subnets])
    for row in found:
        values = np.array([float(s[f"epoch{row['epoch']}_{row['bn']}"]) for s in subnets])
        expected = correlate(values, truth, resamples=20)
        assert float(row["spearman"]) == pytest.approx(expected.spearman.value)
        assert float(row["kendall_low"]) == pytest.approx(expected.kendall.low)
        assert float(row["supernet_mean"]) == pytest.approx(values.mean())
        assert float(row["top10"]) == truth.max(), "all nine are in the top 10"
        assert float(row["random1"]) == pytest.approx(truth.mean())
        assert (row["stability"] == "") == (row["epoch"] == "0")
    content = json.loads((done / "summary.json").read_text())
    assert content["architectures"] == 9
    assert content["truth_best"] == truth.max()
    bottom = [row for row in rows(done / "bottom.csv") if row["by"] == "supernet"]
    for row in bottom[: len(bottom) // 6]:
        values = [float(s["epoch0_batch"]) for s in subnets]
        expected = bottom_k(values, truth, int(row["k"]))
        assert (float(row["recall"]), float(row["precision"])) == pytest.approx((expected.recall, expected.precision))
    shares = [row for row in rows(done / "operators.csv") if row["by"] == "truth" and row["place"] == "all"]
    assert len(shares) == 9
    assert sum(float(shares[0][op]) for op in SPACE.primitives) == pytest.approx(1)
    assert [float(row["mean"]) for row in shares] == sorted(truth, reverse=True)


def test_pruned_spaces_train_on_what_they_keep(done: Path) -> None:
    found, subnets = rows(done / "pruning.csv"), rows(done / "subnets.csv")
    assert [row["prune"] for row in found] == ["space", "none", "optimistic", "supernet", "naswot"]
    assert [row["keep"] for row in found] == ["", "1.0", "0.5", "0.5", "0.5"]
    assert [row["count"] for row in found] == ["9", "9", "4", "4", "4"]
    last = rows(done / "summary.csv")[-2]
    assert [found[0][name] for name in ("spearman", "spearman_low", "supernet_mean")] == [
        last[name] for name in ("spearman", "spearman_low", "supernet_mean")
    ], "the supernet of the whole space"
    assert (done / "pruned" / "none-1" / "kept.txt").read_text().split() == [s["architecture"] for s in subnets]
    assert found[1]["supernet_mean"] != found[0]["supernet_mean"], "another supernet, of all that is studied"
    truth = {s["architecture"]: float(s["truth"]) for s in subnets}
    verdict = {s["architecture"]: float(s["epoch2_batch"]) for s in subnets}
    for kind, values in (("optimistic", truth), ("supernet", verdict)):
        kept = (done / "pruned" / f"{kind}-0.5" / "kept.txt").read_text().splitlines()
        assert kept == [list(values)[n] for n in best(list(values.values()), 0.5)]
        assert min(values[a] for a in kept) >= max(v for a, v in values.items() if a not in kept)
        assert [row["architecture"] for row in rows(done / "pruned" / f"{kind}-0.5" / "subnets.csv")] == kept
    assert float(found[2]["truth_mean"]) > float(found[1]["truth_mean"])
    drawn = [torch.load(done / "pruned" / "optimistic-0.5" / "supernet" / "checkpoint.pt")["state"]["chosen"]]
    assert set(drawn) <= set((done / "pruned" / "optimistic-0.5" / "kept.txt").read_text().splitlines())


def test_a_study_that_stopped_ends_with_the_same_bytes(done: Path, table: str, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    @contextmanager
    def stopped(search: Search) -> Iterator[None]:
        steps = itertools.count(1)

        def look(*_: object) -> None:
            if next(steps) == 8:  # in the second epoch, after three steps and as many batches of validation
                search.stop()

        search.supernet.register_forward_hook(look)
        yield
        raise Stop

    options = StudyOptions(table=table, checkpoints="0,1,2", bn="batch,recalibrated", **OPTIONS)
    with pytest.raises(Stop):
        study(options, tmp_path, data=images(), training=stopped)
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["epoch-0.pt", "epoch-1.pt"]
    state = torch.load(tmp_path / "supernet" / "checkpoint.pt")["state"]
    assert (state["epoch"], state["step"]) == (1, 2), "nothing of the epoch under way is lost"
    study(options, tmp_path, data=images())
    for name in ("subnets.csv", "summary.csv", "summary.json", "top.csv", "bottom.csv", "operators.csv"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name
    with pytest.raises(ValueError, match="image_batch=11, not 12"):
        study(StudyOptions(table=table, **{**OPTIONS, "image_batch": 12}), tmp_path, data=images())


def test_pages(done: Path, tmp_path: Path) -> None:
    text = write_study_page(done).read_text()
    assert text.count("<svg") >= 14
    assert text.count("data:image/png;base64") == 3 * 2 + 2
    assert 'src="http' not in text
    assert "<script" not in text
    other, both = tmp_path / "other", tmp_path / "both"
    other.mkdir()
    options = json.loads((done / "study.json").read_text())
    (other / "study.json").write_text(json.dumps({**options, "seed": 1}))
    first = rows(done / "summary.csv")
    ranked = rows(done / "subnets.csv")
    second = [{**row, "epoch1_batch": str(n % 4)} for n, row in enumerate(ranked)]
    for name, content in (
        ("summary.csv", [{**row, "spearman": float(row["spearman"]) + 0.2} for row in first]),
        ("subnets.csv", second),
    ):
        with (other / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    assert "Side by side" in write_comparison([done, other, done / ".." / done.name], both).read_text()
    found = rows(both / "compare.csv")
    assert [(row["study"], row["seeds"]) for row in found] == [("", "2")] * 6
    ours = sorted(first, key=lambda row: row["bn"])
    for row, one in zip(found, ours, strict=True):
        assert float(row["spearman_mean"]) == pytest.approx(float(one["spearman"]) + 0.1)
        assert float(row["spearman_std"]) == pytest.approx(0.2 / 2**0.5)
        column = f"epoch{row['epoch']}_{row['bn']}"
        agreement = correlate(*([float(r[column]) for r in table] for table in (ranked, second)), resamples=0).spearman
        assert float(row["agreement_mean"]) == pytest.approx(agreement.value)
    (other / "study.json").write_text(json.dumps({**options, "lr": 0.3, "clip": 1.0}))
    (other / "pruning.csv").write_bytes((done / "pruning.csv").read_bytes())
    text = write_comparison([done, other], both).read_text()
    assert "Pruned search spaces" in text
    pruned = rows(both / "compare_pruning.csv")
    ours = rows(done / "pruning.csv")
    assert [row["top10_mean"] for row in pruned] == 2 * [row["top10"] for row in ours]
    found = rows(both / "compare.csv")
    assert {(row["study"], row["seeds"]) for row in found} == {("lr 0.1", "1"), ("lr 0.3", "1")}, "lr tells them apart"
    assert {(row["spearman_std"], row["agreement_mean"]) for row in found} == {("", "")}, "of one seed"
    with pytest.raises(FileNotFoundError, match="holds no finished study"):
        write_study_page(tmp_path / "nothing")


def test_the_command(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "study",
        "--table",
        table,
        "--key=cell",
        "--column=accuracy",
        "--sample=4",
        "--channels=4",
        "--layers=1",
    ]
    arguments += ["--epochs=1", "--images=20", "--batch-size=256", "--finetune=0,2", "--finetune-lr=0.1"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "Spearman" in out
    page = tmp_path / "run" / "report.html"
    page.unlink()
    assert main(["report", str(page.parent)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.exists()
    assert main(["study", "compare", str(tmp_path / "run"), "--out", str(tmp_path / "both")]) == 0
    found = rows(tmp_path / "both" / "compare.csv")
    assert [row["bn"] for row in found] == ["batch", "batch+2"]
    assert [row["supernet_mean_mean"] for row in found] == [
        row["supernet_mean"] for row in rows(tmp_path / "run" / "summary.csv")
    ]
    assert found[0]["supernet_mean_mean"] != found[1]["supernet_mean_mean"], "fine-tuned"
    capsys.readouterr()
    assert main(["study", "compare"]) == 2
    assert main(["study", "--epochs=1"]) == 2
    assert "give --table FILE" in capsys.readouterr().err


def test_a_signal_stops_the_training_after_its_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def training_alone(*_: object, training, **others: object) -> None:
        with training(SimpleNamespace(stop=lambda: asked.append(True))):
            signal.raise_signal(signal.SIGINT)
            asked.append(False)  # the step goes on

    monkeypatch.setattr("fastnas.commands.study.study", training_alone)
    assert main(["study", "--epochs=1", "--out", str(tmp_path)]) == 130
    assert asked == [True, False]
    assert "goes on from there" in capsys.readouterr().out


def test_what_a_table_knows() -> None:
    genotypes = sample(SPACE, 6)
    texts = [g.to_text() for g in genotypes]
    few = Table(texts, {"accuracy": [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]})
    found = known(SPACE, few, "accuracy", None)
    assert dict(zip((g.to_text() for g in found.genotypes), found.truth, strict=True)) == {
        text: float(n + 1) for n, text in enumerate(texts) if n != 2
    }
    endless = Table(texts, {"accuracy": [1.0, 2.0, float("nan"), 4.0, 5.0, float("inf")]})
    with pytest.raises(ValueError, match=r"column='accuracy': .* has a worth that is not finite"):
        known(SPACE, endless, "accuracy", 3)
    assert known(SPACE, few, "accuracy", 3).genotypes == known(SPACE, few, "accuracy", 5).genotypes[:3]
    with pytest.raises(ValueError, match="the table knows 5 architectures"):
        known(SPACE, few, "accuracy", 6)
    with pytest.raises(ValueError, match="no architecture of the space darts"):
        known(get_space("darts"), few, "accuracy", 3)


def test_cells_in_json() -> None:
    darts = get_space("darts")
    (genotype,) = sample(darts, 1)
    cells = json.dumps({"normal": genotype.normal, "reduce": genotype.reduce})
    found = known(darts, Table([cells, cells.replace("0]", "1]")], {"accuracy": [3.0, float("nan")]}), "accuracy", None)
    assert (found.genotypes, found.truth) == ([genotype], [3.0])


def test_errors_are_turned_round() -> None:
    space = get_space("nb1shot1-s1")
    genotypes = list({g.canonical().to_text(): g for g in sample(space, 300)}.values())[:100]
    assert len(genotypes) == 100
    table = Table([g.canonical().to_text() for g in genotypes], {"test": [0.01 * n for n in range(100)]})
    found = known(space, table, "test", 3, errors=True)
    worth = {g.canonical().to_text(): 100 - 1.0 * n for n, g in enumerate(genotypes)}
    assert found.truth == pytest.approx([worth[g.canonical().to_text()] for g in found.genotypes])
    found = known(space, table, "test", 90)
    assert len({g.canonical() for g in found.genotypes}) == 90, "no graph twice"


def test_the_best_part() -> None:
    values = [1.0, float("nan"), 3.0, 2.0, 3.0, 0.0, 3.0, 0.0]
    assert best(values, 0.5) == [2, 3, 4, 6]
    assert {tuple(best(values, 0.25, seed)) for seed in range(20)} == {(2, 4), (2, 6), (4, 6)}, "of equals any"
    assert best(values, 0.25, 3) == best(values, 0.25, 3)
    assert best(values, 0.9) == [0, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def chains(tmp_path: Path) -> Iterator[str]:
    """A table of a registered space of nine chains, which are worth their digits."""
    macro = get_space("nb-macro")
    tiny = register(replace(macro, name="nine", skeleton=Skeleton(8, 1, 0, ((8, 2, 2),), 8)))
    path = tmp_path / "chains.csv"
    path.write_text("cell,accuracy\n" + "".join(f"{g.to_text()},{int(g.to_text())}\n" for g in tiny.all()))
    yield str(path)
    del SPACES["nine"]


def test_a_study_of_chains_grows(chains: str, tmp_path: Path) -> None:
    options = {
        **OPTIONS,
        "space": "nine",
        "channels": 8,
        "layers": 2,
        "table": chains,
        "data": "cifar10",
        "seed": 3,
        "lr": 0.1,
    }
    folder = tmp_path / "study"
    study(StudyOptions(**{**options, "sample": "4", "checkpoints": "1"}), folder, data=images())
    assert len(rows(folder / "supernet" / "metrics.csv")) == 1, "of two epochs"
    few = rows(folder / "subnets.csv")
    options |= {"prune": "random,naswot", "keep": "0.5"}  # data that is given is not read
    study(StudyOptions(**{**options, "sample": "7", "checkpoints": "1,2"}), folder, data=images())
    many = rows(folder / "subnets.csv")
    assert [row["epoch1_batch"] for row in many[:4]] == [row["epoch1_batch"] for row in few]
    assert [row["architecture"] for row in many[:4]] == [row["architecture"] for row in few]

    whole = tmp_path / "whole"
    study(StudyOptions(**{**options, "sample": "all"}), whole, data=images())
    found = rows(whole / "pruning.csv")
    assert [row["prune"] for row in found] == ["none", "random", "naswot"], "the space is what is studied"
    (summary,) = rows(whole / "summary.csv")
    assert {name: summary[name] for name in ("spearman_low", "supernet_mean")}.items() <= found[0].items()

    shutil.rmtree(folder / "supernet")
    options |= {"lr": 0.2, "sample": "7", "checkpoints": "1,2"}
    with pytest.raises(ValueError, match="epoch-1-batch has scores with snapshot="):
        study(StudyOptions(**options), folder, data=images())
    for name in ("epoch-1-batch", "epoch-2-batch"):
        shutil.rmtree(folder / "evaluations" / name)
    with pytest.raises(CheckpointError, match=r"lr=0\.1"):
        study(StudyOptions(**options), folder, data=images())
    with pytest.raises(ValueError, match=r"keep='0\.1': 0\.1 of 7 architectures are fewer than 3"):
        study(StudyOptions(**{**options, "keep": "0.1"}), folder, data=images())


def test_spaces_that_cannot_be_listed() -> None:
    space = ChainSpace("few", ("mb3_3x3", "mb6_5x5"), Skeleton(4, 1, 0, ((4, 2, 2),), 8))
    chains = [ChainGenotype(ops).to_text() for ops in itertools.product(space.primitives, repeat=2)]
    table = Table(chains, {"accuracy": [1.0, 2.0, 3.0, 4.0]})
    assert len(known(space, table, "accuracy", 4).truth) == 4
    with pytest.raises(ValueError, match="sample=all: the space 'few' is too large to be listed"):
        known(space, table, "accuracy", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bn": "running"}, "bn='running': expected batch, recalibrated, inherited"),
        ({"checkpoints": "1,9", "epochs": 3}, "checkpoints='1,9': expected epochs from 0 to epochs=3"),
        ({"prune": "luck"}, "prune='luck': expected some of optimistic, random, supernet"),
        ({"prune": "random", "keep": "2"}, "keep='2'"),
        ({"prune": "random", "keep": ""}, "keep=''"),
        ({"sample": "2"}, "sample='2'"),
        ({"finetune": "0,x"}, "finetune='0,x': expected whole numbers"),
        ({"sample_seed": -1}, "sample_seed=-1: expected a whole number of at least 0"),
        ({"fair": True, "prune": "random"}, "fair=True with prune"),
        ({"fair": True, "paths": 2}, "fair=True has paths of its own"),
    ],
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyOptions(**options)


def test_published_options() -> None:
    options = StudyOptions(data="cifar10")
    assert (options.batch_size, options.epochs, options.lr, options.lr_min) == (192, 600, 0.05, 0.0)
    assert (options.weight_decay, options.clip, options.epochs_studied) == (1e-4, 5.0, (600,))
    assert StudyOptions(data="cifar10", space="darts").batch_size == 128
    assert options.search().relaxation == "uniform"
