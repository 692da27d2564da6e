"""fastnas.compat.darts under the conditions that scripts written for quark0/darts set."""

import argparse
import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from darts_reference import Reference, state_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fastnas
from fastnas import nn as fnn
from fastnas.compat import darts, pc_darts

ARGS = argparse.Namespace(
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-2, arch_weight_decay=1e-3, learning_rate=0.025, grad_clip=5
)
MODULES = pytest.mark.parametrize("compat", [darts, pc_darts], ids=["darts", "pc_darts"])


def batch(seed, N=4, dtype=torch.float32, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, channels, 8, 8, generator=generator, dtype=dtype), torch.randint(5, (N,), generator=generator)


def network(compat, layers=3, seed=0):
    torch.manual_seed(seed)
    return compat.Network(4, 5, layers, nn.CrossEntropyLoss())


@MODULES
def test_names(compat):
    for name in ("PRIMITIVES", "OPS", "Genotype", "MixedOp", "Cell", "Network", "Architect", "NASNet", "AmoebaNet"):
        assert hasattr(compat, name)
    assert compat.PRIMITIVES.index("none") == 0
    namespace = {}
    exec(f"from {compat.__name__} import *", namespace)
    assert {"Network", "Architect", "PRIMITIVES", "ReLUConvBN", "FactorizedReduce"} <= set(namespace)


@MODULES
def test_published_genotypes_are_architectures(compat):
    names = ["NASNet", "AmoebaNet", "DARTS_V1", "DARTS_V2"]
    names += ["DARTS"] if compat is darts else ["PC_DARTS_cifar", "PC_DARTS_image", "PCDARTS"]
    for name in names:
        genotype = getattr(compat, name)
        assert genotype.validate(compat.OPS) == genotype
        # as model.py reads it
        ops, indices = zip(*genotype.normal, strict=True)
        assert len(ops) == len(indices) == 2 * (10 // 2 if name in ("NASNet", "AmoebaNet") else 4)
        assert len(genotype.reduce_concat) == (3 if name in ("NASNet", "AmoebaNet") else 4)


@MODULES
def test_architecture_parameters_are_outside_the_module(compat):
    model = network(compat)
    arch = model.arch_parameters()
    assert arch is model._arch_parameters
    expected = [model.alphas_normal, model.alphas_reduce]
    shapes = [(14, 8), (14, 8)]
    if compat is pc_darts:
        expected += [model.betas_normal, model.betas_reduce]
        shapes += [(14,), (14,)]
    assert len(arch) == len(expected)
    for got, want, shape in zip(arch, expected, shapes, strict=True):
        assert got is want
        assert tuple(got.shape) == shape
        assert got.is_leaf
        assert got.requires_grad
        assert 3e-4 < got.std() < 3e-3
    inside = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not inside & {id(p) for p in arch}
    assert not [key for key in model.state_dict() if "alpha" in key or "beta" in key]


@MODULES
def test_attributes(compat):
    model = compat.Network(4, 5, 3, F.cross_entropy, 3, 2, 2)
    assert (model._C, model._num_classes, model._layers, model._steps, model._multiplier) == (4, 5, 3, 3, 2)
    assert model._criterion is F.cross_entropy
    assert model.stem[0].out_channels == 8
    assert len(model.alphas_normal) == 9
    assert model.genotype().normal_concat == range(3, 5)
    assert model(batch(0)[0]).shape == (4, 5)


@MODULES
def test_old_checkpoints_load(compat, tmp_path):
    """A file with the published keys, as utils.save writes it, goes in and comes out."""
    model, other = network(compat, seed=0), network(compat, seed=1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    keys = set(other.state_dict())
    for key in (
        "stem.0.weight",
        "stem.1.running_mean",
        "cells.0.preprocess0.op.1.weight",
        "cells.2.preprocess0.conv_1.weight",
        "cells.2.preprocess0.bn.running_var",
        "cells.1.preprocess1.op.2.num_batches_tracked",
        "cells.0._ops.13._ops.1.1.running_mean",
        "cells.0._ops.13._ops.4.op.7.running_var",
        "cells.1._ops.0._ops.3.conv_2.weight",
        "cells.2._ops.5._ops.7.op.3.running_mean",
        "classifier.bias",
    ):
        assert key in keys
    for alpha, value in zip(other.arch_parameters(), model.arch_parameters(), strict=True):
        alpha.data.copy_(value.data)
    model.eval()
    other.eval()
    x = batch(0)[0]
    assert torch.equal(model(x), other(x))


def test_mixed_op_and_cell():
    torch.manual_seed(0)
    assert darts.MixedOp is fnn.MixedOp
    x = torch.randn(2, 8, 6, 6)
    weights = torch.rand(8)
    assert darts.MixedOp(8, 2)(x, weights).shape == (2, 8, 3, 3)
    op = pc_darts.MixedOp(8, 2)
    assert op(x, weights).shape == (2, 8, 3, 3)
    assert op._ops[4].op[1].weight.shape == (2, 1, 3, 3)
    rows = list(torch.rand(14, 8))
    assert darts.Cell(4, 4, 8, 8, 4, False, False)(x, x, rows).shape == (2, 16, 6, 6)
    assert pc_darts.Cell(4, 4, 8, 8, 8, True, False)(x, x, rows, torch.rand(14)).shape == (2, 32, 3, 3)


@MODULES
def test_forward_is_the_definition(compat):
    model = network(compat).double()
    for alpha in model.arch_parameters():
        alpha.data.normal_()
    state = state_of(model, torch.float64)
    x, _ = batch(1, dtype=torch.float64)
    weights = {"normal": model.alphas_normal.softmax(-1), "reduce": model.alphas_reduce.softmax(-1)}
    edges = None
    if compat is pc_darts:
        # softmax over the inputs of each node: edges 0-1, 2-4, 5-8, 9-13
        edges = {
            kind: torch.cat([betas[a:b].softmax(0) for a, b in ((0, 2), (2, 5), (5, 9), (9, 14))])
            for kind, betas in (("normal", model.betas_normal), ("reduce", model.betas_reduce))
        }
    expected = Reference(state, k=4 if compat is pc_darts else 1).network(x, weights, 3, edges)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)


@MODULES
def test_data_writes_are_seen(compat):
    model = network(compat)
    model.eval()
    x = batch(0)[0]
    before = model(x)
    model.alphas_normal.data[:, 5] += 3.0
    assert not torch.equal(before, model(x))
    model.alphas_reduce.data.copy_(torch.eye(14, 8) * 9)
    ops = [op for op, _ in model.genotype().normal]
    assert ops == ["sep_conv_5x5"] * 8


def test_pc_genotype_multiplies_alphas_and_betas():
    model = network(pc_darts)
    model.alphas_normal.data.zero_()[:, 4] = 1.0
    # by the alphas alone all inputs tie; the betas prefer each node's last two
    model.betas_normal.data.copy_(torch.cat([torch.arange(n, dtype=torch.float32) for n in (2, 3, 4, 5)]))
    assert model.genotype().normal == [("sep_conv_3x3", j) for j in (1, 0, 2, 1, 3, 2, 4, 3)]


@MODULES
def test_genotype_equals_the_published_derivation(compat):
    """The script's own numpy code on softmaxed values, on random ones."""
    model = network(compat)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for p in model.arch_parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        table = model.alphas_normal.softmax(-1).detach().numpy()
        expected, start = [], 0
        for node in range(2, 6):
            W = table[start : start + node].copy()
            if compat is pc_darts:
                W *= model.betas_normal[start : start + node].softmax(0).detach().numpy()[:, None]
            W = W[:, 1:]
            best = np.argsort(-W.max(axis=1), kind="stable")[:2]
            expected += [(darts.PRIMITIVES[1 + int(W[j].argmax())], int(j)) for j in best]
            start += node
        genotype = model.genotype()
        assert genotype.normal == expected
        assert genotype.normal_concat == genotype.reduce_concat == range(2, 6)


@MODULES
def test_new(compat):
    model = network(compat).double()
    new = model.new()
    assert type(new) is type(model)
    for a, b in zip(model.arch_parameters(), new.arch_parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
        assert a.data_ptr() != b.data_ptr()
    assert not torch.equal(model.classifier.weight, new.classifier.weight)
    new.load_state_dict(model.state_dict())
    x, target = batch(0, dtype=torch.float64)
    assert torch.equal(new._loss(x, target), model._loss(x, target))


@MODULES
def test_architecture_parameters_follow_the_module(compat):
    model = network(compat)
    optimizer = torch.optim.Adam(model.arch_parameters(), lr=0.1)
    model._loss(*batch(0)).backward()
    assert model.double() is model
    assert optimizer.param_groups[0]["params"][0] is model.alphas_normal
    for p in model.arch_parameters():
        assert p.dtype == p.grad.dtype == torch.float64
    before = model.alphas_normal.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.alphas_normal)
    twin = copy.deepcopy(model)
    assert twin.alphas_normal is twin.arch_parameters()[0]
    assert twin.alphas_normal is not model.alphas_normal
    unpickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(unpickled.alphas_reduce, model.alphas_reduce)


@MODULES
@pytest.mark.parametrize("unrolled", [False, True])
def test_a_search_loop_runs(compat, unrolled):
    """train_search.py's loop, as it is in the scripts but for ``.cuda()``."""
    model = network(compat)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), ARGS.learning_rate, momentum=ARGS.momentum, weight_decay=ARGS.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2.0, eta_min=0.001)
    architect = compat.Architect(model, ARGS)
    start = [p.detach().clone() for p in model.arch_parameters()]
    for step in range(2):
        lr = scheduler.get_last_lr()[0]
        model.train()
        input, target = batch(step)
        input_search, target_search = batch(10 + step)
        architect.step(input, target, input_search, target_search, lr, optimizer, unrolled=unrolled)
        optimizer.zero_grad()
        logits = model(input)
        loss = criterion(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), ARGS.grad_clip)
        optimizer.step()
        scheduler.step()
        assert np.isfinite(loss.item())
    model.eval()
    with torch.no_grad():
        assert model(batch(0)[0]).isfinite().all()
    for p, was in zip(model.arch_parameters(), start, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, was)
    assert isinstance(model.genotype(), darts.Genotype)
    assert architect.optimizer.param_groups[0]["betas"] == (0.5, 0.999)


@MODULES
def test_first_order_gradient(compat):
    model = network(compat).double()
    twin = copy.deepcopy(model)
    (x, target), valid = batch(0, dtype=torch.float64), batch(1, dtype=torch.float64)
    architect = compat.Architect(model, ARGS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    architect.step(x, target, *valid, torch.tensor(0.1), optimizer, unrolled=False)
    twin._loss(*valid).backward()
    adam = torch.optim.Adam(twin.arch_parameters(), lr=3e-2, betas=(0.5, 0.999), weight_decay=1e-3)
    for p, q in zip(model.arch_parameters(), twin.arch_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    adam.step()
    for p, q in zip(model.arch_parameters(), twin.arch_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def exact_unrolled_gradient(model, train, valid, eta, optimizer):
    """dα L_valid(w − η (∇w L_train + wd w + μ buf), α) by automatic differentiation through the step."""
    with fastnas.twice_differentiable():
        names, parameters = zip(*model.named_parameters(), strict=True)
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(values, x, target):
            logits = functional_call(model, {**dict(zip(names, values, strict=True)), **buffers}, (x,))
            return F.cross_entropy(logits, target)

        gradients = torch.autograd.grad(loss(parameters, *train), parameters, create_graph=True)
        unrolled = []
        for p, g in zip(parameters, gradients, strict=True):
            momentum = optimizer.state[p]["momentum_buffer"] if p in optimizer.state else torch.zeros_like(p)
            unrolled.append(p - eta * (g + ARGS.weight_decay * p + ARGS.momentum * momentum))
        return torch.autograd.grad(loss(unrolled, *valid), model.arch_parameters())


def relative(got, expected):
    got, expected = torch.cat([g.flatten() for g in got]), torch.cat([e.flatten() for e in expected])
    return float((got - expected).norm() / expected.norm())


@MODULES
@pytest.mark.parametrize("momentum", [False, True])
def test_second_order_gradient_is_the_exact_one(compat, momentum, monkeypatch):
    model = network(compat).double()
    for alpha in model.arch_parameters():
        alpha.data.normal_(generator=torch.Generator().manual_seed(1))
    train, valid = batch(0, 8, torch.float64), batch(1, 8, torch.float64)
    eta = 0.05
    optimizer = torch.optim.SGD(model.parameters(), eta, momentum=0.9, weight_decay=3e-4)
    if momentum:
        model._loss(*batch(2, 8, torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    exact = exact_unrolled_gradient(model, train, valid, eta, optimizer)
    architect = compat.Architect(model, ARGS)
    first_order = torch.autograd.grad(model._loss(*valid), model.arch_parameters())
    # the exact gradient's own implicit term is not negligible here, so agreement says something about it
    assert relative(first_order, exact) > 0.05

    # ReLU and max-pool make gradients jump, and the published R crosses many of these jumps in so small a network
    monkeypatch.setattr(darts, "second_order", functools.partial(darts.second_order, radius=1e-7))
    architect.step(*train, *valid, eta, optimizer, unrolled=True)
    assert relative([p.grad for p in model.arch_parameters()], exact) < 1e-6


class SmoothModel(nn.Module):
    """What an Architect asks for, without jumps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.alpha = torch.randn(6, 8).requires_grad_()

    def arch_parameters(self):
        return [self.alpha]

    def forward(self, x):
        return self.layers(x * self.alpha.softmax(-1)[:, 0])

    def _loss(self, input, target):
        return F.cross_entropy(self(input), target)


def test_second_order_with_the_published_radius():
    torch.manual_seed(0)
    model = SmoothModel().double()
    model.alpha = model.alpha.detach().double().requires_grad_()
    train, valid = ((torch.randn(9, 6).double(), torch.randint(5, (9,))) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    exact = exact_unrolled_gradient(model, train, valid, 0.5, optimizer)
    first_order = torch.autograd.grad(model._loss(*valid), model.arch_parameters())
    darts.Architect(model, ARGS).step(*train, *valid, 0.5, optimizer, unrolled=True)
    assert relative(first_order, exact) > 0.05
    assert relative([model.alpha.grad], exact) < 1e-5  # (R = 0.01)^2 times third derivatives


def same_bits(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[key], value) for key, value in expected.items())


@MODULES
def test_second_order_leaves_the_model_as_it_was(compat):
    model = network(compat)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model._loss(*batch(2)).backward()
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    architect = compat.Architect(model, ARGS)
    architect.step(*batch(0), *batch(1), 0.1, optimizer, unrolled=True)
    assert same_bits(model.state_dict(), state)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    after = optimizer.state_dict()["state"]
    assert after.keys() == moments["state"].keys()
    assert all(torch.equal(after[k]["momentum_buffer"], v["momentum_buffer"]) for k, v in moments["state"].items())


def test_an_interrupted_step_leaves_the_model_as_it_was():
    model = network(darts)
    state = copy.deepcopy(model.state_dict())
    architect = darts.Architect(model, ARGS)
    calls = []
    loss = model._loss

    def interrupted(input, target):
        calls.append(input)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(input, target)

    model._loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        architect.step(*batch(0), *batch(1), 0.1, torch.optim.SGD(model.parameters(), 0.1), unrolled=True)
    assert same_bits(model.state_dict(), state)


def test_eta_as_a_tensor_and_frozen_parameters():
    gradients = []
    for eta in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        model = network(darts).double()
        model.stem.requires_grad_(False)
        architect = darts.Architect(model, ARGS)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        double = {"dtype": torch.float64}
        architect.step(*batch(0, **double), *batch(1, **double), eta, optimizer, True)
        assert not optimizer.state
        gradients.append(model.alphas_normal.grad)
    assert torch.equal(*gradients)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@MODULES
@pytest.mark.parametrize("unrolled", [False, True])
def test_a_step_on_the_gpu(compat, unrolled):
    """Built on the CPU and moved, as scripts do; the step is that of the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        model = network(compat).double()
        architect = compat.Architect(model, ARGS)
        model.to(device)
        train, valid = ([t.to(device) for t in batch(seed, 8, torch.float64)] for seed in (0, 1))
        product = architect._hessian_vector_product
        architect._hessian_vector_product = lambda *a, product=product: product(*a, r=1e-7)
        architect.step(*train, *valid, 0.05, torch.optim.SGD(model.parameters(), 0.05), unrolled)
        assert all(p.device.type == device for p in model.arch_parameters())
        results.append(torch.cat([p.grad.flatten().cpu() for p in model.arch_parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_other_input_channels():
    model = darts.Network(4, 5, 3, F.cross_entropy, in_channels=1)
    assert model(batch(0, channels=1)[0]).shape == (4, 5)
    assert model.new().stem[0].in_channels == 1
