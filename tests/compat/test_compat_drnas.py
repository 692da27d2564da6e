"""fastnas.compat.drnas under the conditions that DrNAS' scripts set."""

import argparse
import copy
import functools
import logging
import math
import pickle

import pytest
import torch
from darts_reference import Reference, state_of
from torch import nn
from torch.nn import functional as F

from fastnas.compat import darts, drnas
from fastnas.compat.drnas import (
    NAS_BENCH_201,
    PRIMITIVES,
    Architect,
    Network,
    TinyNetwork,
    TinyNetworkGDAS,
    configure_optimizer,
    configure_scheduler,
)

DARTS_ARGS = argparse.Namespace(  # the script of the DARTS space
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-2, arch_weight_decay=1e-3, learning_rate=0.1
)
NB201_ARGS = argparse.Namespace(  # the scripts of NAS-Bench-201
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-2, reg_type="l2", reg_scale=1e-3, learning_rate=0.025
)


def batch(seed, N=4, dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, 3, size, size, generator=generator, dtype=dtype),
        torch.randint(5, (N,), generator=generator),
    )


def darts_network(k=4, C=4, layers=3, seed=0, **options):
    torch.manual_seed(seed)
    return Network(C, 5, layers, nn.CrossEntropyLoss(), k=k, **options)


def tiny_network(k=4, species="dirichlet", seed=0, **options):
    torch.manual_seed(seed)
    criterion = nn.CrossEntropyLoss()
    return TinyNetwork(4, 1, 4, 5, criterion, NAS_BENCH_201, k=k, species=species, **options)


def same_state(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=3e-4)


BOTH = pytest.mark.parametrize("build", [darts_network, tiny_network], ids=["darts", "nb201"])


def train_epoch(model, architect, optimizer, steps, unrolled, epoch):
    """train() of the scripts but for ``.cuda()``."""
    for step in range(steps):
        model.train()
        input, target = batch(step)
        if epoch >= 1:
            architect.step(input, target, *batch(10 + step), 0.05, optimizer, unrolled=unrolled)
        optimizer.zero_grad()
        architect.optimizer.zero_grad()
        loss = F.cross_entropy(model(input), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad()
        architect.optimizer.zero_grad()
        assert math.isfinite(loss.item())


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(
    ("build", "args", "ks", "num_keeps"),
    [(darts_network, DARTS_ARGS, [4, 2], [7, 4]), (tiny_network, NB201_ARGS, [4, 2], [5, 3])],
    ids=["darts", "nb201"],
)
def test_a_progressive_search_runs(build, args, ks, num_keeps, unrolled):
    """The loop over stages of train_search.py and train_search_progressive.py, in miniature."""
    model = build(k=ks[0])
    train_epochs = [2, 2]
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, momentum=0.9, weight_decay=3e-4)
    architect = Architect(model, args)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(sum(train_epochs)), eta_min=0.001)
    rates = []
    for i, current_epochs in enumerate(train_epochs):
        for e in range(current_epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            model.genotype()
            train_epoch(model, architect, optimizer, 1, unrolled, e)
            scheduler.step()
        if i < len(train_epochs) - 1:
            momentum = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.pruning(num_keeps[i + 1])
            model.wider(ks[i + 1])
            optimizer = configure_optimizer(
                optimizer, torch.optim.SGD(model.parameters(), args.learning_rate, momentum=0.9, weight_decay=3e-4)
            )
            scheduler = configure_scheduler(
                scheduler,
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(sum(train_epochs)), eta_min=0.001),
            )
            grown = 0
            for name, p in model.named_parameters():
                buffer = optimizer.state[p]["momentum_buffer"]
                assert buffer.shape == p.shape
                if p.shape != before[name].shape:
                    grown += 1
                    # the first channels are the old ones
                    n = before[name].shape[0]
                    m = before[name].shape[1]
                    assert torch.equal(p[:n, :m], before[name])
                else:
                    assert torch.equal(buffer, momentum[p])
            assert grown
    # one cosine from the first to the last epoch, as if there were no stages
    expected = [0.001 + (args.learning_rate - 0.001) * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert rates == pytest.approx(expected)
    model.eval()
    with torch.no_grad():
        assert model(batch(0)[0]).isfinite().all()
    for alpha in model.arch_parameters():
        assert alpha.isfinite().all()


@BOTH
def test_momentum_follows_its_channels(build):
    """A buffer equal to its parameter stays equal to it, whatever channels were copied."""
    model = build()
    optimizer = sgd(model)
    model._loss(*batch(0)).backward()
    optimizer.step()
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"].copy_(p.detach())
    sizes = [p.shape for p in model.parameters()]
    model.wider(2)
    model.wider(1)  # twice before the optimizer is told
    after = configure_optimizer(optimizer, sgd(model))
    assert [p.shape for p in model.parameters()] != sizes
    for p in model.parameters():
        assert torch.equal(after.state[p]["momentum_buffer"], p.detach())
        assert after.state[p]["momentum_buffer"].data_ptr() != p.data_ptr()


def test_other_state_and_parameters_that_are_new():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    adam = torch.optim.Adam(old.parameters())
    old(torch.ones(1, 2)).sum().backward()
    adam.step()
    both = configure_optimizer(adam, torch.optim.Adam([*old.parameters(), *new.parameters()]))
    assert both.state[old.weight]["step"] == 1
    assert torch.equal(both.state[old.weight]["exp_avg"], adam.state[old.weight]["exp_avg"])
    assert new.weight not in both.state
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 4.0)
    split = torch.optim.SGD([{"params": [old.weight]}, {"params": [old.bias]}], 0.1)
    with pytest.raises(ValueError, match="2 groups of parameters, scheduler_old 1"):
        configure_scheduler(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR(split, 4.0))


def test_names():
    namespace = {}
    exec("from fastnas.compat.drnas import *", namespace)
    assert {"Network", "TinyNetwork", "Architect", "NAS_BENCH_201", "configure_optimizer"} <= set(namespace)
    assert len(PRIMITIVES) == 7
    assert "none" not in PRIMITIVES
    assert NAS_BENCH_201 == ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]


def test_mixed_op_and_cells():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    op = drnas.MixedOp(8, 2, 4)
    assert op(x, torch.rand(7)).shape == (2, 8, 3, 3)
    assert op._ops[3].op[1].weight.shape == (2, 1, 3, 3)
    op.wider(2)
    assert op._ops[3].op[1].weight.shape == (4, 1, 3, 3)
    assert op(x, torch.rand(7)).shape == (2, 8, 3, 3)
    cell = drnas.Cell(4, 4, 8, 8, 8, True, False, 4)
    assert cell(x, x, list(torch.rand(14, 7))).shape == (2, 32, 3, 3)
    cell.wider(2)
    assert cell(x, x, torch.rand(14, 7)).shape == (2, 32, 3, 3)
    small = drnas.NAS201SearchCell_PartialChannel(8, 8, 1, 4, NAS_BENCH_201, False, True, 4)
    assert small(x, torch.rand(6, 5)).shape == x.shape
    small.wider(2)
    assert small(x, torch.rand(6, 5)).shape == x.shape
    with pytest.raises(ValueError, match="C_out=16"):
        drnas.NAS201SearchCell_PartialChannel(8, 16, 2, 4, NAS_BENCH_201)


@BOTH
def test_architecture_parameters_are_outside_the_module(build):
    model = build()
    arch = model.arch_parameters()
    shapes = [(14, 7), (14, 7)] if build is darts_network else [(6, 5)]
    assert [tuple(alpha.shape) for alpha in arch] == shapes
    assert all(alpha.is_leaf and alpha.requires_grad for alpha in arch)
    assert not {id(p) for p in model.parameters()} & {id(alpha) for alpha in arch}
    assert not [key for key in model.state_dict() if "alpha" in key or "arch" in key]
    if build is tiny_network:
        assert arch[0] is model._arch_parameters
        assert [id(p) for p in model.get_weights()] == [id(p) for p in model.parameters()]
    assert model.double() is model
    assert all(alpha.dtype == torch.float64 for alpha in arch)
    assert model.arch_parameters()[0] is arch[0]


@BOTH
def test_every_forward_draws(build):
    model = build()
    x = batch(0)[0]
    model.eval()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x))


def drawn(model, seed):
    """The weights of the next forward after ``manual_seed(seed)``."""
    torch.manual_seed(seed)
    return model._candidates.draw(model._tables())


def test_forward_and_gradient_are_the_definition():
    """Against plain PyTorch: torch's own Dirichlet has other gradients of a draw, so the drawn weights are given."""
    model = darts_network(k=4).double()
    for alpha in model.arch_parameters():
        alpha.data.normal_()
    x, target = batch(1, dtype=torch.float64)
    reference = Reference(state_of(model, torch.float64), k=4, primitives=PRIMITIVES)
    weights = drawn(model, 5)
    expected = reference.network(x, weights, 3)
    torch.manual_seed(5)
    logits = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    got = torch.autograd.grad(F.cross_entropy(logits, target), model.arch_parameters())
    want = torch.autograd.grad(F.cross_entropy(expected, target), model.arch_parameters())
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


@BOTH
def test_the_weights_are_dirichlet(build):
    """Mean and variance of Dir(elu(alpha) + 1), over all candidates and over those that are left."""
    model = build().double()
    for alpha in model.arch_parameters():
        alpha.data.normal_(generator=torch.Generator().manual_seed(0))
    for num_keep in (None, 3):
        if num_keep:
            model.pruning(num_keep)
        torch.manual_seed(0)
        with torch.no_grad():
            draws = [model._candidates.draw(model._tables()) for _ in range(4000)]
        for name, alphas in model._tables().items():
            sample = torch.stack([draw[name] for draw in draws])
            beta = F.elu(alphas.detach()) + 1
            if num_keep:
                mask = {"normal": "mask_normal", "reduce": "mask_reduce", "cell": "_mask"}[name]
                beta = beta * getattr(model, mask)
            mean = beta / beta.sum(1, keepdim=True)
            variance = mean * (1 - mean) / (beta.sum(1, keepdim=True) + 1)
            torch.testing.assert_close(sample.mean(0), mean, rtol=0, atol=0.03)
            torch.testing.assert_close(sample.var(0), variance, rtol=0, atol=0.02)
            torch.testing.assert_close(sample.sum(2), torch.ones_like(sample.sum(2)))
            assert (sample[:, beta == 0] == 0).all()


@BOTH
def test_pruning_keeps_the_best(build):
    model = build()
    tables = model._tables()
    for seed, alphas in enumerate(tables.values()):
        alphas.data.copy_(torch.randn(alphas.shape, generator=torch.Generator().manual_seed(seed)))
    before = {name: alphas.detach().clone() for name, alphas in tables.items()}
    genotype = model.genotype()
    for num_keep in (3, 1):
        model.pruning(num_keep)
        masks = [model.mask_normal, model.mask_reduce] if build is darts_network else [model._mask]
        for (name, alphas), mask in zip(tables.items(), masks, strict=True):
            assert mask.dtype == torch.bool
            threshold = before[name].sort(dim=1, descending=True).values[:, num_keep - 1 : num_keep]
            assert torch.equal(mask, before[name] >= threshold)
            assert torch.equal(alphas.detach(), before[name] * mask)
    if build is tiny_network:
        assert model.genotype() == genotype
    with pytest.raises(ValueError, match="num_keep=2: expected 1 to 1"):
        model.pruning(2)


def test_negative_alphas_survive_pruning():
    """A kept candidate may have a lower alpha than the 0 that pruned ones are set to."""
    model = tiny_network()
    model._arch_parameters.data.copy_(torch.tensor([-3.0, -2.0, -4.0, -5.0, -6.0]).repeat(6, 1))
    model.pruning(2)
    assert set(model.genotype().ops) == {"skip_connect"}
    model.pruning(1)
    assert torch.equal(model._mask, torch.tensor([False, True, False, False, False]).repeat(6, 1))


@BOTH
def test_pruned_candidates_are_gone(build):
    model = build(k=2)
    names = {name for name, _ in model.named_parameters()}
    for alphas in model.arch_parameters():
        alphas.data.zero_()[:, 1] = 1.0
        alphas.data[:, 3] = 0.5
    model.pruning(2)
    kept = {name for name, _ in model.named_parameters()}
    assert kept < names
    assert all(name.split("._ops.")[2][0] in "13" for name in kept if "._ops." in name)
    x, target = batch(0)
    model._loss(x, target).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    for alphas in model.arch_parameters():
        assert (alphas.grad[:, [0, 2, 4]] == 0).all()
        assert (alphas.grad[:, [1, 3]] != 0).any()


def test_edges_without_weights_can_be_widened():
    """What is left may be none, skip_connect and the pool, whose modules do not know how many channels they see."""
    model = tiny_network()
    model._arch_parameters.data.copy_(torch.tensor([3.0, 2.0, 0.0, 0.0, 1.0]).repeat(6, 1))
    model.pruning(3)
    model.wider(2)
    assert model.k == 2
    assert model(batch(0)[0]).isfinite().all()


def test_derivation_is_the_published_one():
    """Per node the two inputs with the largest softmax of what is left."""
    model = darts_network()
    for seed, alphas in enumerate(model.arch_parameters()):
        alphas.data.copy_(torch.randn(14, 7, generator=torch.Generator().manual_seed(seed)))
    model.pruning(4)
    table = model.alphas_normal.detach().masked_fill(~model.mask_normal, -torch.inf).softmax(-1)
    expected, start = [], 0
    for node in range(2, 6):
        best = table[start : start + node].max(dim=1)
        inputs = best.values.argsort(descending=True)[:2].tolist()
        expected += [(PRIMITIVES[best.indices[j]], j) for j in inputs]
        start += node
    assert model.genotype().normal == expected
    assert isinstance(model.genotype(), drnas.Genotype)


def test_structure():
    model = tiny_network()
    model._arch_parameters.data.copy_(torch.eye(5)[[3, 3, 3, 1, 3, 3]])
    structure = model.genotype()
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    assert structure.tostr() == text
    assert drnas.Structure.from_text(text) == structure


@BOTH
def test_kl(build):
    """The regulariser is the sum over edges of what torch says; Adam then decays nothing."""
    model = build(reg_type="kl", reg_scale=0.5).double()
    for alphas in model.arch_parameters():
        alphas.data.normal_()
    x, target = batch(0, dtype=torch.float64)
    torch.manual_seed(1)
    loss = model._loss(x, target)
    torch.manual_seed(1)
    bare = F.cross_entropy(model(x), target)
    expected = torch.zeros((), dtype=torch.float64)
    for alphas in model.arch_parameters():
        beta = F.elu(alphas) + 1
        anchor = torch.distributions.Dirichlet(torch.ones_like(beta))
        expected = expected + torch.distributions.kl_divergence(torch.distributions.Dirichlet(beta), anchor).sum()
    torch.testing.assert_close(loss - bare, 0.5 * expected, rtol=1e-8, atol=1e-8)
    got = torch.autograd.grad(model._candidates.penalty(model._tables()), model.arch_parameters())
    torch.testing.assert_close(got, torch.autograd.grad(0.5 * expected, model.arch_parameters()))
    args = argparse.Namespace(**{**vars(NB201_ARGS), "reg_type": "kl"})
    assert Architect(model, args).optimizer.param_groups[0]["weight_decay"] == 0
    # of what is left alone
    model.pruning(1)
    torch.testing.assert_close(
        model._candidates.penalty(model._tables()), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_weight_decay_of_the_architect():
    model = tiny_network()
    assert Architect(model, DARTS_ARGS).optimizer.param_groups[0]["weight_decay"] == 1e-3
    args = argparse.Namespace(**{**vars(DARTS_ARGS), "reg_type": "l2", "reg_scale": 0.2})
    assert Architect(model, args).optimizer.param_groups[0]["weight_decay"] == 0.2
    assert DARTS_ARGS.arch_weight_decay == 1e-3
    assert not hasattr(DARTS_ARGS, "reg_scale")


@pytest.mark.parametrize("species", ["softmax", "dirichlet", "gumbel"])
def test_species(species):
    model = tiny_network(k=1, species=species)
    assert (model.max_nodes, model.op_names, model.k) == (4, NAS_BENCH_201, 1)
    x, target = batch(0)
    assert torch.equal(model(x), model(x)) == (species == "softmax")
    model.set_tau(1e-3)
    assert model.get_tau() == 1e-3
    weights = drawn(model, 0)["cell"]
    if species == "gumbel":  # nearly one-hot now
        assert (weights.max(1).values > 0.95).sum() >= 5
    model._loss(x, target).backward()
    assert model._arch_parameters.grad.isfinite().all()
    assert len(drnas.Structure.from_text(model.genotype().tostr()).ops) == 6
    model.pruning(3)
    assert ((drawn(model, 0)["cell"] > 0) <= model._mask).all()


def test_one_path_of_gdas():
    torch.manual_seed(0)
    model = TinyNetworkGDAS(4, 1, 4, 5, nn.CrossEntropyLoss(), NAS_BENCH_201)
    model.set_tau(2.0)
    x, target = batch(0)
    moved = False
    for seed in range(5):  # a path may not lead from the input to the output
        weights = drawn(model, seed)["cell"]
        assert ((weights == 1).sum(1) == 1).all()
        model.zero_grad()
        model._arch_parameters.grad = None
        torch.manual_seed(seed)
        model._loss(x, target).backward()
        moved |= bool(model._arch_parameters.grad.any())
        # only what lies on the path has a gradient
        chosen = weights.argmax(1).tolist()
        for _, edge, op in model.mixed_ops():
            for o, candidate in enumerate(op._ops):
                if o != chosen[edge]:
                    assert all(p.grad is None for p in candidate.parameters())
    assert moved
    with pytest.raises(ValueError, match="choose from softmax, dirichlet, gumbel"):
        tiny_network(species="gdas")


def test_batch_norms_as_asked_for():
    model = tiny_network(k=1, species="softmax", affine=True, track_running_stats=False)
    keys = set(model.state_dict())
    assert "cells.0._ops.0._ops.3.op.2.weight" in keys
    assert "cells.0._ops.0._ops.3.op.2.running_mean" not in keys
    assert "stem.1.running_mean" in keys
    x = batch(0)[0]
    model.train()
    first = model(x)
    model.eval()
    assert first.shape == model(x).shape == (4, 5)
    assert "cells.0._ops.0._ops.3.op.2.weight" not in tiny_network().state_dict()


def test_published_checkpoints_load(tmp_path):
    """Files with the published keys: pools with their norm as op.1, and edges of NAS-Bench-201 by name."""
    model, other = darts_network(seed=0), darts_network(seed=1)
    published = {}
    for key, value in model.state_dict().items():
        for o in (0, 1):
            key = key.replace(f"_ops.{o}.1.", f"_ops.{o}.op.1.") if f"._ops.{o}.1." in key else key
        published[key] = value
    assert "cells.0._ops.13._ops.0.op.1.running_mean" in published
    torch.save(published, tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    assert same_state(other, model)
    other.load_state_dict(model.state_dict(), strict=True)

    model, other = tiny_network(seed=0), tiny_network(seed=1)
    edges = ["1<-0", "2<-0", "2<-1", "3<-0", "3<-1", "3<-2"]
    published = {}
    for key, value in model.state_dict().items():
        for e, edge in enumerate(edges):
            key = key.replace(f"._ops.{e}._ops.", f".edges.{edge}.")
        published[key] = value
    assert "cells.4.edges.3<-2.3.op.1.weight" in published
    other.load_state_dict(published, strict=True)
    assert same_state(other, model)


@BOTH
def test_new_copies_and_pickles(build):
    model = build()
    model.pruning(3)
    model.wider(2)
    model._loss(*batch(0)).backward()
    new = model.new()
    assert type(new) is type(model)
    for a, b in zip(model.arch_parameters(), new.arch_parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
        assert b.grad is None
    assert not torch.equal(model.classifier.weight, new.classifier.weight)
    new.load_state_dict(model.state_dict())
    for twin in (new, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        logits = twin.eval()(batch(1)[0])
        torch.manual_seed(0)
        assert torch.equal(logits, model.eval()(batch(1)[0]))


@BOTH
@pytest.mark.parametrize("pruned", [False, True])
def test_second_order_is_of_one_draw(build, pruned, monkeypatch):
    """The unrolled gradient of a fixed draw; were it of several, the difference would be noise over R."""
    model = build().double()
    if pruned:
        model.pruning(3)
        model.wider(2)
    train, valid = batch(0, 8, torch.float64), batch(1, 8, torch.float64)
    eta = 0.05
    optimizer = torch.optim.SGD(model.parameters(), eta, momentum=0.9, weight_decay=3e-4)
    parameters, alphas = list(model.parameters()), model.arch_parameters()[0]
    start = [p.detach().clone() for p in parameters]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    weights = drawn(model, 3)
    name = next(iter(weights))
    mask = model.mask_normal if build is darts_network else model._mask
    column = int(mask[0].nonzero()[0]) if pruned else 1
    # how edge 0's weights move with one of its alphas, at this draw
    moves = [torch.autograd.grad(w, alphas, retain_graph=True)[0][0, column] for w in weights[name][0]]
    direction = torch.zeros_like(weights[name])
    direction[0] = torch.stack(moves)

    def loss(values, images, shift):
        for p, v in zip(parameters, values, strict=True):
            p.data.copy_(v)
        table = {**weights, name: weights[name] + shift * direction}
        with monkeypatch.context() as patch:
            patch.setattr(model._candidates, "draw", lambda tables: {n: t.detach() for n, t in table.items()})
            return model._loss(*images)

    def unrolled(shift):
        gradients = torch.autograd.grad(loss(start, train, shift), parameters, allow_unused=True)
        moved = [p if g is None else p - eta * (g + 3e-4 * p) for p, g in zip(start, gradients, strict=True)]
        return float(loss(moved, valid, shift).detach())

    exact = (unrolled(1e-5) - unrolled(-1e-5)) / 2e-5
    with torch.no_grad():
        direct = float(loss(start, valid, 1e-5) - loss(start, valid, -1e-5)) / 2e-5
    for p, v in zip(parameters, start, strict=True):
        p.data.copy_(v)
    for key, b in model.named_buffers():
        b.copy_(buffers[key])
    architect = Architect(model, NB201_ARGS)
    monkeypatch.setattr(darts, "second_order", functools.partial(darts.second_order, radius=1e-6))
    torch.manual_seed(3)
    architect.step(*train, *valid, eta, optimizer, unrolled=True)
    got = float(alphas.grad[0, column])
    assert got == pytest.approx(exact, rel=1e-3)
    # the first-order gradient is another, so agreement says something
    assert abs(direct - exact) > 10 * abs(got - exact)


@BOTH
def test_show_arch_parameters(build, caplog):
    with caplog.at_level(logging.INFO):
        build().show_arch_parameters()
    assert ("normal" if build is darts_network else "cell") in caplog.text


def test_errors():
    with pytest.raises(ValueError, match="reg_type='l1'"):
        darts_network(reg_type="l1")
    with pytest.raises(ValueError, match="set species to 'dirichlet'"):
        tiny_network(species="softmax", reg_type="kl")
    with pytest.raises(ValueError, match="species='dirac'"):
        tiny_network(species="dirac")
