from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastnas.saliency.rank import sample, score_all
from fastnas.spaces import get_space
from fastnas.study.evaluation import BN_MODES, Finetuning, SubnetJob, Subnets, batches, save_snapshot, subnet_arguments

CPU = torch.device("cpu")
SIZES = {"nb201": (4, 1, 3, 2), "darts": (4, 3, 3, 2), "nb1shot1-s1": (4, 3, 3, 2), "nb-macro": (4, 8, 3, 2)}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a supernet whose statistics have moved, and images of odd number with their labels."""
    torch.manual_seed(seed)
    space = get_space(name)
    net = space.supernet(*SIZES[name]).to(memory_format=torch.channels_last)
    x, y = torch.randn(23, 2, 8, 8), torch.randint(3, (23,))
    with torch.no_grad():
        for genotype in sample(space, 3, 1):
            net(2 * x + 1, **subnet_arguments(space, net, genotype))
    return net, x, y


def by_hand(name: str, net: nn.Module, genotype, images, bn: str, training, amp: bool = False) -> float:
    """The same without anything shared."""
    net, space = copy.deepcopy(net), get_space(name)
    arguments = subnet_arguments(space, net, genotype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        if bn == "recalibrated":
            for norm in net.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.reset_running_stats()
                    norm.momentum = None
            for x, _ in training:
                net(x, **arguments)
        net.train(bn == "batch")
        right = sum(int((net(x, **arguments).argmax(1) == y).sum()) for x, y in images)
    return right / sum(len(y) for _, y in images)


@pytest.mark.parametrize(
    ("name", "bn"),
    [*(("nb201", bn) for bn in BN_MODES), ("nb1shot1-s1", "recalibrated"), ("darts", "batch"), ("nb-macro", "batch")],
)
def test_accuracies_are_those_of_the_supernet_itself(name: str, bn: str) -> None:
    net, x, y = made(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images, training = batches(x, y, 11, CPU), batches(x.flip(0), y.flip(0), 7, CPU)
    subnets = Subnets(get_space(name), net, images, bn, training=training)
    for genotype in sample(get_space(name), 2, 2):
        assert subnets.accuracy(genotype) == by_hand(name, net, genotype, images, bn, training)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_low_precision_is_that_of_the_whole_network(bn: str) -> None:
    net, x, y = made("nb201")
    images = batches(x, y, 11, CPU)
    subnets = Subnets(get_space("nb201"), net, images, bn, training=images, amp="bf16")
    dtypes = []
    subnets._net.register_forward_pre_hook(lambda module, given: dtypes.append(given[0].dtype))
    for genotype in sample(get_space("nb201"), 3, 2):
        assert subnets.accuracy(genotype) == by_hand("nb201", net, genotype, images, bn, images, amp=True)
    assert set(dtypes) == {torch.bfloat16}, "what the stem gives"


@pytest.mark.parametrize("finetuning", [None, Finetuning(1, lr=0.0, weight_decay=0.0)])
def test_recalibration_sees_no_more_batches_than_it_is_told(finetuning: Finetuning | None) -> None:
    net, x, y = made("nb201")
    images, training = batches(x, y, 11, CPU), batches(3 * x.flip(0) - 1, y.flip(0), 7, CPU)
    space = get_space("nb201")
    subnets = Subnets(space, net, images, "recalibrated", training=training, calibration=1, finetuning=finetuning)
    genotypes = sample(space, 4, 2)
    found = [subnets.accuracy(g) for g in genotypes]
    assert found == [by_hand("nb201", net, g, images, "recalibrated", training[:1]) for g in genotypes]
    assert found != [by_hand("nb201", net, g, images, "recalibrated", training) for g in genotypes]


def test_the_modes_differ() -> None:
    net, x, y = made("nb201")
    images = batches(x, y, 11, CPU)
    genotypes = sample(get_space("nb201"), 5)
    found = {
        bn: [Subnets(get_space("nb201"), net, images, bn, training=images).accuracy(g) for g in genotypes]
        for bn in BN_MODES
    }
    assert len({tuple(values) for values in found.values()}) == 3


def test_fine_tuning_is_of_each_subnet_by_itself() -> None:
    net, x, y = made("nb201")
    images = batches(x, y, 23, CPU)
    space = get_space("nb201")
    genotypes = [g for g in sample(space, 20) if "nor_conv_3x3" in g.ops][:3]
    tuned = Subnets(space, net, images, training=images, finetuning=Finetuning(15, lr=0.1))
    shared = Subnets(space, net, images)
    first = [tuned.accuracy(g) for g in genotypes]
    assert [tuned.accuracy(g) for g in reversed(genotypes)] == first[::-1], "one leaves no trace in the next"
    assert sum(first) > sum(shared.accuracy(g) for g in genotypes) + 0.3, "and it learns"


def test_batches_leave_no_image_alone() -> None:
    x, y = torch.arange(7 * 4.0).view(7, 1, 2, 2), torch.arange(7)
    assert [len(labels) for _, labels in batches(x, y, 3, CPU)] == [3, 4]
    assert torch.equal(torch.cat([images for images, _ in batches(x, y, 3, CPU)]), x)
    assert [len(labels) for _, labels in batches(x[:1], y[:1], 3, CPU)] == [1]


def test_a_job_runs_what_a_snapshot_holds(tmp_path: Path) -> None:
    net, x, y = made("nb201")
    save_snapshot(tmp_path / "supernet.pt", net, 3)
    space, genotypes = get_space("nb201"), sample(get_space("nb201"), 3)
    data = (x.numpy(), y.numpy())
    job = SubnetJob(
        *(space, tmp_path / "supernet.pt", SIZES["nb201"], data, data, (11, 7)),
        *("recalibrated", 4, Finetuning(), "cpu"),
    )
    rows = score_all(job, genotypes, {"of": 1}, folder=tmp_path)
    expected = Subnets(space, net, batches(x, y, 11, CPU), "recalibrated", training=batches(x, y, 7, CPU))
    assert [r.score for r in rows] == [expected.accuracy(g) for g in genotypes]
    before = (tmp_path / "scores.csv").read_bytes()
    more = [*genotypes, *sample(space, 5)[:2:-1]]
    again = score_all(job, more, {"of": 1}, folder=tmp_path, first=lambda genotype: genotype.to_text())
    assert [r.architecture for r in again] == [g.to_text() for g in more]
    assert [r.score for r in again] == [expected.accuracy(g) for g in more]
    assert (tmp_path / "scores.csv").read_bytes().startswith(before), "what was there is not computed again"
    with pytest.raises(ValueError, match="of=1, not 2"):
        score_all(job, genotypes, {"of": 2}, folder=tmp_path)


def test_what_is_needed() -> None:
    net, x, y = made("nb201")
    with pytest.raises(ValueError, match="bn='running': expected one of batch, recalibrated, inherited"):
        Subnets(get_space("nb201"), net, batches(x, y, 8, CPU), "running")
    with pytest.raises(ValueError, match="bn='recalibrated' needs training batches"):
        Subnets(get_space("nb201"), net, batches(x, y, 8, CPU), "recalibrated")


class Choices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2), nn.BatchNorm2d(4)) for k in (1, 3))
        self.runs = 0

    def forward(self, x: Tensor, weights: Tensor, choice: int) -> Tensor:
        self.runs += 1
        return weights[choice] * self.ops[choice](x).relu()


class Chain(nn.Module):
    """A supernet of layers that choose one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.features = nn.ModuleList(Choices() for _ in range(4))
        self.classifier = nn.Linear(4, 3)

    def mixed_ops(self) -> None:
        raise AssertionError

    def forward(self, x: Tensor, weights: dict, *, path: dict, between=None) -> Tensor:
        x = self.stem(x)
        for layer, row, choice in zip(self.features, weights["chain"], path["chain"], strict=True):
            x = layer(x, row, choice)
            x = x if between is None else between((x,))[0]
        return self.classifier(x.mean((2, 3)))


class ChainSpace:
    primitives = ("one", "three")

    def encode(self, path: tuple[int, ...]) -> dict[str, Tensor]:
        return {"chain": nn.functional.one_hot(torch.tensor(path), 2).float()}


@pytest.mark.parametrize("bn", BN_MODES)
def test_layers_that_chains_have_in_common_are_computed_once(bn: str) -> None:
    torch.manual_seed(0)
    net, x, y = Chain(), torch.randn(23, 2, 8, 8), torch.randint(3, (23,))
    images = batches(x, y, 8, CPU)
    paths = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 1), (1, 0, 1, 1), (0, 0, 1, 0)]
    subnets = Subnets(ChainSpace(), net, images, bn, training=images)
    found = [subnets.accuracy(path) for path in paths]
    apart = [Subnets(ChainSpace(), net, images, bn, training=images).accuracy(path) for path in paths]
    assert found == apart
    runs = sum(layer.runs for layer in subnets._net.features)
    assert runs == (len(images) * (4 + 1 + 2 + 1 + 4 + 4) if bn != "recalibrated" else 2 * len(images) * 24)
