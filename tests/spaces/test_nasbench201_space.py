from collections import Counter
from pathlib import Path

import pytest
import torch

from fastnas.genotype import Genotype, NASBench201Genotype
from fastnas.nn import NASBENCH201_PRIMITIVES, NASBench201Supernet
from fastnas.relaxations import softmax
from fastnas.spaces import NASBench201Space, get_space
from fastnas.tabular import Table

DATA = Path(__file__).parents[3] / "shared" / "data" / "nb201" / "nb201_accuracy.csv.gz"
SPACE = get_space("nb201")
NONE, SKIP, CONV1, CONV3, POOL = NASBENCH201_PRIMITIVES


def test_shape():
    assert SPACE.edges == ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    assert SPACE.primitives == ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    assert SPACE.cell_types == ("cell",)


def test_init_alphas():
    alphas = SPACE.init_alphas(torch.Generator().manual_seed(0), scale=0.5)
    assert list(alphas) == ["cell"]
    assert alphas["cell"].shape == (6, 5)
    assert alphas["cell"].requires_grad
    assert torch.equal(alphas["cell"], SPACE.init_alphas(torch.Generator().manual_seed(0), scale=0.5)["cell"])
    assert 0.3 < alphas["cell"].std() < 0.7


def test_supernet_takes_what_a_relaxation_makes_of_the_alphas():
    torch.manual_seed(0)
    net = SPACE.supernet(4, 1, 7, 1)
    assert isinstance(net, NASBench201Supernet)
    assert [type(m).__name__ for m in net.cells].count("NASBench201Cell") == 3
    weights = {name: softmax(alphas) for name, alphas in SPACE.init_alphas().items()}
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net.eval()(x, weights), net(x, weights["cell"]))
    with pytest.raises(ValueError, match="weights has no 'cell', only 'normal'"):
        net(x, {"normal": weights["cell"]})
    assert [op.k for _, _, op in SPACE.supernet(4, 1, k=2).mixed_ops()] == [2] * 18
    with pytest.raises(ValueError, match="k=3 does not divide the C=4 channels: choose a k that does"):
        SPACE.supernet(4, 1, k=3)


def test_derive_by_hand():
    table = torch.zeros(6, 5)
    for edge, best in enumerate([3, 0, 4, 2, 1, 3]):
        table[edge, best] = 1.0
    assert SPACE.derive({"cell": table}).ops == (CONV3, NONE, POOL, CONV1, SKIP, CONV3)
    # ties go to the lower index, and none counts
    assert SPACE.derive({"cell": torch.zeros(6, 5)}).ops == (NONE,) * 6
    table[0] = torch.tensor([0.0, 0.5, 0.2, 0.5, 0.5])
    assert SPACE.derive({"cell": table.double().requires_grad_()}).ops[0] == SKIP


def test_bad_scores():
    with pytest.raises(ValueError, match=r"scores\['cell'\] must have shape \(6, 5\), edge x primitive, got nothing"):
        SPACE.derive({})
    with pytest.raises(ValueError, match=r"scores\['cell'\] must have shape \(6, 5\).*got \(5, 6\)"):
        SPACE.derive({"cell": torch.zeros(5, 6)})
    broken = torch.zeros(6, 5)
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"scores\['cell'\] has NaN on edge \(3, 0\)"):
        SPACE.derive({"cell": broken})


def test_sample_is_uniform_and_repeatable():
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.sample(generator) for _ in range(600)]
    assert drawn[:5] == [SPACE.sample(g) for g in [torch.Generator().manual_seed(0)] for _ in range(5)]
    for edge in range(6):
        counts = Counter(genotype.ops[edge] for genotype in drawn)
        assert set(counts) == set(NASBENCH201_PRIMITIVES)
        assert max(abs(count - 120) for count in counts.values()) < 40  # 4 standard deviations
    assert isinstance(SPACE.sample(), NASBench201Genotype)


def test_all():
    cells = list(SPACE.all())
    assert len(cells) == len(set(cells)) == 15625
    assert cells[1].ops == (NONE,) * 5 + (SKIP,)
    # the cells whose output does not depend on the input, counted by inclusion and exclusion of the four ways
    assert sum(not cell.has_path() for cell in cells) == 15625 - _with_path()


def _with_path():
    """The number of cells in which one of the ways 0-3, 0-1-3, 0-2-3, 0-1-2-3 has no none, by inclusion-exclusion."""
    ways = [{3}, {0, 4}, {1, 5}, {0, 2, 5}]  # edges
    total = 0
    for chosen in range(1, 16):
        edges = set().union(*(way for n, way in enumerate(ways) if chosen >> n & 1))
        total += (-1) ** (bin(chosen).count("1") + 1) * 4 ** len(edges) * 5 ** (6 - len(edges))
    return total


def test_other_spaces():
    space = NASBench201Space("small", ("skip_connect", "nor_conv_1x1"), nodes=3)
    assert space.edges == ((1, 0), (2, 0), (2, 1))
    assert len(set(space.all())) == 8
    weights = {name: softmax(alphas) for name, alphas in space.init_alphas().items()}
    x = torch.randn(2, 3, 8, 8)
    assert space.supernet(4, 1)(x, weights).shape == (2, 10)
    assert space.network(space.sample(), 4, 1)(x).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"primitives": ("none", "conv_9x9")}, "primitives: conv_9x9 unknown: register"),
        ({"primitives": ()}, "primitives must be different names, at least one"),
        ({"primitives": ("none", "none")}, "primitives must be different names"),
        ({"nodes": 1}, "nodes=1 must be at least 2"),
    ],
)
def test_bad_spaces(arguments, message):
    with pytest.raises(ValueError, match=message):
        NASBench201Space(**arguments)


def test_network_refuses_what_is_not_of_the_space():
    cell = Genotype([(SKIP, 0), (SKIP, 1)], [2], [(SKIP, 0), (SKIP, 1)], [2])
    for genotype in (cell, NASBench201Genotype((SKIP,))):
        with pytest.raises(ValueError, match="genotype is no cell of 4 nodes of the space 'nb201'"):
            SPACE.network(genotype)
    with pytest.raises(ValueError, match=r"ops\[2\] is the unknown op 'sep_conv_3x3'"):
        SPACE.network(NASBench201Genotype((SKIP, SKIP, "sep_conv_3x3", SKIP, SKIP, SKIP)))


def parameters(genotype, classes):
    """The published network's parameters by arithmetic: C = 16, 32, 64 in stages of 5 cells."""
    total = 16 * 3 * 9 + 2 * 16  # stem
    for C in (16, 32, 64):
        per_op = {NONE: 0, SKIP: 0, CONV1: C * C + 2 * C, CONV3: 9 * C * C + 2 * C, POOL: 0}
        total += 5 * sum(per_op[op] for op in genotype.ops)
    for C in (32, 64):
        total += 9 * C * (C // 2) + 2 * C + 9 * C * C + 2 * C + C * (C // 2)
    return total + 2 * 64 + 65 * classes


def published():
    if not DATA.exists():
        pytest.skip("the table of NAS-Bench-201 is not on this machine")
    return Table.load(DATA)


def test_network_has_the_parameters_that_arithmetic_gives():
    cells = ["|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"]
    generator = torch.Generator().manual_seed(0)
    cells += [SPACE.sample(generator).to_text() for _ in range(5)] + [NASBench201Genotype((NONE,) * 6).to_text()]
    for text in cells:
        genotype = NASBench201Genotype.from_text(text)
        for classes in (10, 100, 120):
            with torch.device("meta"):
                net = SPACE.network(genotype, num_classes=classes)
            assert sum(p.numel() for p in net.parameters()) == parameters(genotype, classes)
    # the benchmark's own number for the first
    assert parameters(NASBench201Genotype.from_text(cells[0]), 10) == 802_426


def test_every_cell_has_the_published_number_of_parameters():
    table = published()
    assert len(table) == 15625
    assert {cell.to_text() for cell in SPACE.all()} == set(table.rows)
    for column, classes in (("params_c10", 10), ("params_c100", 100), ("params_in16", 120)):
        expected = [parameters(NASBench201Genotype.from_text(row), classes) for row in table.rows]
        assert expected == table.column(column).tolist()


def test_the_published_strings_go_through_every_form():
    for row in published().rows[::50]:
        genotype = NASBench201Genotype.from_text(row)
        assert genotype.to_text() == row
        assert NASBench201Genotype.from_json(genotype.to_json()) == genotype
