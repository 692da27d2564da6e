import copy
import dataclasses

import pytest
import torch
from torch.distributions import Dirichlet
from torch.nn import functional as F

import fastnas
from fastnas.nn import NASBench201Supernet, Supernet
from fastnas.relaxations import RELAXATIONS, concentration, dirichlet, exponentiated, get_relaxation, softmax, uniform
from fastnas.search.hessian import Curvature, curvature, lanczos


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Problem:
    """A small supernet in float64, its validation loss and its alphas."""

    def __init__(self, space):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if space == "nb201":
                self.net, shapes = NASBench201Supernet(4, 1, 5), {"cell": (6, 5)}
            else:
                self.net = Supernet(4, 3, 5, steps=2, multiplier=2, k=2)
                shapes = {"normal": (5, 8), "reduce": (5, 8)}
            self.net.double()
            self.alphas = {t: torch.randn(shape).double().requires_grad_() for t, shape in shapes.items()}
            self.images, self.labels = torch.randn(4, 3, 8, 8).double(), torch.randint(5, (4,))

    def loss(self, weights):
        return F.cross_entropy(self.net(self.images, weights), self.labels)

    def dense(self, over, mean):
        """The Hessian, one number of the gradient after another."""
        self.net.train()
        names = list(self.alphas)
        with fastnas.twice_differentiable():
            start = [a.detach() if over == "alphas" else mean(a).detach() for a in self.alphas.values()]
            leaves = [s.requires_grad_() for s in start]
            weights = [mean(leaf) for leaf in leaves] if over == "alphas" else leaves
            loss = self.loss(dict(zip(names, weights, strict=True)))
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)])
        rows = [
            torch.autograd.grad(g, leaves, retain_graph=True, materialize_grads=True, allow_unused=True) for g in flat
        ]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def figures(H, alphas=None):
    """The same by definition."""
    values = torch.linalg.eigvalsh(H)
    term = None
    if alphas is not None:
        rows = [row for table in alphas.values() for row in concentration(table).detach()]
        blocks = []
        for c in rows:
            mean, total = c / c.sum(), c.sum()
            blocks.append((torch.diag(mean) - torch.outer(mean, mean)) / (total + 1))
            torch.testing.assert_close(blocks[-1].diagonal(), Dirichlet(c).variance)
        term = float((H * torch.block_diag(*blocks)).sum() / 2)
    dominant = values[values.abs().argmax()]
    return Curvature(float(dominant), float(torch.linalg.matrix_norm(H)), float(H.trace()), term)


def close(got, expected, **tolerance):
    for field in dataclasses.fields(Curvature):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a == pytest.approx(b, **tolerance), field.name


@pytest.mark.parametrize("relax", [softmax, dirichlet, RELAXATIONS["gdas"]], ids=lambda r: r.name)
@pytest.mark.parametrize("over", ["weights", "alphas"])
@pytest.mark.parametrize("exact", [0, 32])
def test_curvature_is_that_of_the_dense_hessian(relax, over, exact):
    problem = Problem("nb201")
    H = problem.dense(over, relax.mean)
    torch.testing.assert_close(H, H.T, rtol=1e-8, atol=1e-10)
    expected = figures(H, problem.alphas if relax is dirichlet and over == "weights" else None)
    # as many steps of Lanczos as there are numbers see everything, so both ways are exact
    got = curvature(problem.net, problem.loss, problem.alphas, relax, over, exact=exact, iterations=30, vectors=4)
    assert abs(expected.eigenvalue) > 1e-3
    if exact:
        close(got, expected, rel=1e-8)
    else:
        assert got.eigenvalue == pytest.approx(expected.eigenvalue, rel=1e-6)


@pytest.mark.slow
def test_partial_channels_and_two_tables():
    problem = Problem("darts")
    expected = figures(problem.dense("weights", dirichlet.mean), problem.alphas)
    got = curvature(problem.net, problem.loss, problem.alphas, dirichlet, exact=80)
    close(got, expected, rel=1e-8)
    estimates = [
        curvature(problem.net, problem.loss, problem.alphas, dirichlet, vectors=4, generator=seeded(s))
        for s in range(2)
    ]
    for estimate in estimates:
        assert estimate.eigenvalue == pytest.approx(expected.eigenvalue, rel=1e-4)
        assert estimate.norm == pytest.approx(expected.norm, rel=0.1)
    again = curvature(problem.net, problem.loss, problem.alphas, dirichlet, vectors=4, generator=seeded(0))
    assert again == estimates[0]


def quadratic(H, shape=(10, 8)):
    """½ wᵀ H w as the loss of a table: its Hessian is H."""
    return lambda weights: (weights["cell"].flatten() @ H @ weights["cell"].flatten()) / 2, {
        "cell": torch.zeros(shape).double()
    }


def spectrum(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(3)).double())[0]
    return Q @ torch.diag(values) @ Q.T


@pytest.mark.parametrize("sign", [1, -1])
def test_estimates_are_unbiased_and_better_than_their_vectors(sign):
    """Where Lanczos cannot see all: 80 numbers, 8 steps."""
    values = sign * torch.cat([torch.tensor([-9.0, 7.0, 5.0]), torch.linspace(-1, 1.5, 77)]).double()
    H = spectrum(values)
    loss, alphas = quadratic(H)
    net = torch.nn.Identity()
    expected = figures(H, alphas)
    got = [
        curvature(net, loss, alphas, dirichlet, iterations=8, vectors=4, generator=seeded(s), exact=0)
        for s in range(200)
    ]
    for name in ("trace", "trace_term"):
        estimates = torch.tensor([getattr(g, name) for g in got], dtype=torch.float64)
        deviation = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - getattr(expected, name)) < 4 * deviation
    squares = torch.tensor([g.norm**2 for g in got], dtype=torch.float64)
    assert abs(squares.mean() - expected.norm**2) < 4 * squares.std() / len(squares) ** 0.5
    # the dominant eigenvalues are no part of what is estimated: four signs alone would scatter by this much
    plain = (2 * (H.square().sum() - H.diagonal().square().sum()) / 4).sqrt()
    traces = torch.tensor([g.trace for g in got], dtype=torch.float64)
    assert traces.std() < plain / 2


@pytest.mark.parametrize("dominant", [12.0, -12.0])
def test_lanczos_finds_the_dominant_eigenvalue(dominant):
    H = spectrum(torch.cat([torch.tensor([dominant, -10.0, 10.5]), torch.linspace(-9, 9, 197)]).double())
    calls = []
    basis, images = lanczos(lambda v: (calls.append(v), H @ v)[1], 200, 100, seeded())
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(images, H @ basis)
    values = torch.linalg.eigvalsh(basis.T @ images)
    assert float(values[values.abs().argmax()]) == pytest.approx(dominant, rel=1e-6)
    assert len(calls) == basis.shape[1] < 100


def test_lanczos_stops_where_the_space_is_invariant():
    v = torch.randn(50, generator=seeded(1)).double()
    H = torch.outer(v, v) - 0.5 * torch.eye(50).double()  # two eigenvalues
    basis, images = lanczos(lambda u: H @ u, 50, 50, seeded(), tolerance=0.0)
    assert basis.shape[1] <= 4
    assert float(torch.linalg.eigvalsh(basis.T @ images)[-1]) == pytest.approx(float(v @ v) - 0.5)
    basis, _ = lanczos(torch.zeros_like, 50, 50, seeded())
    assert basis.shape[1] == 1


def test_a_loss_without_curvature():
    slope = torch.randn(40, 8, generator=seeded()).double()
    alphas = {"cell": torch.zeros(40, 8).double()}
    net = torch.nn.Identity()
    assert curvature(net, lambda w: (w["cell"] * slope).sum(), alphas, softmax) == Curvature(0.0, 0.0, 0.0, None)
    assert curvature(net, lambda w: (w["cell"] * slope).sum(), alphas, uniform, "alphas").norm == 0.0
    assert curvature(net, lambda w: (w["cell"] * slope).sum(), alphas, softmax, "alphas").norm > 0.0


def test_exponentiated_gradients_have_the_curvature_of_softmax():
    problem = Problem("nb201")
    for over in ("weights", "alphas"):
        got = [curvature(problem.net, problem.loss, problem.alphas, r, over) for r in (exponentiated, softmax)]
        close(*got, rel=1e-12)


def test_the_supernet_is_untouched():
    problem = Problem("darts")
    net = problem.net.eval()
    net.cells[1].train()
    net.stem[0].weight.requires_grad_(False)
    net.classifier.weight.grad = torch.ones_like(net.classifier.weight)
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    seen = []

    def loss(weights):
        seen.append((net.stem[1].training, any(p.requires_grad for p in net.parameters())))
        return problem.loss(weights)

    curvature(net, loss, problem.alphas, dirichlet, iterations=2, vectors=1)
    with pytest.raises(ZeroDivisionError):
        curvature(net, lambda weights: loss(weights) * (1 / 0), problem.alphas, dirichlet)
    assert seen == [(True, False)] * 2
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))
    assert [m.training for m in net.modules()] == modes
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["stem.0.weight"]
    assert torch.equal(net.classifier.weight.grad, torch.ones_like(net.classifier.weight))
    assert all(alpha.grad is None for alpha in problem.alphas.values())


def test_float32_is_close():
    problem = Problem("nb201")
    expected = curvature(problem.net, problem.loss, problem.alphas, dirichlet)
    problem.net.float()
    problem.images = problem.images.float()
    alphas = {name: alpha.detach().float() for name, alpha in problem.alphas.items()}
    close(curvature(problem.net, problem.loss, alphas, dirichlet), expected, rel=1e-3)


@pytest.mark.parametrize("alphas", [{}, {"betas-cell": torch.zeros(6)}])
def test_without_tables(alphas):
    with pytest.raises(ValueError, match="alphas has no table"):
        curvature(torch.nn.Identity(), lambda w: torch.zeros(()), alphas, softmax)


def test_over():
    with pytest.raises(ValueError, match="over='alpha': expected 'weights' or 'alphas'"):
        curvature(
            torch.nn.Identity(),
            lambda w: torch.zeros(()),
            {"cell": torch.zeros(2, 2)},
            get_relaxation("softmax"),
            "alpha",
        )
