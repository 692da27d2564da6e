"""Single paths: what plain PyTorch computes of the chosen candidates, and nothing of the others."""

import copy
import math
from typing import ClassVar

import pytest
import torch
from darts_reference import PRIMITIVES, Reference, state_of
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas.nn import Cell, MixedOp, NASBench201Supernet, Supernet, mixed_op

WAYS = ["fused", "edge by edge", "emulated", "reference"]


@pytest.fixture(params=WAYS)
def way(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    return request.param


def forward_by(way, net, *args, **kwargs):
    if way == "edge by edge":
        for _, _, op in net.mixed_ops():
            op.register_forward_hook(lambda *_: None)
    with fastnas.use_backend(way if way in ("emulated", "reference") else "native"):
        return net(*args, **kwargs)


class PathReference(Reference):
    """The DARTS network of which only ``choices[cell type][edge]`` is there."""

    choices: ClassVar = []

    def mixed_op(self, name, x, weights, stride):
        cell, edge = (int(part) for part in name.split(".") if part.isdigit())
        o = self.choices[cell][edge]
        part, rest = x[:, : x.shape[1] // self.k], x[:, x.shape[1] // self.k :]
        y = weights[o] * self.candidate(PRIMITIVES[o], f"{name}._ops.{o}", part, stride)
        if self.k == 1:
            return y
        y = torch.cat([y, F.max_pool2d(rest, 2, 2) if stride == 2 else rest], 1)
        return y.unflatten(1, (self.k, -1)).transpose(1, 2).flatten(1, 2)


def random_path(edges, candidates, generator):
    return torch.randint(candidates, (edges,), generator=generator).tolist()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels", "k", "with_betas"), [(4, 1, False), (4, 1, True), (8, 4, True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_darts_equals_the_definition(channels, k, with_betas, training, seed, way):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Supernet(channels, 3, 5, 2, k=k).double().train(training)
    path = {name: random_path(14, 8, generator) for name in ("normal", "reduce")}
    path["normal"][:2], path["reduce"][:3] = [0, 0], [3, 0, 3]  # a node of zeros; FactorizedReduce
    weights = {name: torch.rand(14, 8, dtype=torch.float64).requires_grad_() for name in path}
    betas = {name: torch.rand(14, dtype=torch.float64).requires_grad_() for name in path} if with_betas else None
    x = torch.randn(3, 2, 12, 8, dtype=torch.float64)
    state = state_of(net, torch.float64)
    tables = [*weights.values(), *(betas.values() if betas else [])]

    y = forward_by(way, net, x, weights, betas, path=path)
    ours = torch.autograd.grad(y.square().sum(), [*tables, *net.parameters()], allow_unused=True)
    reference = PathReference(state, training, k)
    reference.choices = [path["normal"], path["reduce"], path["reduce"]]
    expected = reference.network(x, weights, 3, betas)
    parameters = [state[name] for name, _ in net.named_parameters()]
    theirs = torch.autograd.grad(expected.square().sum(), [*tables, *parameters], allow_unused=True)

    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    assert [g is None for g in ours] == [g is None for g in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    for name, buffer in net.named_buffers():  # of what ran, and nothing else
        torch.testing.assert_close(buffer, state[name], rtol=1e-9, atol=1e-10)
    for name, gradient in zip(path, ours, strict=False):
        chosen = F.one_hot(torch.tensor(path[name]), 8).bool()
        assert not gradient[~chosen].any()
        assert gradient[chosen].any()


@pytest.mark.parametrize(("k", "with_betas"), [(1, False), (2, True)])
def test_nasbench201_equals_its_chosen_modules(k, with_betas, way):
    torch.manual_seed(k)
    generator = torch.Generator().manual_seed(k)
    for _ in range(3):
        net = NASBench201Supernet(4, 1, 3, 2, k=k).double()
        other = copy.deepcopy(net)
        path = random_path(6, 5, generator)
        weights = torch.rand(6, 5, dtype=torch.float64).requires_grad_()
        betas = torch.rand(6, dtype=torch.float64).requires_grad_() if with_betas else None
        leaves = [weights] if betas is None else [weights, betas]
        x = torch.randn(3, 2, 8, 4, dtype=torch.float64)

        def by_hand(state, other=other, path=path, weights=weights, betas=betas):
            for cell in other.cells:
                if not hasattr(cell, "_ops"):
                    state = cell(state)
                    continue
                nodes = [state]
                for i in range(1, 4):
                    ends = []
                    for j in range(i):
                        e = i * (i - 1) // 2 + j
                        c = nodes[j].shape[1] // k
                        y = weights[e, path[e]] * cell._ops[e]._ops[path[e]](nodes[j][:, :c])
                        y = torch.cat([y, nodes[j][:, c:]], 1).unflatten(1, (k, -1)).transpose(1, 2).flatten(1, 2)
                        ends.append(y if betas is None else betas[e] * y)
                    nodes.append(sum(ends))
                state = nodes[-1]
            return other.classifier(other.lastact(state).mean((2, 3)))

        y = forward_by(way, net, x, {"cell": weights}, betas, path={"cell": path})
        with fastnas.use_backend("reference"):
            expected = by_hand(other.stem(x))
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
        ours = torch.autograd.grad(y.square().sum(), [*leaves, *net.parameters()], materialize_grads=True)
        theirs = torch.autograd.grad(expected.square().sum(), [*leaves, *other.parameters()], materialize_grads=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
        for a, b in zip(net.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("reduction", [False, True])
def test_nothing_of_the_others_is_touched(reduction, k, way):
    """What is NaN and never read does not matter."""
    torch.manual_seed(0)
    cell = Cell(2, 2, 6, 6, 4, reduction, False, k=k).double()
    choices = [4, 3, 7, 1, 5]
    for e, op in enumerate(cell._ops):
        for o, candidate in enumerate(op._ops):
            for t in [*candidate.parameters(), *candidate.buffers()] if o != choices[e] else []:
                if t.is_floating_point():
                    t.data.fill_(math.nan)
    if way == "edge by edge":
        cell._ops[0].register_forward_hook(lambda *_: None)
    weights = torch.rand(5, 8, dtype=torch.float64)
    for e, o in enumerate(choices):
        weights[e, torch.arange(8) != o] = 0.0
    weights.requires_grad_()
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64)
    with fastnas.use_backend(way if way in ("emulated", "reference") else "native"):
        y = cell(x, x, weights, path=choices)
        y.square().sum().backward()
    assert y.isfinite().all()
    for e, op in enumerate(cell._ops):
        for o, candidate in enumerate(op._ops):
            for p in candidate.parameters():
                assert (p.grad is not None and p.grad.isfinite().all()) if o == choices[e] else p.grad is None
            counts = [int(b) for n, b in candidate.named_buffers() if n.endswith("tracked")]
            assert all(count == (o == choices[e]) for count in counts)


def test_a_path_runs_as_one_op_and_describes_nothing_anew(monkeypatch):
    net = Supernet(4, 3, 5, 1)
    weights = {name: torch.rand(14, 8) for name in ("normal", "reduce")}
    x, generator = torch.randn(2, 1, 8, 8), torch.Generator().manual_seed(0)
    for o in range(8):
        net(x, weights, path={name: [o] * 14 for name in weights})
    described = []
    describe = mixed_op.describe
    monkeypatch.setattr(mixed_op, "describe", lambda *args: described.append(1) or describe(*args))
    for _ in range(3):
        path = {name: random_path(14, 8, generator) for name in weights}
        with torch.profiler.profile() as trace, torch.no_grad():
            net(x, weights, path=path)
        assert sum(e.count for e in trace.key_averages() if e.key == "fastnas::mixed_cell") == 3
    assert not described
    net.eval()(x, weights, path=path)
    assert described


def test_second_derivatives_in_the_block():
    torch.manual_seed(0)
    net = Supernet(4, 2, 5, 1).double()
    weights = {name: torch.rand(14, 8, dtype=torch.float64).requires_grad_() for name in ("normal", "reduce")}
    path = {"normal": [4, 5, 6, 7, 1, 2, 3] * 2, "reduce": [3, 4, 5, 6, 7, 1, 2] * 2}
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    state = state_of(net, torch.float64)
    reference = PathReference(state)
    reference.choices = [path["reduce"], path["reduce"]]
    second = []
    with fastnas.twice_differentiable():
        for y in (net(x, weights, path=path), reference.network(x, weights, 2)):
            (first,) = torch.autograd.grad(y.square().sum(), weights["reduce"], create_graph=True)
            second.append(torch.autograd.grad(first.square().sum(), weights["reduce"])[0])
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-8)
    assert second[0].any()


@pytest.mark.parametrize("k", [1, 2])
def test_autocast(k):
    torch.manual_seed(0)
    cell = Cell(2, 2, 8, 8, 8, True, False, k=k)
    x, weights, path = torch.randn(4, 8, 8, 8), torch.rand(5, 8), [3, 5, 1, 6, 4]
    exact = copy.deepcopy(cell).double()(x.double(), x.double(), weights.double(), path=path).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = cell(x, x, weights, path=path)
    assert y.dtype == torch.bfloat16
    assert float((y - exact).norm()) <= 0.02 * float(exact.norm())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_one_edge(k, stride, way):
    torch.manual_seed(0)
    for choice in range(8):
        m = MixedOp(8, stride, k).double()
        other = copy.deepcopy(m)
        x = torch.randn(3, 8, 6, 10, dtype=torch.float64).requires_grad_()
        weights = torch.rand(8, dtype=torch.float64).requires_grad_()
        with fastnas.use_backend(way if way in ("emulated", "reference") else "native"):
            y = m(x, weights, choice)
        with fastnas.use_backend("reference"):
            z = other._ops[choice](x[:, : 8 // k])
        rest = x[:, 8 // k :] if stride == 1 or k == 1 else F.max_pool2d(x[:, 8 // k :], 2, 2)
        expected = weights[choice] * z
        if k > 1:
            expected = torch.cat([expected, rest], 1).unflatten(1, (k, -1)).transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        gradient = torch.randn(y.shape, dtype=y.dtype)
        sides = [
            torch.autograd.grad(out, [x, weights, *module.parameters()], gradient, materialize_grads=True)
            for out, module in ((y, m), (expected, other))
        ]
        torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-9)
        for a, b in zip(m.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_modules_of_your_own():
    torch.manual_seed(0)
    modules = [nn.Conv2d(4, 6, 3), nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), nn.Identity()]
    m, x, weights = MixedOp(modules).eval(), torch.randn(2, 4, 7, 5), torch.rand(3)
    for choice, module in enumerate(modules):
        torch.testing.assert_close(m(x, weights, choice), weights[choice] * module(x))
    m, x = MixedOp([nn.Linear(5, 3), nn.Tanh()]), torch.randn(3, 7, 5)
    for choice, module in enumerate(m._ops):
        torch.testing.assert_close(m(x, weights[:2], choice), weights[choice] * module(x))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ([0] * 4, ValueError, "path has 4 entries: expected one for each of 5 edges"),
        ([0, 0, 8, 0, 0], ValueError, r"path\[2\]=8: expected 0 to 7, one of the edge's 8 candidates"),
        ([0, -1, 0, 0, 0], ValueError, r"path\[1\]=-1: expected 0 to 7"),
        ([0, 0, 0, 0, 1.0], TypeError, r"path\[4\] is a float: expected an int"),
        (
            torch.zeros(5, dtype=torch.long),
            TypeError,
            r"path\[0\] is a Tensor: expected an int; a tensor's .tolist\(\)",
        ),
    ],
)
def test_bad_paths(path, error, message):
    cell, x = Cell(2, 2, 4, 4, 4, False, False), torch.randn(2, 4, 5, 5)
    with pytest.raises(error, match=message):
        cell(x, x, torch.rand(5, 8), path=path)


def test_bad_paths_of_networks_and_choices():
    weights = {name: torch.rand(14, 8) for name in ("normal", "reduce")}
    x = torch.randn(2, 1, 8, 8)
    net = Supernet(4, 3, 5, 1)
    with pytest.raises(ValueError, match=r"path\['reduce'\] must have one row for each of 14 edges, got nothing"):
        net(x, weights, path={"normal": [0] * 14})
    with pytest.raises(ValueError, match=r"path\['normal'\] must have one row for each of 14 edges, got 13 rows"):
        net(x, weights, path={"normal": [0] * 13, "reduce": [0] * 14})
    net = NASBench201Supernet(4, 1, 5, 1)
    with pytest.raises(ValueError, match="path has no 'cell', only 'normal'"):
        net(x, torch.rand(6, 5), path={"normal": [0] * 6})
    with pytest.raises(ValueError, match="path must have one row for each of 6 edges, got 7 rows"):
        net(x, torch.rand(6, 5), path=[0] * 7)
    with pytest.raises(ValueError, match=r"path\[5\]=5: expected 0 to 4"):
        net(x, torch.rand(6, 5), path=[0, 0, 0, 0, 0, 5])
    with pytest.raises(ValueError, match="choice=8: expected 0 to 7"):
        MixedOp(4)(torch.randn(2, 4, 5, 5), torch.rand(8), 8)
