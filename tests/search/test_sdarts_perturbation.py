import itertools

import pytest
import torch
from torch import nn

from fastnas.search.perturbation import adversarial, radius, random


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tables(rows=200, seed=1):
    logits = torch.randn(rows, 4, generator=seeded(seed), dtype=torch.float64)
    return {"normal": logits.softmax(-1), "reduce": (3 * logits).softmax(-1).requires_grad_()}


def projected(weights, shift):
    moved = (weights + shift).clamp(0, 1)
    return moved / moved.sum(-1, keepdim=True)


def on_the_simplex(weights):
    assert not weights.requires_grad
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))


def test_radius_grows_in_a_line():
    assert [radius(e, 50) for e in (0, 25, 49)] == pytest.approx([0.03, 0.165, 0.2946])


def test_random():
    weights = tables()
    got = random(weights, 0.1, seeded())
    generator = seeded()
    for name, w in weights.items():
        on_the_simplex(got[name])
        noise = torch.rand(w.shape, generator=generator, dtype=torch.float64) * 0.2 - 0.1
        torch.testing.assert_close(got[name], projected(w.detach(), noise))
    assert all(torch.equal(a, b) for a, b in zip(got.values(), random(weights, 0.1, seeded()).values(), strict=True))
    assert not torch.equal(got["normal"], random(weights, 0.1, seeded(1))["normal"])
    still = random(weights, 0.0)
    for name, w in weights.items():
        torch.testing.assert_close(still[name], w.detach())


def test_a_row_that_vanishes_stays():
    weights = {"cell": torch.full((20_000, 4), 0.25)}
    got = random(weights, 2.0, seeded())["cell"]
    on_the_simplex(got)
    noise = torch.empty(20_000, 4).uniform_(-2.0, 2.0, generator=seeded())
    gone = (noise <= -0.25).all(-1)
    assert gone.sum() > 100
    assert torch.equal(got[gone], weights["cell"][gone])
    full = (noise >= 0.75).all(-1)
    assert ((got - 0.25).abs().amax(-1) > 0)[~gone & ~full].all()


def best_corner(weights, epsilon, loss):
    """The largest loss over the corners and the middle of the box around one row."""
    shifts = itertools.product((-epsilon, 0.0, epsilon), repeat=weights.numel())
    return max(float(loss({"cell": projected(weights, torch.tensor([s]).double())})) for s in shifts)


@pytest.mark.parametrize("seed", range(5))
def test_adversarial_finds_what_brute_force_finds(seed):
    """A linear loss of the row is largest in a corner of the box; signs of the gradient lead there."""
    generator = seeded(seed)
    row = (torch.rand(1, 3, generator=generator, dtype=torch.float64) + 0.5).softmax(-1)
    slope = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)[torch.randperm(3, generator=generator)]

    def loss(weights):
        return (weights["cell"] * slope).sum()

    got = adversarial({"cell": row}, 0.1, loss, generator=generator)
    on_the_simplex(got["cell"])
    best, at = best_corner(row, 0.1, loss), float(loss({"cell": row}))
    assert best > at
    assert float(loss(got)) >= at + 0.99 * (best - at)
    assert float(loss(got)) <= best + 1e-12


def test_adversarial_on_a_convex_loss():
    """Away from the minimum in the row, both ways up are as good as brute force's."""
    row = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64)
    centre = torch.tensor([0.32, 0.29, 0.39], dtype=torch.float64)

    def loss(weights):
        return (weights["cell"] - centre).square().sum()

    best = best_corner(row, 0.1, loss)
    values = [float(loss(adversarial({"cell": row}, 0.1, loss, generator=seeded(s)))) for s in range(20)]
    assert max(values) >= 0.99 * best
    assert min(values) > 5 * float(loss({"cell": row}))


def test_weights_at_a_maximum_are_kept():
    row = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)

    def loss(weights):
        return -(weights["cell"] - row).square().sum()

    assert torch.equal(adversarial({"cell": row}, 0.1, loss, generator=seeded())["cell"], row)


def test_the_disturbance_stays_within_epsilon():
    """Of the rows that need no normalisation the change is what was added."""
    weights = {"cell": torch.full((50, 4), 0.25, dtype=torch.float64)}
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    got = adversarial(weights, 0.1, lambda w: (w["cell"] * slope).sum(), generator=seeded(), steps=30)["cell"]
    torch.testing.assert_close(got, (0.25 + 0.1 * slope).expand(50, 4))


def test_a_network():
    torch.manual_seed(0)
    net = nn.Linear(8, 1).double()
    weights = tables(2)
    seen = []

    def loss(w):
        seen.append(net.weight.requires_grad)
        return net(w["normal"].flatten()).square().sum()

    before = float(loss({n: w.detach() for n, w in weights.items()}).detach())
    seen.clear()
    got = adversarial(weights, 0.05, loss, net.parameters(), seeded())
    assert seen == [False] * 9
    assert net.weight.requires_grad
    assert net.weight.grad is None
    assert weights["reduce"].grad is None
    assert float(loss(got).detach()) > before
    again = adversarial(weights, 0.05, loss, net.parameters(), seeded())
    assert all(torch.equal(got[name], again[name]) for name in got)
