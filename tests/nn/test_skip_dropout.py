import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas.nn import MixedOp, NASBench201Supernet, Supernet
from fastnas.nn.operations import FactorizedReduce, Identity, Zero
from fastnas.nn.skip_dropout import ReduceDropout, SkipDropout, set_skip_dropout


def build(space, k=1):
    torch.manual_seed(0)
    if space == "darts":
        net, edges, shape = Supernet(4 * k, 3, 5, 2, k=k), {"normal": (14, 8), "reduce": (14, 8)}, (2, 2, 8, 12)
    else:
        net, edges, shape = NASBench201Supernet(4, 1, 5, 2, k=k), {"cell": (6, 5)}, (2, 2, 8, 4)
    return net.double(), {n: torch.rand(s, dtype=torch.float64) for n, s in edges.items()}, torch.randn(shape).double()


def test_module():
    m, x = SkipDropout(0.25), torch.ones(100, 4, 5, 5)
    torch.manual_seed(3)
    y = m(x)
    torch.manual_seed(3)
    assert torch.equal(y, F.dropout(x, 0.25))
    assert 0.2 < (y == 0).double().mean() < 0.3
    assert m.eval()(x) is x
    assert repr(m) == "SkipDropout(p=0.25)"
    m.p = 0.0
    assert torch.equal(m.train()(x), x)


@pytest.mark.parametrize(("space", "k"), [("darts", 1), ("darts", 2), ("nb201", 1), ("nb201", 2)])
def test_names_and_parameters_stay_and_it_comes_off(space, k):
    net, weights, x = build(space, k)
    twin = copy.deepcopy(net)
    parameters, keys, kinds = dict(net.named_parameters()), list(net.state_dict()), list(map(type, net.modules()))
    skips = [op for _, _, edge in net.mixed_ops() for op in edge._ops if isinstance(op, (Identity, FactorizedReduce))]
    assert len(skips) == len(list(net.mixed_ops()))
    for p in (0.4, 0.7):
        set_skip_dropout(net, p)
        dropped = [m for m in net.modules() if isinstance(m, (SkipDropout, ReduceDropout))]
        assert len(dropped) == len(skips)
        assert {m.p for m in dropped} == {p}
        assert list(net.state_dict()) == keys
        assert all(q is parameters[name] for name, q in net.named_parameters())
    torch.testing.assert_close(net.eval()(x, weights), twin.eval()(x, weights), rtol=1e-12, atol=1e-12)
    set_skip_dropout(net, 0)
    assert list(map(type, net.modules())) == kinds
    torch.testing.assert_close(net.train()(x, weights), twin.train()(x, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "emulated", "reference"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("choice", [None, 3])
def test_an_edge_equals_its_modules(choice, stride, backend, request, monkeypatch):
    if backend == "emulated":
        request.getfixturevalue("emulated")

    def dropout(x, p, training):  # torch's own draws in the order of memory, which differs between backends
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) > p
        return x * kept / (1 - p) if training else x

    monkeypatch.setattr(F, "dropout", dropout)
    torch.manual_seed(0)
    edge = MixedOp(4, stride, k=2 if choice else 1).double()
    set_skip_dropout(Edges(edge), 0.5)
    part = 4 // edge.k
    x = torch.randn(3, 4, 6, 10, dtype=torch.float64).requires_grad_()
    weights = torch.rand(8, dtype=torch.float64).requires_grad_()
    with torch.no_grad(), fastnas.use_backend(backend):  # another mode before
        edge.eval()(x, weights)
        edge.train()
    other = copy.deepcopy(edge)
    with fastnas.use_backend(backend):
        y = edge(x, weights, choice)
    with fastnas.use_backend("reference"):
        drop = weights[3] * other._ops[3](x[:, :part])
        if choice is None:
            drop = drop + sum(weights[o] * op(x) for o, op in enumerate(other._ops) if o != 3)
    if edge.k == 2:
        rest = x[:, part:] if stride == 1 else F.max_pool2d(x[:, part:], 2, 2)
        drop = torch.cat([drop, rest], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(y, drop, rtol=1e-9, atol=1e-9)
    leaves = [x, weights]
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, drop))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert (ours[1][3] != 0).all()


class Edges:
    """What a network says of its edges."""

    def __init__(self, *edges):
        self.edges = edges

    def mixed_ops(self):
        return (("cell", i, edge) for i, edge in enumerate(self.edges))


@pytest.mark.parametrize("space", ["darts", "nb201"])
def test_in_training_skips_are_dropped_and_the_rest_is_not(space):
    net, weights, x = build(space)
    skip = 3 if space == "darts" else 1
    twin = copy.deepcopy(net)
    set_skip_dropout(net, 0.5)
    without = {n: w.clone() for n, w in weights.items()}
    for w in without.values():
        w[:, skip] = 0.0
    torch.testing.assert_close(net(x, without), twin(x, without), rtol=1e-9, atol=1e-9)
    first, second = net(x, weights), net(x, weights)
    assert not torch.allclose(first, second)
    torch.manual_seed(1)
    once = net(x, weights)
    torch.manual_seed(1)
    assert torch.equal(net(x, weights), once)


def test_pruned_skips_and_copies():
    net, weights, x = build("darts")
    for _, _, edge in net.mixed_ops():
        edge.keep([1, 4])
    set_skip_dropout(net, 0.5)
    assert not [m for m in net.modules() if isinstance(m, (SkipDropout, ReduceDropout))]
    assert isinstance(net.cells[0]._ops[0]._ops[3], Zero)
    net, weights, x = build("darts")
    set_skip_dropout(net, 0.5)
    for duplicate in (copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))):
        other = duplicate(net)
        torch.testing.assert_close(other.eval()(x, weights), net.eval()(x, weights))
        other.train(), net.train()
        torch.manual_seed(0)
        y = other(x, weights)
        torch.manual_seed(0)
        torch.testing.assert_close(y, net(x, weights))


def test_widened_with_dropout():
    edge = MixedOp(8, 2, k=4)
    set_skip_dropout(Edges(edge), 0.5)
    edge.wider(2)
    assert isinstance(edge._ops[3], ReduceDropout)
    assert edge(torch.randn(2, 8, 4, 4), torch.rand(8)).isfinite().all()


def test_modules_that_are_not_skip_connections_stay():
    edge = MixedOp([nn.Identity(), nn.Sequential(Identity())])
    set_skip_dropout(Edges(edge), 0.5)
    assert not [m for m in edge.modules() if isinstance(m, SkipDropout)]


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_p(p):
    with pytest.raises(ValueError, match=f"p={p} must be from 0 to below 1"):
        set_skip_dropout(Edges(), p)
