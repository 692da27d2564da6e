from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastnas.genotype import Genotype, NASBench201Genotype
from fastnas.saliency import Batch, get_score
from fastnas.saliency.perturbation import perturb
from fastnas.spaces import DartsSpace, get_space


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))


class Tables(nn.Module):
    """A supernet that gives its weights back."""

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(weights.values()))


def importances(space_name: str, seed: int) -> Tensor:
    """Returns how much each candidate is worth, (cell types, E, O)."""
    space = get_space(space_name)
    shape = (len(space.cell_types), len(space.edges), len(space.primitives))
    worth = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    worth[..., space.primitives.index("none")] = 2  # worth the most, and still never kept
    return worth


def unordered(genotype: Genotype | NASBench201Genotype) -> object:
    """Returns the genotype with a node's two inputs as a set: those of a node that has no others are not ranked."""
    if isinstance(genotype, NASBench201Genotype):
        return genotype
    return [[set(cell[n : n + 2]) for n in range(0, len(cell), 2)] for cell in (genotype.normal, genotype.reduce)]


@pytest.mark.parametrize("space_name", ["nb201", "darts"])
def test_what_hurts_most_when_it_goes_is_kept(space_name: str, batch: Batch) -> None:
    """Where candidates add up, the order does not matter, and the architecture is the one of the best candidates."""
    space = get_space(space_name)
    worth = importances(space_name, 3)
    steps: list[tuple[int, int]] = []
    found = perturb(
        space,
        Tables(),
        [batch],
        lambda network, batch: (network(batch.images) * worth).sum(),
        iterations=3,
        generator=torch.Generator().manual_seed(0),
        on_choice=lambda *step: steps.append(step),
    )
    worth[..., space.primitives.index("none")] = -1
    expected = space.derive(dict(zip(space.cell_types, worth, strict=True)))
    assert [unordered(genotype) for genotype, _ in found.candidates] == [unordered(expected)] * 3
    assert unordered(found.genotype) == unordered(expected)
    decisions = 3 * {"nb201": 6, "darts": 2 * (14 + 3)}[space_name]
    assert steps == [(n + 1, decisions) for n in range(decisions)]
    kept = expected.ops if isinstance(expected, NASBench201Genotype) else [*expected.normal, *expected.reduce]
    if isinstance(expected, Genotype):
        edges = {edge: e for e, edge in enumerate(space.edges)}
        pieces = [
            worth[c, edges[2 + n // 2, j], space.primitives.index(op)]
            for c, cell in enumerate((expected.normal, expected.reduce))
            for n, (op, j) in enumerate(cell)
        ]
        assert len(pieces) == len(kept)
        assert found.score == pytest.approx(float(sum(pieces)), rel=1e-5)


def test_each_drop_is_scored_with_what_was_kept_before(batch: Batch) -> None:
    """The search is repeated by hand, on a supernet with a score of its outputs."""
    space = get_space("nb201")
    torch.manual_seed(0)
    supernet = space.supernet(4, 1, num_classes=3)
    supernet.train()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}

    def spread(network: nn.Module, batch: Batch) -> Tensor:
        network.eval()
        with torch.no_grad():
            return network(batch.images).std()

    found = perturb(space, supernet, [batch], spread, iterations=1, generator=torch.Generator().manual_seed(5))

    order = torch.randperm(6, generator=torch.Generator().manual_seed(5)).tolist()
    weights = torch.ones(6, 5)
    supernet.eval()
    with torch.no_grad():
        for e in order:
            losses = []
            for o in range(1, 5):  # not none
                table = weights.clone()
                table[e, o] = 0
                losses.append(float(supernet(batch.images, {"cell": table}).std()))
            weights[e] = torch.eye(5)[1 + losses.index(min(losses))]
        score = float(supernet(batch.images, {"cell": weights}).std())
    assert found.genotype == space.derive({"cell": weights})
    assert found.score == pytest.approx(score)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_the_best_candidate_over_all_batches_is_returned(batch: Batch) -> None:
    space = get_space("nb201")
    torch.manual_seed(1)
    supernet = space.supernet(4, 1, num_classes=3)
    second = Batch(batch.images.flip(0) * 2, batch.labels)
    modes = [m.training for m in supernet.modules()]
    found = perturb(
        space, supernet, [batch, second], "jacob_cov", iterations=4, generator=torch.Generator().manual_seed(0)
    )
    assert [m.training for m in supernet.modules()] == modes
    assert len(found.candidates) == 4
    assert found.score == max(score for _, score in found.candidates)
    assert (found.genotype, found.score) in found.candidates

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.supernet = supernet
            self.weights = torch.zeros(6, 5)
            for e, op in enumerate(found.genotype.ops):
                self.weights[e, space.primitives.index(op)] = 1

        def forward(self, x: Tensor) -> Tensor:
            return self.supernet(x, {"cell": self.weights})

    scores = [float(get_score("jacob_cov")(Kept(), b)) for b in (batch, second)]
    assert found.score == pytest.approx(sum(scores) / 2)


def test_a_score_of_activations_on_the_darts_supernet(batch: Batch) -> None:
    space = DartsSpace("small", primitives=("none", "skip_connect", "sep_conv_3x3"), steps=3, multiplier=3)
    torch.manual_seed(0)
    supernet = space.supernet(2, 3, num_classes=3)
    found = perturb(space, supernet, [batch], iterations=1, generator=torch.Generator().manual_seed(0))
    found.genotype.validate([p for p in space.primitives if p != "none"])
    assert math.isfinite(found.score)


def test_nan_is_never_the_lowest(batch: Batch) -> None:
    space = get_space("nb201")
    worth = importances("nb201", 4)

    def score(network: nn.Module, batch: Batch) -> Tensor:
        tables = network(batch.images)
        return torch.where((tables[0, 2, 3] == 0) & (tables[0, 2].sum() == 4), math.nan, (tables * worth).sum())

    found = perturb(space, Tables(), [batch], score, iterations=1)
    worth[..., 0] = -1
    worth[0, 2, 3] = -1
    assert found.genotype == space.derive({"cell": worth[0]})


def test_errors(batch: Batch) -> None:
    space = get_space("nb201")
    with pytest.raises(ValueError, match="iterations=0"):
        perturb(space, Tables(), [batch], iterations=0)
    with pytest.raises(ValueError, match="number of batches, 0"):
        perturb(space, Tables(), [])
    with pytest.raises(ValueError, match="perturbation needs one row an edge and one column a primitive"):
        perturb(get_space("nb1shot1-s1"), Tables(), [batch])
    with pytest.raises(ValueError, match="score 'magic' is unknown"):
        perturb(space, Tables(), [batch], "magic")
    with pytest.raises(ValueError, match="NaN for all candidates on edge"):
        perturb(space, Tables(), [batch], lambda network, batch: torch.tensor(math.nan))
