from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastnas.saliency import Batch, FreeDarts
from fastnas.saliency.freedarts import _ranks
from fastnas.spaces import get_space

SMALL = {"channels": 4, "layers": 3}
BATCH = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[t], b[t]) for t in a)


def test_a_seed_gives_the_same_search_as_a_fresh_supernet() -> None:
    searcher = FreeDarts(get_space("darts"), **SMALL)
    first = searcher.search(7, BATCH)
    other = searcher.search(8, BATCH)
    again = searcher.search(7, BATCH)
    assert equal(first.scores, again.scores)
    assert first.genotype == again.genotype
    assert not equal(first.scores, other.scores)
    torch.manual_seed(7)
    fresh = get_space("darts").supernet(**SMALL)
    searcher.search(7, BATCH)
    drawn = searcher.supernet.state_dict()
    assert all(torch.equal(v, drawn[k]) for k, v in fresh.state_dict().items())


def test_the_global_random_state_stays() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    FreeDarts(get_space("darts"), **SMALL).search(0, BATCH)
    # building the supernet draws from it; the search doesn't
    after = torch.get_rng_state()
    FreeDarts(get_space("darts"), **SMALL)
    torch.manual_seed(3)
    get_space("darts").supernet(**SMALL)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)


def test_alphas_at_their_expectation() -> None:
    result = FreeDarts(get_space("darts"), draws=0, scale=0.01, **SMALL).search(1, BATCH)
    expected = 0.01 * math.sqrt(2 / math.pi)
    assert all(torch.equal(a, torch.full_like(a, expected)) for a in result.alphas.values())
    assert {op for op, _ in (*result.genotype.normal, *result.genotype.reduce)} <= {"sep_conv_3x3", "sep_conv_5x5"}


def test_draws_are_averaged() -> None:
    space = get_space("darts")
    three = FreeDarts(space, draws=3, **SMALL)
    scores = three.search(5, BATCH).scores
    generator = torch.Generator().manual_seed(5)
    drawn = [space.init_alphas(generator) for _ in range(3)]
    torch.manual_seed(5)
    supernet = space.supernet(**SMALL)
    from fastnas.saliency import get_saliency

    each = [get_saliency("synflow")(supernet, a, BATCH) for a in drawn]
    for t, s in scores.items():
        torch.testing.assert_close(s, sum(e[t] for e in each) / 3)


@pytest.mark.parametrize("pruning", ["candidates", "edges"])
def test_iterative_pruning_leaves_one_candidate_an_edge(pruning: str) -> None:
    result = FreeDarts(get_space("darts"), pruning=pruning, **SMALL).search(2, BATCH)
    for s in result.scores.values():
        assert bool((s.isfinite().sum(1) == 1).all())


@pytest.mark.parametrize("pruning", ["candidates", "edges"])
def test_iterative_pruning_never_keeps_none(pruning: str) -> None:
    """Even where a saliency has both signs, and the 0 of none is not the smallest."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(4, 3, 8, 8), torch.arange(4))
    result = FreeDarts(get_space("darts"), "grasp", pruning=pruning, **SMALL).search(0, batch)
    assert all(bool(s[:, 0].isneginf().all()) for s in result.scores.values())


def test_candidates_are_cut_one_by_one() -> None:
    """What survives the first round can be told from the scores of that round alone."""
    space = get_space("darts")
    once = FreeDarts(space, **SMALL).search(2, BATCH).scores
    left = FreeDarts(space, pruning="candidates", **SMALL).search(2, BATCH).scores
    for t, s in once.items():
        assert not bool(((s[:, 1:].argmin(1) + 1) == left[t].argmax(1)).any())


def test_votes_add_ranks() -> None:
    torch.testing.assert_close(
        _ranks(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])),
        torch.tensor([[2.0, 0.0, 1.0], [0.5, 0.5, 2.0]], dtype=torch.float64),
    )
    torch.manual_seed(0)
    batch = Batch(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    space = get_space("darts")
    votes = FreeDarts(space, ["synflow", "snip"], **SMALL).search(0, batch).scores
    apart = [FreeDarts(space, name, **SMALL).search(0, batch).scores for name in ("synflow", "snip")]
    for t, v in votes.items():
        assert torch.equal(v, _ranks(apart[0][t]) + _ranks(apart[1][t].double()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"saliency": "magic"}, "saliency 'magic' is unknown: expected one of"),
        ({"saliency": []}, "saliency must name at least one"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"draws": -1}, "draws=-1"),
        ({"pruning": "twice"}, "pruning='twice': expected one of once, candidates, edges"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FreeDarts(get_space("darts"), **SMALL, **options)


def test_the_released_code_leaves_weights_positive_and_scores_noise() -> None:
    """Batch norm in training mode makes R the sum of the biases, whatever α is."""
    space = get_space("darts")
    searcher = FreeDarts(space, "released-synflow", **SMALL)
    noise = searcher.search(0, BATCH).scores
    assert all(bool((p >= 0).all()) for p in searcher.supernet.parameters())
    true = FreeDarts(space, **SMALL).search(0, BATCH).scores
    size = max(float(s.max()) for s in noise.values())
    r = sum(float(b.abs().sum()) for b in [searcher.supernet.classifier.bias.detach()])
    assert size < 1e-5 * r
    assert max(float(s.max()) for s in true.values()) > 1e-2
