from collections import Counter

import pytest
import torch

from fastnas.genotype import OneShotGenotype
from fastnas.nn import NASBench101Network, OneShotSupernet
from fastnas.relaxations import softmax
from fastnas.spaces import OneShotSpace, get_space

SPACES = [get_space(f"nb1shot1-s{n}") for n in (1, 2, 3)]
IDS = ["s1", "s2", "s3"]
POOL, CONV3, CONV1 = SPACES[0].primitives


def test_published_spaces():
    """Nodes, parents and the number of architectures with loose ends (arXiv:2001.10422, table 1)."""
    assert [space.parents for space in SPACES] == [(1, 2, 2, 2, 2), (1, 1, 2, 2, 3), (1, 1, 1, 2, 2, 2)]
    assert all(sum(space.parents) == 9 for space in SPACES)  # NAS-Bench-101 allows 9 edges
    assert [list(space.init_alphas()) for space in SPACES] == [
        ["ops", "inputs-3", "inputs-4", "output"],
        ["ops", "inputs-2", "inputs-3", "inputs-4", "output"],
        ["ops", "inputs-2", "inputs-3", "inputs-4", "inputs-5", "output"],
    ]
    assert [sum(1 for _ in space.all()) for space in SPACES[:2]] == [14_580, 29_160]


def test_the_third_space_counted():
    choices = [len(nodes) for nodes in SPACES[2]._choices()]
    assert choices == [1, 2, 3, 6, 10, 15]
    assert 3**5 * 2 * 3 * 6 * 10 * 15 == 1_312_200


@pytest.mark.parametrize("space", SPACES, ids=IDS)
def test_alphas_supernet_and_network_fit(space):
    torch.manual_seed(0)
    alphas = space.init_alphas(torch.Generator().manual_seed(0))
    assert all(alpha.requires_grad for alpha in alphas.values())
    assert alphas["ops"].shape == (space.steps, 3)
    assert alphas["output"].shape == (1, space.steps + 1)
    weights = {name: softmax(alpha) for name, alpha in alphas.items()}
    net = space.supernet(4, 3, 7, 1)
    assert isinstance(net, OneShotSupernet)
    x = torch.randn(2, 1, 8, 8)
    assert net(x, weights).shape == (2, 7)
    genotype = space.derive(weights)
    assert [len(nodes) for nodes in genotype.inputs] == list(space.parents)
    network = space.network(genotype, 8, 3, 7, 1)
    assert isinstance(network, NASBench101Network)
    assert network(x).shape == (2, 7)
    with pytest.raises(ValueError, match="no partial channels"):
        space.supernet(4, 3, k=2)


def test_derive_by_hand():
    scores = {
        "ops": torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [0.0, 0.0, 0.1]]),
        "inputs-2": torch.tensor([[0.2, 0.8]]),
        "inputs-3": torch.tensor([[0.3, 0.2, 0.5]]),
        "inputs-4": torch.tensor([[0.25, 0.25, 0.25, 0.25]]),
        "output": torch.tensor([[0.1, 0.3, 0.1, 0.2, 0.3]]),
    }
    genotype = SPACES[1].derive(scores)
    assert genotype == OneShotGenotype((CONV1, POOL, POOL, CONV1), ((0,), (1,), (0, 2), (0, 1), (1, 3, 4)))
    # nodes 1 and 2 of the first space read all before them, whatever the scores
    genotype = SPACES[0].derive({name: -table for name, table in scores.items()})
    assert genotype.inputs == ((0,), (0, 1), (0, 1), (0, 1), (0, 2))
    assert genotype.ops == (POOL, CONV3, CONV1, POOL)


def test_bad_scores():
    scores = {name: torch.zeros_like(alpha) for name, alpha in SPACES[0].init_alphas().items()}
    with pytest.raises(ValueError, match=r"scores\['inputs-4'\] must have shape \(1, 4\), node x input, got nothing"):
        SPACES[0].derive({k: v for k, v in scores.items() if k != "inputs-4"})
    with pytest.raises(ValueError, match=r"scores\['ops'\] must have shape \(4, 3\), node x primitive, got \(3, 4\)"):
        SPACES[0].derive({**scores, "ops": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"scores\['output'\] has NaN on node 5"):
        SPACES[0].derive({**scores, "output": torch.full((1, 5), torch.nan)})


@pytest.mark.parametrize("space", SPACES, ids=IDS)
def test_sample_is_uniform_and_repeatable(space):
    generator = torch.Generator().manual_seed(0)
    drawn = [space.sample(generator) for _ in range(600)]
    assert drawn[:3] == [space.sample(g) for g in [torch.Generator().manual_seed(0)] for _ in range(3)]
    for n, choices in enumerate(space._choices()):
        counts = Counter(genotype.inputs[n] for genotype in drawn)
        assert set(counts) == set(choices)
        expected = 600 / len(choices)
        assert max(abs(count - expected) for count in counts.values()) < 4 * expected**0.5 + 1
    for n in range(space.steps):
        counts = Counter(genotype.ops[n] for genotype in drawn)
        assert max(abs(counts[op] - 200) for op in space.primitives) < 50


def test_errors():
    with pytest.raises(ValueError, match="node i can read 1 to i nodes"):
        OneShotSpace("mine", (1, 3, 1))
    with pytest.raises(ValueError, match="the output is the last"):
        OneShotSpace("mine", (1,))
    with pytest.raises(ValueError, match="genotype is none of the space 'nb1shot1-s1'"):
        SPACES[0].network(get_space("nb201").sample())
    with pytest.raises(ValueError, match="unknown op 'avgpool'"):
        SPACES[0].network(OneShotGenotype(("avgpool",), ((0,), (1,))))
