"""Parameters and multiply-adds, against torch's counter of flops, by hand, and against a table of 15,625 networks."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastnas import use_backend
from fastnas.genotype import Genotype, NASBench201Genotype, OneShotGenotype
from fastnas.genotypes import find_genotype
from fastnas.nn import (
    NASBENCH201_PRIMITIVES,
    NASBench101Network,
    NASBench201Network,
    Network,
    Supernet,
)
from fastnas.nn.counting import Complexity, count

TABLE = Path(__file__).resolve().parents[3] / "shared/data/nb201/nb201_accuracy.csv.gz"


def amoeba() -> Network:
    genotype = find_genotype("AmoebaNet")
    assert isinstance(genotype, Genotype)
    return Network(genotype, 6, 4, 7, 2, stem="imagenet")


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (amoeba, (2, 32, 64)),
        (
            lambda: NASBench101Network(
                OneShotGenotype(("conv3x3-bn-relu", "maxpool3x3"), ((0,), (0, 1), (1, 2))), 8, 3
            ),
            (3, 8, 12),
        ),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.Flatten(), nn.Linear(6 * 7, 3)), None),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5)),
    ],
    ids=["amoebanet", "nasbench101", "conv1d", "transposed"],
)
def test_multiply_adds_are_half_of_torch_s_flops(
    network: Callable[[], nn.Module], shape: tuple[int, ...] | None
) -> None:
    model = network().eval()
    if shape is None:  # images have three dimensions, so those of a Conv1d come from a first layer
        model, shape = nn.Sequential(nn.Flatten(2), model), (4, 1, 11)
    counter = FlopCounterMode(display=False)
    with use_backend("reference"), torch.no_grad(), counter:
        model(torch.zeros(1, *shape))
    size = count(model, shape)
    assert 2 * size.multiply_adds == counter.get_total_flops() > 0
    assert size.parameters == sum(p.numel() for p in model.parameters())


def test_every_kind_of_operation() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # (4, 6, 8)
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (4, 3, 4)
        nn.BatchNorm2d(4, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    elementwise = 2 * 4 * 48 + 4 * 48 + 4 * 48 + 4 * 12 + 4 * 12
    assert count(network, (2, 6, 8)) == Complexity(4 * 18 + 4 + 8 + 15, 48 * 4 * 18 + 12, elementwise)


def test_a_layer_that_is_called_twice_counts_twice_but_its_parameters_once() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    assert count(nn.Sequential(layer, layer), (3, 5, 4)) == Complexity(9, 2 * 9 * 20, 0)


def test_transposed_convolutions_count_from_their_input() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(6, 1, 1, bias=False))
    # 25 input pixels x 4 channels, each to 3 of the 6 output channels through 9 weights; 11 x 11 pixels behind it
    assert count(network, (4, 5, 5)) == Complexity(4 * 3 * 9 + 6 + 6, 25 * 4 * 3 * 9 + 121 * 6)


def test_count_sees_the_candidates_of_a_supernet() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.supernet = Supernet(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.ones(14, 8)
            return self.supernet(x, {"normal": weights, "reduce": weights})

    net = Fixed()
    seen = []
    handles = [
        m.register_forward_hook(lambda m, x, y: seen.append(y[0, 0].numel() * m.weight.numel()))
        for m in net.modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        net(torch.zeros(1, 3, 8, 8))
    for handle in handles:
        handle.remove()
    assert count(net, (3, 8, 8)).multiply_adds == sum(seen) + net.supernet.classifier.weight.numel()


def test_an_auxiliary_head_and_the_model_are_left_alone() -> None:
    genotype = find_genotype("GDAS_V1")
    assert isinstance(genotype, Genotype)
    model = Network(genotype, 4, 3, auxiliary=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert count(model) == count(Network(genotype, 4, 3))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"image_shape=\(3, 32\) must be \(C, H, W\)"):
        count(nn.Linear(3, 4), (3, 32))
    with pytest.raises(ValueError, match="no module of kind"):
        count(nn.Flatten())


@pytest.mark.skipif(not TABLE.exists(), reason="there is no table of NAS-Bench-201")
def test_all_of_nasbench201() -> None:
    def parameters(ops: tuple[str, ...], classes: int) -> int:
        return count(NASBench201Network(NASBench201Genotype(ops), num_classes=classes), (3, 4, 4)).parameters

    classes = {"params_c10": 10, "params_c100": 100, "params_in16": 120}
    none = ("none",) * 6
    empty = {column: parameters(none, n) for column, n in classes.items()}
    # what an edge adds: all that is assumed is that edges add up, and built networks below confirm it
    adds = {op: parameters((op, *none[1:]), 10) - empty["params_c10"] for op in NASBENCH201_PRIMITIVES}
    with gzip.open(TABLE, "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15625
    for row in rows:
        ops = NASBench201Genotype.from_text(row["arch"]).ops
        added = sum(adds[op] for op in ops)
        assert {column: empty[column] + added for column in classes} == {column: int(row[column]) for column in classes}
    for row in random.Random(0).sample(rows, 12):
        ops = NASBench201Genotype.from_text(row["arch"]).ops
        column = random.Random(row["arch"]).choice(list(classes))
        assert parameters(ops, classes[column]) == int(row[column])
