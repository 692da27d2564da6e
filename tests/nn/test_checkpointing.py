"""Checkpointed cells give the same bits and move running statistics once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas.nn import NASBench201Supernet, Supernet
from fastnas.nn.skip_dropout import set_skip_dropout


def build(space, k=1):
    torch.manual_seed(0)
    if space == "darts":
        return Supernet(4 * k, 3, 5, 2, k=k), {"normal": (14, 8), "reduce": (14, 8)}
    return NASBench201Supernet(4, 2, 5, 2, k=k), {"cell": (6, 5)}


def edge_hooks(net):
    for _, _, op in net.mixed_ops():
        op.register_forward_hook(lambda *_: None)


def own_norms(net):
    """Affine ones, and cumulative averages that are folded."""
    for _, _, op in net.mixed_ops():
        norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.momentum = None
        C = norms[0].num_features
        op._ops[4] = nn.Sequential(nn.Conv2d(C, C, op.stride, op.stride), nn.BatchNorm2d(C, momentum=None))


def hooked_norms(net):
    for m in list(net.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda *_: None)


def dropout(net):
    set_skip_dropout(net, 0.5)


CHANGES = {
    "plain": lambda net: None,
    "edge by edge": edge_hooks,
    "norms of their own": own_norms,
    "hooked norms": hooked_norms,
    "dropout": dropout,
    "eval": nn.Module.eval,
}


def step(net, shapes, between=None, with_path=False, steps=2):
    """Two steps of training, with all that they compute."""
    generator, results = torch.Generator().manual_seed(0), []
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(steps):
        x = torch.randn(4, 2, 8, 12, generator=generator)
        alphas = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
        betas = {n: torch.rand(s[0], generator=generator).requires_grad_() for n, s in shapes.items()}
        path = {n: torch.randint(s[1], s[:1], generator=generator).tolist() for n, s in shapes.items()}
        weights = {n: a.softmax(-1) for n, a in alphas.items()}
        y = net(x, weights, betas, path=path if with_path else None, between=between)
        optimizer.zero_grad()
        F.cross_entropy(y, torch.tensor([0, 1, 2, 3])).backward()
        gradients = [t.grad for t in [*alphas.values(), *betas.values(), *net.parameters()]]
        results += [y.detach(), *(torch.empty(0) if g is None else g.clone() for g in gradients)]
        optimizer.step()
        results += [b.clone() for b in net.buffers()]
    return results


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("space", "k"), [("darts", 1), ("darts", 2), ("nb201", 1), ("nb201", 2)])
def test_the_same_bits(space, k, change):
    net, shapes = build(space, k)
    CHANGES[change](net)
    twin = copy.deepcopy(net)
    twin.checkpoint_cells = True
    plain, checkpointed = step(net, shapes), step(twin, shapes)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    counts = {int(b) for n, b in twin.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == ({0} if change == "eval" else {2})


@pytest.mark.parametrize("space", ["darts", "nb201"])
def test_the_same_bits_of_a_path_and_between(space):
    net, shapes = build(space)
    twin = copy.deepcopy(net)
    twin.checkpoint_cells = True

    def between(states):
        return tuple(2 * s for s in states)

    sides = [step(n, shapes, between, with_path=True) for n in (net, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize("backend", ["emulated", "reference"])
def test_other_backends(backend, request):
    if backend == "emulated":
        request.getfixturevalue("emulated")
    net, shapes = build("nb201")
    twin = copy.deepcopy(net)
    twin.checkpoint_cells = True
    with fastnas.use_backend(backend):
        sides = [step(n, shapes, steps=1) for n in (net, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*sides, strict=True))


def test_less_is_kept():
    net, shapes = build("darts")
    kept = {}
    for net.checkpoint_cells in (False, True):
        seen = {}

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.randn(4, 2, 16, 16), {n: torch.rand(s).requires_grad_() for n, s in shapes.items()}).sum()
        kept[net.checkpoint_cells] = sum(size for p, size in seen.items() if p not in parameters)
    assert kept[True] < kept[False] / 5


def test_nothing_is_described_anew(monkeypatch):
    from fastnas.nn import mixed_op

    net, shapes = build("darts")
    net.checkpoint_cells = True
    step(net, shapes, steps=1)
    described = []
    describe = mixed_op.describe
    monkeypatch.setattr(mixed_op, "describe", lambda *args: described.append(1) or describe(*args))
    step(net, shapes)
    assert not described


def test_second_derivatives_in_the_block():
    net, _ = build("nb201")
    net.double()
    x, alphas = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64).requires_grad_()
    second = []
    for net.checkpoint_cells in (False, True):
        with fastnas.twice_differentiable():
            loss = F.cross_entropy(net(x, alphas.softmax(-1)), torch.arange(3))
            (first,) = torch.autograd.grad(loss, alphas, create_graph=True)
            second.append(torch.autograd.grad(first.square().sum(), alphas)[0])
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-12)


def test_statistics_come_back_after_an_error():
    net, shapes = build("nb201")
    net.checkpoint_cells = True
    y = net(torch.randn(2, 2, 8, 8), torch.rand(shapes["cell"]).requires_grad_())
    buffers = dict(net.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = net.cells[0]._ops[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        y.sum().backward()
    handle.remove()
    assert all(b is buffers[name] and torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert len(buffers) == len(dict(net.named_buffers()))
