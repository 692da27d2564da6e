import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from test_host_sync import NoReads
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fastnas
from fastnas.nn import NASBench201Supernet, Supernet
from fastnas.relaxations import get_relaxation, softmax_per_node
from fastnas.search import Bilevel, first_order
from fastnas.search.architect import frozen, rewinding, second_order


def _problem():
    """loss = mean((alpha * w * x)²), one weight and one alpha."""
    net = nn.Linear(1, 1, bias=False).double()
    alphas = {"cell": torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)}

    def loss(batch):
        logits = alphas["cell"] * net(batch[0])
        return logits.square().mean(), logits

    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    batch = torch.tensor([[2.0], [1.0]], dtype=torch.float64), torch.zeros(2)
    return Bilevel(net, optimizer, alphas, loss), batch


def test_first_order_gradient():
    problem, batch = _problem()
    w = problem.supernet.weight.item()
    loss, logits = first_order(problem, batch, batch)
    # d/da mean((a w x)²) = 2 a w² mean(x²)
    torch.testing.assert_close(problem.alphas["cell"].grad, torch.tensor([[2 * 3.0 * w**2 * 2.5]], dtype=torch.float64))
    assert loss.item() == pytest.approx(9 * w**2 * 2.5)
    assert not loss.requires_grad
    assert not logits.requires_grad


def test_first_order_leaves_the_weights_alone():
    problem, batch = _problem()
    weight = problem.supernet.weight
    before = weight.detach().clone()
    first_order(problem, batch, batch)
    assert weight.grad is None
    assert weight.requires_grad
    weight.grad = torch.ones_like(weight)
    first_order(problem, batch, batch)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(weight, before)


def test_weights_are_frozen_while_the_alphas_learn():
    problem, batch = _problem()
    seen = []
    watching = Bilevel(
        problem.supernet,
        problem.optimizer,
        problem.alphas,
        lambda b: (seen.append(problem.supernet.weight.requires_grad), problem.loss(b))[1],
    )
    first_order(watching, batch, batch)
    assert seen == [False]


def test_frozen_restores_flags_after_an_error():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net[0].bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(net.parameters()):
        _ = 1 / sum(p.requires_grad for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]


SMOOTH = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")


def smooth(module):
    """ReLU makes gradients jump; without jumps, the error of a central difference is known."""
    for name, child in module.named_children():
        setattr(module, name, nn.Softplus() if isinstance(child, nn.ReLU) else smooth(child))
    return module


class Problem:
    """A small supernet and everything that its architecture step needs, in float64 unless told otherwise."""

    def __init__(self, relaxation="softmax", k=1, betas=False, space="darts", dtype=torch.float64, **sgd):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if space == "nb201":
                primitives = ("none", "skip_connect", "nor_conv_1x1", "avg_pool_3x3")
                net, types, edges = NASBench201Supernet(4, 1, 5, primitives=primitives), ("cell",), 6
            else:
                primitives = SMOOTH
                net = Supernet(4, 3, 5, primitives=primitives, steps=2, multiplier=2, k=k)
                types, edges = ("normal", "reduce"), 5
            self.net = smooth(net).to(dtype)
            self.alphas = {t: torch.randn(edges, len(primitives), dtype=dtype).requires_grad_() for t in types}
            if betas:
                self.alphas |= {f"betas-{t}": torch.randn(edges, dtype=dtype).requires_grad_() for t in types}
            self.train, self.valid, other = (
                (torch.randn(6, 3, 8, 8, dtype=dtype), torch.randint(5, (6,))) for _ in range(3)
            )
        self.types = types
        self.relax = get_relaxation(relaxation)
        self.generator = torch.Generator().manual_seed(7)
        options = {"lr": 0.2, "momentum": 0.9, "weight_decay": 3e-2, **sgd}
        self.optimizer = torch.optim.SGD(self.net.parameters(), **options)
        if options["momentum"]:
            self.loss(other)[0].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for alpha in self.alphas.values():
                alpha.grad = None
        self.bilevel = Bilevel(self.net, self.optimizer, self.alphas, self.loss, rewinding([self.generator]))

    def loss(self, batch, network=None):
        weights = {t: self.relax(self.alphas[t], self.generator) for t in self.types}
        inputs = [batch[0], weights]
        if f"betas-{self.types[0]}" in self.alphas:
            inputs.append({t: softmax_per_node(self.alphas[f"betas-{t}"]) for t in self.types})
        logits = (network or self.net)(*inputs)
        return F.cross_entropy(logits, batch[1]), logits

    def exact(self):
        """The gradient of L_valid(w - step(∇w L_train)) by differentiating through the step, and the loss."""
        rewind = rewinding([self.generator])()
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        buffers = {name: b.clone() for name, b in self.net.named_buffers()}
        group_of = {p: g for g in self.optimizer.param_groups for p in g["params"]}

        def loss(values, batch):
            rewind()
            state = {**dict(zip(names, values, strict=True)), **buffers}
            return self.loss(batch, lambda *inputs: functional_call(self.net, state, inputs))[0]

        with fastnas.twice_differentiable():
            gradients = torch.autograd.grad(
                loss(parameters, self.train), parameters, create_graph=True, allow_unused=True
            )
            unrolled = []
            for p, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    unrolled.append(p)
                    continue
                group = group_of[p]
                step = gradient + group["weight_decay"] * p
                buffer = self.optimizer.state[p].get("momentum_buffer") if p in self.optimizer.state else None
                momentum = group["momentum"] * (torch.zeros_like(p) if buffer is None else buffer) + step
                step = step + group["momentum"] * momentum if group["nesterov"] else momentum
                unrolled.append(p - group["lr"] * step)
            value = loss(unrolled, self.valid)
            gradient = torch.autograd.grad(value, list(self.alphas.values()), materialize_grads=True, allow_unused=True)
        rewind()
        return gradient, value.detach()

    def step(self, **options):
        loss, _ = second_order(self.bilevel, self.train, self.valid, **options)
        return [alpha.grad for alpha in self.alphas.values()], loss


def error(got, expected):
    got, expected = (torch.cat([g.flatten() for g in side]) for side in (got, expected))
    return float((got - expected).norm() / expected.norm())


PROBLEMS = {
    "plain": {"momentum": 0.0, "weight_decay": 0.0},
    "momentum": {},
    "nesterov": {"nesterov": True},
    "tensor": {"lr": torch.tensor(0.2)},
    "partial": {"k": 2},
    "betas": {"k": 2, "betas": True},
    "dirichlet": {"relaxation": "dirichlet", "k": 2, "betas": True},
    "gumbel": {"relaxation": "gumbel_softmax"},
    "gdas": {"relaxation": "gdas"},
    "nb201": {"space": "nb201", "relaxation": "dirichlet"},
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
def test_second_order_is_the_exact_unrolled_gradient(options, backend):
    problem = Problem(**options)
    exact, loss = problem.exact()
    with fastnas.use_backend(backend):
        first_order(problem.bilevel, problem.train, problem.valid)
        shortened = [alpha.grad for alpha in problem.alphas.values()]
        problem.generator.manual_seed(7)
        exact, loss = problem.exact()
        got, value = problem.step(radius=1e-4)
    # what it adds to first order is not negligible here, so agreement says something about it
    assert error(shortened, exact) > 0.05
    assert error(got, exact) < 1e-6
    torch.testing.assert_close(value, loss)
    assert not value.requires_grad


def test_learning_rates_of_groups():
    problem = Problem()
    cells = list(problem.net.cells.parameters())
    others = [p for p in problem.net.parameters() if not any(p is q for q in cells)]
    state = problem.optimizer.state
    groups = [{"params": cells, "lr": 0.3, "nesterov": True}, {"params": others, "lr": 0.02, "weight_decay": 0.5}]
    problem.optimizer = torch.optim.SGD(groups, momentum=0.9)
    problem.optimizer.state = state
    problem.bilevel = Bilevel(problem.net, problem.optimizer, problem.alphas, problem.loss)
    exact, _ = problem.exact()
    got, _ = problem.step(radius=1e-4)
    assert error(got, exact) < 1e-6


def test_the_error_falls_with_the_square_of_the_radius_until_rounding_takes_over():
    problem = Problem("dirichlet", betas=True)  # with k > 1, what bypasses stride 2 is max-pooled, which has jumps
    exact, _ = problem.exact()
    state = problem.generator.get_state()
    errors = []
    for exponent in range(11):
        problem.generator.set_state(state)
        errors.append(error(problem.step(radius=10.0**-exponent)[0], exact))
    for coarse, fine in itertools.pairwise(errors[1:5]):
        assert 50 < coarse / fine < 200
    assert errors[2] < 3e-3  # the published radius
    assert min(errors) < 1e-8
    assert errors[10] > 30 * min(errors)


def same(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("passes", [1, 2, 3, 4, None])
def test_second_order_leaves_everything_as_it_was(passes):
    """After a step, and after one that fails in any of its passes."""
    problem = Problem("dirichlet", dtype=torch.float32)
    net = problem.net
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.stem[0].weight.requires_grad_(False)
    before = copy.deepcopy((net.state_dict(), problem.optimizer.state_dict(), [p.grad for p in net.parameters()]))
    calls, seen = [], []

    def loss(batch):
        calls.append(batch is problem.valid)
        seen.append(net.classifier.weight.detach().clone())
        if len(calls) == passes:
            raise KeyboardInterrupt
        return problem.loss(batch)

    bilevel = Bilevel(net, problem.optimizer, problem.alphas, loss, problem.bilevel.rewind)
    if passes is None:
        second_order(bilevel, problem.train, problem.valid)
        assert calls == [False, True, False, False]
        assert not any(torch.equal(seen[0], other) for other in seen[1:])
    else:
        with pytest.raises(KeyboardInterrupt):
            second_order(bilevel, problem.train, problem.valid)
    state, moments, gradients = before
    assert same(net.state_dict().values(), state.values())
    assert same([p.grad for p in net.parameters()], gradients)
    after = problem.optimizer.state_dict()["state"]
    assert same(
        [m["momentum_buffer"] for m in after.values()], [m["momentum_buffer"] for m in moments["state"].values()]
    )
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["stem.0.weight"]
    assert all(alpha.requires_grad for alpha in problem.alphas.values())


def test_a_step_needs_one_copy_of_the_weights_which_it_keeps():
    problem = Problem()
    problem.step()
    room = problem.bilevel.copies._room
    tensors = [*problem.net.parameters(), *problem.net.buffers()]
    assert sum(t.numel() for t in room) == sum(t.numel() for t in tensors)
    problem.step()
    assert all(a is b for a, b in zip(room, problem.bilevel.copies._room, strict=True))
    # other shapes, as after widening
    problem.net.classifier = nn.Linear(32, 7).double()
    optimizer = torch.optim.SGD(problem.net.parameters(), 0.1)
    second_order(dataclasses.replace(problem.bilevel, optimizer=optimizer), problem.train, problem.valid)
    tensors = [*problem.net.parameters(), *problem.net.buffers()]
    assert [t.shape for t in problem.bilevel.copies._room] == [t.shape for t in tensors]


def test_all_passes_share_one_draw():
    problem = Problem("dirichlet")
    drawn = []
    relax = problem.relax
    problem.relax = lambda *a: (drawn.append(relax(*a).detach()), relax(*a))[1]
    problem.step()
    normal = drawn[::2]
    assert len(normal) == 4
    assert same(normal, [normal[0]] * 4)
    first = normal[0]
    drawn.clear()
    problem.step()
    assert not torch.equal(drawn[0], first)


def test_without_a_gradient_the_implicit_part_is_zero():
    """Where w' has no influence on the validation loss, R = 0.01 / 0 must not spoil the alphas."""
    problem = Problem(momentum=0.0, weight_decay=0.0)

    def loss(batch):
        train, logits = problem.loss(batch)
        alphas = sum(alpha.square().sum() for alpha in problem.alphas.values())
        return (train if batch is problem.train else 0 * train + alphas), logits

    bilevel = Bilevel(problem.net, problem.optimizer, problem.alphas, loss)
    second_order(bilevel, problem.train, problem.valid)
    for alpha in problem.alphas.values():
        torch.testing.assert_close(alpha.grad, 2 * alpha.detach())


def test_parameters_that_are_not_reached_stay():
    """As on the paths that are not sampled: SGD leaves them alone, momentum and weight decay included."""
    problem = Problem()
    spare = nn.Parameter(torch.ones(3).double())
    problem.optimizer.add_param_group({"params": [spare]})
    problem.optimizer.state[spare]["momentum_buffer"] = torch.ones(3).double()
    seen = []

    def loss(batch):
        seen.append(spare.detach().clone())
        value, logits = problem.loss(batch)
        return (value + spare.square().sum() if batch is problem.valid else value), logits

    exact, _ = problem.exact()
    second_order(
        Bilevel(problem.net, problem.optimizer, problem.alphas, loss), problem.train, problem.valid, radius=1e-4
    )
    assert same(seen, [torch.ones(3).double()] * 4)
    assert error([alpha.grad for alpha in problem.alphas.values()], exact) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Adam, "optimizer is Adam: second order unrolls a step of torch.optim.SGD"),
        (functools.partial(torch.optim.SGD, momentum=0.9, dampening=0.1), "optimizer has dampening=0.1"),
        (functools.partial(torch.optim.SGD, maximize=True), "optimizer has maximize=True"),
    ],
)
def test_optimizers_that_cannot_be_unrolled(make, message):
    problem = Problem()
    bilevel = Bilevel(problem.net, make(problem.net.parameters(), lr=0.1), problem.alphas, problem.loss)
    with pytest.raises(ValueError, match=message):
        second_order(bilevel, problem.train, problem.valid)


@pytest.mark.parametrize("relaxation", ["softmax", "dirichlet", "gumbel_softmax", "gdas"])
def test_second_order_reads_nothing_back(relaxation):
    problem = Problem(relaxation, dtype=torch.float32, lr=torch.tensor(0.1))
    problem.step()
    with NoReads() as mode:
        problem.step()
    assert mode.ops > 1000
