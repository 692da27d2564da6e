import math

import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from fastnas.relaxations import concentration
from fastnas.search.regularizers import REGULARIZERS, get_regularizer


@pytest.fixture
def alphas():
    generator = torch.Generator().manual_seed(0)
    return {
        name: (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for name, shape in {"normal": (5, 4), "reduce": (5, 4), "betas-normal": (5,)}.items()
    }


def gradients(loss, alphas):
    tables = [alphas["normal"], alphas["reduce"]]
    return torch.autograd.grad(loss, tables, allow_unused=True, retain_graph=True)


def test_kl_is_that_of_every_edge(alphas):
    expected = sum(
        kl_divergence(Dirichlet(row), Dirichlet(torch.ones(4).double()))
        for name in ("normal", "reduce")
        for row in concentration(alphas[name])
    )
    got = get_regularizer("kl")(alphas, 1e-3)
    torch.testing.assert_close(got, 1e-3 * expected)
    for a, b in zip(gradients(got, alphas), gradients(1e-3 * expected, alphas), strict=True):
        torch.testing.assert_close(a, b)
    # one distribution over the whole table, as if its rows were no edges, is another number
    whole = concentration(alphas["normal"]).flatten()
    assert abs(kl_divergence(Dirichlet(whole), Dirichlet(torch.ones(20).double())) - expected) > 1


def test_l2_beta_is_the_distance_of_the_concentrations_from_1(alphas):
    got = get_regularizer("l2_beta")(alphas, 0.5)
    tables = [alphas["normal"], alphas["reduce"]]
    squares = sum((torch.where(a > 0, a, a.exp() - 1) ** 2).sum() for a in tables)
    torch.testing.assert_close(got, 0.5 * squares.sqrt())
    for a, b in zip(gradients(got, alphas), gradients(0.5 * squares.sqrt(), alphas), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["kl", "l2_beta"])
def test_nothing_is_lost_where_nothing_is_preferred(name):
    alphas = {"cell": torch.zeros(6, 5, requires_grad=True)}
    loss = get_regularizer(name)(alphas, 1.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, alphas["cell"])[0].abs().max() < 1e-6


@pytest.mark.parametrize("name", ["kl", "l2_beta"])
@pytest.mark.parametrize("value", [-1e4, -30.0, 1e4])
def test_extreme_alphas(name, value):
    alphas = {"cell": torch.tensor([[value, 0.0, 1.0]], requires_grad=True)}
    loss = get_regularizer(name)(alphas, 1.0)
    assert loss > 0
    assert math.isfinite(loss.item())
    assert torch.autograd.grad(loss, alphas["cell"])[0].isfinite().all()


@pytest.mark.parametrize("name", ["none", "l2"])
def test_what_adds_nothing_to_the_loss(name, alphas):
    regularizer = get_regularizer(name)
    assert regularizer.penalty is None
    assert regularizer.weight_decay == (name == "l2")
    assert regularizer(alphas, 10.0).item() == 0


def test_relaxations():
    for name, regularizer in REGULARIZERS.items():
        regularizer.check("dirichlet")
        if name in ("none", "l2"):
            regularizer.check("softmax")
        else:
            with pytest.raises(
                ValueError, match=f"regularizer '{name}' is of the relaxation 'dirichlet', not 'softmax'"
            ):
                regularizer.check("softmax")
    with pytest.raises(ValueError, match="regularizer 'l1' is unknown: expected one of kl, l2, l2_beta, none"):
        get_regularizer("l1")
