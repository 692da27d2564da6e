"""Relaxations that draw: moments, gradients and generators; and the exponentiated gradient."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import betainc
from torch.distributions import Dirichlet

from fastnas.relaxations import RELAXATIONS, concentration, dirichlet, exponentiated, gdas, gumbel_softmax, uniform

SAMPLED = [name for name, relax in RELAXATIONS.items() if relax.sampler is not None]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def alphas_of(rows, dtype=torch.float64, seed=1, candidates=4):
    return torch.randn(rows, candidates, generator=seeded(seed), dtype=torch.float64).to(dtype).requires_grad_()


def many(relax, alpha, draws, temperature=1.0):
    """Draws of one row of alphas, (draws, O), as one call's rows."""
    return relax(alpha.expand(draws, -1), seeded(), temperature)


def test_names():
    assert {"dirichlet", "gumbel_softmax", "gdas", "uniform"} == set(SAMPLED)
    assert [name for name in SAMPLED if RELAXATIONS[name].single_path] == ["gdas", "uniform"]


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_generator_decides(name, dtype):
    relax, alphas = RELAXATIONS[name], alphas_of(14, dtype)
    generator = seeded()
    state = generator.get_state()
    first, second = relax(alphas, generator), relax(alphas, generator)
    assert not torch.equal(first, second)
    generator.set_state(state)
    assert torch.equal(relax(alphas, generator), first)
    assert torch.equal(relax(alphas, generator), second)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        before = torch.get_rng_state()
        relax(alphas, generator)
        assert torch.equal(torch.get_rng_state(), before)
        globally = relax(alphas)
        torch.manual_seed(3)
        assert torch.equal(relax(alphas), globally)


def test_concentration():
    alphas = torch.tensor([[-1e4, -20.0, -13.0, -1.0, 0.0, 2.0]])
    expected = [1e-6, 1e-6, math.exp(-13), math.exp(-1), 1.0, 3.0]
    torch.testing.assert_close(concentration(alphas), torch.tensor([expected]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("centre", [-3.0, 0.0, 3.0])
def test_dirichlet_moments(centre):
    alpha = alphas_of(1) + centre
    c = concentration(alpha)[0]
    draws = many(dirichlet, alpha, 200_000)
    expected = Dirichlet(c)
    deviation = (draws - expected.mean).mean(0) / (expected.variance / len(draws)).sqrt()
    assert deviation.abs().max() < 4
    torch.testing.assert_close(draws.var(0), expected.variance, rtol=0.03, atol=0)
    torch.testing.assert_close(dirichlet.mean(alpha)[0], expected.mean)
    # the whole marginal, which is Beta
    for o in range(4):
        beta = stats.beta(c[o].item(), (c.sum() - c[o]).item())
        assert stats.kstest(draws[:2000, o].detach().numpy(), beta.cdf).pvalue > 1e-3


def test_dirichlet_of_gammas_that_would_underflow():
    """Where every gamma variable is 0 in float32, a row is nearly one-hot, each candidate as often as it should."""
    alpha = torch.tensor([[-12.0, -12.0, -12.0, -12.0 + math.log(3.0)]], requires_grad=True)
    draws = many(dirichlet, alpha, 60_000)
    assert draws.isfinite().all()
    assert (draws.amax(-1) > 0.999).float().mean() > 0.999
    frequency = draws.mean(0)
    torch.testing.assert_close(frequency, torch.tensor([1, 1, 1, 3]) / 6, rtol=0, atol=4 * 0.5 / math.sqrt(60_000))
    torch.testing.assert_close(dirichlet.mean(alpha), torch.tensor([[1, 1, 1, 3]]) / 6)


def test_the_mean_has_the_order_of_the_alphas():
    alphas = alphas_of(50) * 4
    assert torch.equal(dirichlet.mean(alphas).argsort(-1), alphas.argsort(-1))


def implicit_jacobian(x, c):
    """d x_j / d c_i of one row at fixed values of the marginals' CDFs, by central differences of the CDF."""
    n = len(x)
    jacobian = np.empty((n, n))
    for i in range(n):
        rest, h = c.sum() - c[i], 1e-6 * c[i]
        density = stats.beta.pdf(x[i], c[i], rest)
        own = -(betainc(c[i] + h, rest, x[i]) - betainc(c[i] - h, rest, x[i])) / (2 * h * density)
        jacobian[:, i] = -x / (1 - x[i]) * own
        jacobian[i, i] = own
    return jacobian


@pytest.mark.parametrize("centre", [-1.0, 0.0, 2.0])
def test_dirichlet_gradient_is_the_derivative_at_fixed_cdf(centre):
    alphas = (alphas_of(20).detach() + centre).requires_grad_()
    c = concentration(alphas)
    gradient = torch.randn(20, 4, generator=seeded(2), dtype=torch.float64)
    sample = dirichlet(alphas, seeded())
    got = torch.autograd.grad(sample, alphas, gradient)[0]
    slopes = torch.where(alphas > 0, 1.0, alphas.exp())
    for row in range(20):
        jacobian = torch.from_numpy(implicit_jacobian(sample[row].detach().numpy(), c[row].detach().numpy()))
        expected = (gradient[row] @ jacobian) * slopes[row]
        # torch approximates the derivative of the beta CDF to three digits
        torch.testing.assert_close(
            got[row].detach(), expected.detach(), rtol=5e-3, atol=1e-4 * float(expected.detach().norm())
        )


def test_dirichlet_gradient_is_that_of_torch_distributions():
    alphas = alphas_of(14)
    c = concentration(alphas).detach().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = Dirichlet(c).rsample()
    ours = dirichlet(alphas, seeded())
    # the samples differ; the same function of them does not
    total = c.detach().sum(-1, keepdim=True).expand_as(c)
    for sample, variable, slope in ((theirs, c, 1.0), (ours, alphas, torch.where(alphas > 0, 1.0, alphas.exp()))):
        rates = torch._dirichlet_grad(sample.detach(), c.detach(), total)
        gradient = torch.randn(14, 4, generator=seeded(2), dtype=torch.float64)
        expected = rates * (gradient - (sample * gradient).sum(-1, keepdim=True)) * slope
        got = torch.autograd.grad(sample, variable, gradient)[0]
        torch.testing.assert_close(got, expected.detach())


def test_dirichlet_gradient_of_expectations():
    """Averaged over draws, the gradients of x_0² and x_0 x_1 are those of their expectations in closed form."""
    alpha = (alphas_of(1).detach() - 0.3).requires_grad_()
    c = concentration(alpha)[0]
    total = c.sum()
    expectations = {(0, 0): c[0] * (c[0] + 1), (0, 1): c[0] * c[1]}
    leaf = alpha.detach().expand(200_000, -1).clone().requires_grad_()
    x = dirichlet(leaf, seeded())
    for (i, j), moment in expectations.items():
        expected = torch.autograd.grad(moment / (total * (total + 1)), alpha, retain_graph=True)[0][0]
        each = torch.autograd.grad((x[:, i] * x[:, j]).sum(), leaf, retain_graph=True)[0]
        deviation = (each.mean(0) - expected) / (each.std(0) / math.sqrt(len(each)))
        assert deviation.abs().max() < 4.5
        assert expected.abs().max() > 0.01


def test_dirichlet_in_bfloat16_is_float32_rounded():
    alphas = alphas_of(14, torch.bfloat16)
    wide = alphas.detach().float().requires_grad_()
    sample, exact = dirichlet(alphas, seeded()), dirichlet(wide, seeded())
    assert torch.equal(sample, exact.bfloat16())
    gradient = torch.randn(14, 4, generator=seeded(2)).bfloat16()
    got = torch.autograd.grad(sample, alphas, gradient)[0]
    expected = torch.autograd.grad(exact, wide, gradient.float())[0]
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_gumbel_softmax_is_the_closed_form(temperature):
    alphas = alphas_of(14)
    generator = seeded()
    sample = gumbel_softmax(alphas, generator, temperature)
    gumbels = -torch.empty(14, 4, dtype=torch.float64).exponential_(generator=seeded()).log()
    expected = ((alphas + gumbels) / temperature).exp()
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(sample, expected)
    gradient = torch.randn(14, 4, generator=seeded(2), dtype=torch.float64)
    got = torch.autograd.grad(sample, alphas, gradient)[0]
    by_hand = expected * (gradient - (expected * gradient).sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(got, by_hand.detach())
    assert torch.autograd.gradcheck(lambda a: gumbel_softmax(a, seeded(), temperature), alphas)


@pytest.mark.parametrize("relax", [gumbel_softmax, gdas], ids=lambda r: r.name)
def test_the_largest_is_categorical(relax):
    alpha = alphas_of(1)
    draws = many(relax, alpha, 100_000, 0.7)
    p = alpha.softmax(-1)[0]
    frequency = torch.bincount(draws.argmax(-1), minlength=4) / len(draws)
    assert ((frequency - p) / (p * (1 - p) / len(draws)).sqrt()).abs().max() < 4
    torch.testing.assert_close(relax.mean(alpha)[0], p)


def test_a_low_temperature_is_one_hot():
    alphas = alphas_of(200)
    assert (gumbel_softmax(alphas, seeded(), 1e-3).amax(-1) > 0.99).double().mean() > 0.97
    torch.testing.assert_close(
        gumbel_softmax(alphas, seeded(), 1e6), torch.full((200, 4), 0.25).double(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("relax", [gumbel_softmax, gdas], ids=lambda r: r.name)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature(relax, temperature):
    with pytest.raises(ValueError, match=r"temperature=.*: expected a number above 0"):
        relax(alphas_of(1), None, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_gdas_is_one_hot_with_the_gradient_of_the_softmax(dtype, temperature):
    alphas = alphas_of(200, dtype)
    sample = gdas(alphas, seeded(), temperature)
    assert sample.unique().tolist() == [0.0, 1.0]
    assert torch.equal(sample.sum(-1), torch.ones(200, dtype=dtype))
    soft = gumbel_softmax(alphas, seeded(), temperature)
    # the candidate is chosen before anything is rounded, which makes ties in bfloat16
    assert torch.equal((sample * soft).sum(-1), soft.amax(-1))
    if dtype == torch.float64:
        jacobian = torch.diag_embed(soft) - soft[:, :, None] * soft[:, None, :]
        gradient = torch.randn(200, 4, generator=seeded(2), dtype=dtype)
        expected = torch.einsum("ro,roi->ri", gradient, jacobian) / temperature
        torch.testing.assert_close(torch.autograd.grad(sample, alphas, gradient)[0], expected.detach())


def test_uniform():
    alphas = alphas_of(40_000)
    sample = uniform(alphas, seeded())
    assert sample.unique().tolist() == [0.0, 1.0]
    assert torch.equal(sample.sum(-1), torch.ones(40_000).double())
    assert ((sample.mean(0) - 0.25) / math.sqrt(0.25 * 0.75 / 40_000)).abs().max() < 4
    assert torch.equal(uniform.mean(alphas), torch.full((40_000, 4), 0.25).double())
    for weights in (sample, uniform.mean(alphas)):
        gradient = torch.autograd.grad(weights[:, 0].sum(), alphas)[0]
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_uniform_leaves_the_alphas_out():
    broken = torch.full((3, 4), math.nan, requires_grad=True)
    sample = uniform(broken, seeded())
    assert torch.equal(sample, uniform(torch.zeros(3, 4), seeded()))
    assert not torch.autograd.grad(sample.sum(), broken)[0].any()


def test_sgd_on_alphas_is_exponentiated_gradient_descent_on_weights():
    alphas = alphas_of(6)
    weights = alphas.detach().softmax(-1)
    target = torch.rand(6, 4, generator=seeded(5), dtype=torch.float64)
    optimizer = torch.optim.SGD([alphas], lr=0.7)
    for _ in range(30):
        optimizer.zero_grad()
        (exponentiated(alphas) - target).pow(4).sum().backward()
        optimizer.step()
        weights = weights * torch.exp(-0.7 * 4 * (weights - target).pow(3))
        weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(exponentiated(alphas).detach(), weights, rtol=1e-12, atol=1e-14)
    assert (weights - alphas_of(6).detach().softmax(-1)).abs().max() > 0.05
