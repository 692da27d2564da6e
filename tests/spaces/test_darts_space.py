import copy
import csv
import gzip
import json
from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import combinations
from pathlib import Path

import pytest
import torch

from fastnas.genotype import Genotype
from fastnas.nn import PRIMITIVES, Supernet
from fastnas.relaxations import softmax
from fastnas.spaces import SPACES, DartsSpace, get_space, register

DATA = Path(__file__).parents[3] / "shared" / "data" / "darts"
SPACE = get_space("darts")


def test_edges():
    assert SPACE.edges[:5] == ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    assert SPACE.edges[-1] == (5, 4)
    assert len(SPACE.edges) == 14
    assert SPACE.primitives == PRIMITIVES
    assert SPACE.cell_types == ("normal", "reduce")


def test_init_alphas():
    def draw(seed, **options):
        return SPACE.init_alphas(torch.Generator().manual_seed(seed), **options)

    alphas = draw(0)
    assert list(alphas) == ["normal", "reduce"]
    for alpha in alphas.values():
        assert alpha.shape == (14, 8)
        assert alpha.requires_grad
        assert alpha.is_leaf
        assert 0.7e-3 < alpha.std() < 1.3e-3
    assert not torch.equal(alphas["normal"], alphas["reduce"])
    assert all(torch.equal(a, b) for a, b in zip(alphas.values(), draw(0).values(), strict=True))
    assert not torch.equal(alphas["normal"], draw(1)["normal"])
    torch.testing.assert_close(draw(0, scale=1.0)["normal"] * 1e-3, alphas["normal"])
    assert draw(0, device="meta")["normal"].device.type == "meta"


def test_supernet():
    net = SPACE.supernet(channels=4, layers=3, num_classes=7, in_channels=1, k=4)
    assert isinstance(net, Supernet)
    assert net.stem[0].weight.shape == (12, 1, 3, 3)
    assert net.classifier.out_features == 7
    assert [cell.reduction for cell in net.cells] == [False, True, True]
    # a quarter of the channels: 4 // 4 in the first cell, 8 // 4 in the second
    assert net.state_dict()["cells.0._ops.0._ops.4.op.1.weight"].shape == (1, 1, 3, 3)
    assert net.state_dict()["cells.1._ops.0._ops.4.op.1.weight"].shape == (2, 1, 3, 3)


def test_default_supernet_is_the_published_one():
    with torch.device("meta"):
        net = SPACE.supernet()
    assert [n for n, cell in enumerate(net.cells) if cell.reduction] == [2, 5]
    # the published search network has 1.93 M parameters
    assert sum(p.numel() for p in net.parameters()) == 1_930_618


def scores(edges=14, primitives=8, **best):
    """Zeros but for ``best``: {"edge<e>": {primitive: score}}."""
    table = torch.zeros(edges, primitives)
    for edge, row in best.items():
        for primitive, score in row.items():
            table[int(edge[4:]), PRIMITIVES.index(primitive)] = score
    return table


def test_derive_by_hand():
    normal = scores(
        edge0={"sep_conv_3x3": 0.3},
        edge1={"dil_conv_5x5": 0.5, "none": 0.9},  # none never counts
        edge2={"none": 0.9, "skip_connect": 0.1},
        edge3={"max_pool_3x3": 0.2, "avg_pool_3x3": 0.15},
        edge4={"sep_conv_5x5": 0.4},
        edge5={"sep_conv_3x3": 0.2},
        edge6={"sep_conv_3x3": 0.1},
        edge7={"sep_conv_3x3": 0.3},
        edge8={"sep_conv_3x3": 0.4},
        edge9={"dil_conv_3x3": 0.6},
        edge13={"skip_connect": 0.7},
    )
    genotype = SPACE.derive({"normal": normal, "reduce": -normal})
    assert genotype.normal == [
        ("dil_conv_5x5", 1),  # a node's inputs come best first
        ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 2),
        ("max_pool_3x3", 1),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 2),
        ("skip_connect", 4),
        ("dil_conv_3x3", 0),
    ]
    # negated, the best score of every edge is 0: inputs 0 and 1, and the first candidate that is not negative
    first = ["max_pool_3x3"] * 8
    first[3] = "skip_connect"  # edge 3 = (3, 1), both pools are negative
    assert genotype.reduce == [(op, n % 2) for n, op in enumerate(first)]
    assert genotype.normal_concat == genotype.reduce_concat == range(2, 6)


def test_ties_go_to_the_lower_index():
    equal = {"normal": torch.full((14, 8), 0.125), "reduce": torch.full((14, 8), 0.125)}
    genotype = SPACE.derive(equal)
    assert genotype.normal == genotype.reduce == [("max_pool_3x3", 0), ("max_pool_3x3", 1)] * 4


def test_derive_equals_a_search_over_all_architectures():
    """Per node, the derived edges are those of the largest sum of scores among all pairs and operations."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        weights = {k: softmax(torch.randn(14, 8, generator=generator)) for k in ("normal", "reduce")}
        genotype = SPACE.derive(weights)
        for cell_type, cell in zip(("normal", "reduce"), (genotype.normal, genotype.reduce), strict=True):
            for node in range(4):
                row = {j: weights[cell_type][SPACE.edges.index((node + 2, j))].tolist() for j in range(node + 2)}
                best = max(
                    (
                        (row[a][o] + row[b][p], {(PRIMITIVES[o], a), (PRIMITIVES[p], b)})
                        for a, b in combinations(range(node + 2), 2)
                        for o in range(1, 8)
                        for p in range(1, 8)
                    ),
                    key=lambda pair: pair[0],
                )
                assert set(cell[2 * node : 2 * node + 2]) == best[1]


def test_derive_does_not_depend_on_dtype_or_layout():
    table = softmax(torch.randn(8, 14, generator=torch.Generator().manual_seed(0)).T)
    expected = SPACE.derive({"normal": table, "reduce": table})
    assert SPACE.derive({"normal": table.double().requires_grad_(), "reduce": table.contiguous()}) == expected
    half = table.bfloat16()
    assert SPACE.derive({"normal": half, "reduce": half}) == SPACE.derive(
        {"normal": half.float(), "reduce": half.float()}
    )


def test_other_spaces():
    space = DartsSpace("small", ("skip_connect", "none", "sep_conv_3x3"), steps=3, multiplier=2)
    assert len(space.edges) == 9
    table = torch.zeros(9, 3)
    table[:, 1] = 1.0
    table[:, 2] = 0.5
    genotype = space.derive({"normal": table, "reduce": table})
    assert genotype == Genotype(
        [("sep_conv_3x3", i % 2) for i in range(6)], [3, 4], [("sep_conv_3x3", i % 2) for i in range(6)], [3, 4]
    )
    x = torch.randn(2, 3, 8, 8)
    assert space.supernet(4, 3)(x, {k: softmax(v) for k, v in space.init_alphas().items()}).shape == (2, 10)


def test_bad_scores():
    good = torch.rand(14, 8)
    with pytest.raises(
        ValueError, match=r"scores\['reduce'\] must have shape \(14, 8\), edge x primitive, got nothing"
    ):
        SPACE.derive({"normal": good})
    with pytest.raises(ValueError, match=r"scores\['normal'\] must have shape \(14, 8\).*got \(14, 7\)"):
        SPACE.derive({"normal": good[:, :7], "reduce": good})
    broken = good.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"scores\['reduce'\] has NaN on edge \(3, 1\): the search diverged"):
        SPACE.derive({"normal": good, "reduce": broken})


def test_sample_is_uniform_and_repeatable():
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.sample(generator) for _ in range(500)]
    assert drawn[:3] == [SPACE.sample(g) for g in [torch.Generator().manual_seed(0)] for _ in range(3)]
    candidates = [p for p in PRIMITIVES if p != "none"]
    for genotype in drawn:
        assert genotype.validate(candidates) == genotype
        assert genotype.normal_concat == genotype.reduce_concat == range(2, 6)
    for cell in ("normal", "reduce"):
        for node in range(4):
            pairs = Counter(tuple(j for _, j in getattr(g, cell)[2 * node : 2 * node + 2]) for g in drawn)
            assert set(pairs) == set(combinations(range(node + 2), 2))
            expected = 500 / len(pairs)
            assert max(abs(count - expected) for count in pairs.values()) < 4 * expected**0.5 + 1
            for edge in (2 * node, 2 * node + 1):
                ops = Counter(getattr(g, cell)[edge][0] for g in drawn)
                assert set(ops) == set(candidates)
                assert max(abs(count - 500 / 7) for count in ops.values()) < 4 * (500 / 7) ** 0.5
    small = DartsSpace("small", ("skip_connect", "none"), steps=2, multiplier=1).sample()
    assert small.normal_concat == range(3, 4)
    assert {op for op, _ in small.normal} == {"skip_connect"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"primitives": ("skip_connect", "conv_9x9")}, "primitives: conv_9x9 unknown: register"),
        ({"primitives": ()}, "primitives must be different names"),
        ({"primitives": ("none",)}, "one of them not 'none'"),
        ({"primitives": ("skip_connect", "skip_connect")}, "primitives must be different names"),
        ({"multiplier": 5}, "multiplier=5 must be from 1 to steps=4"),
    ],
)
def test_bad_spaces(arguments, message):
    with pytest.raises(ValueError, match=message):
        DartsSpace(**arguments)


def test_registry(monkeypatch):
    assert SPACES["darts"] is SPACE
    with pytest.raises(FrozenInstanceError):
        SPACE.steps = 5
    with pytest.raises(ValueError, match=r"space 'dart' is unknown: expected one of .*darts"):
        get_space("dart")
    monkeypatch.setattr("fastnas.spaces._registry.SPACES", copy.copy(SPACES))
    mine = register(DartsSpace("mine", ("skip_connect", "sep_conv_7x7")))
    assert get_space("mine") is mine
    with pytest.raises(ValueError, match="space 'mine' is already registered"):
        register(mine)


def archive(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    with gzip.open(path, "rt") as file:
        return [json.loads(row["genotype"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["robustdarts_searched.csv.gz", "nb301_surrogate_725.csv.gz"])
def test_published_genotypes_go_through_every_form(name):
    cells = archive(name)
    assert len(cells) > 200
    for cell in cells:
        genotype = Genotype.from_json(json.dumps(cell | {"normal_concat": [2, 3, 4, 5], "reduce_concat": [2, 3, 4, 5]}))
        assert genotype.validate([p for p in PRIMITIVES if p != "none"]) == genotype
        assert Genotype.from_text(genotype.to_text()) == Genotype.from_json(genotype.to_json()) == genotype


def test_scores_made_from_published_genotypes_give_them_back():
    for cell in archive("nb301_surrogate_725.csv.gz")[:200]:
        tables = {}
        for cell_type in ("normal", "reduce"):
            table = torch.zeros(14, 8)
            table[:, 0] = 2.0
            for n, (op, j) in enumerate(cell[cell_type]):
                table[SPACE.edges.index((n // 2 + 2, j)), PRIMITIVES.index(op)] = 1.0 - 0.1 * (n % 2)
            tables[cell_type] = table
        derived = SPACE.derive(tables)
        assert [list(edge) for edge in derived.normal] == cell["normal"]
        assert [list(edge) for edge in derived.reduce] == cell["reduce"]
