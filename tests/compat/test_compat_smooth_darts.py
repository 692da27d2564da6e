"""fastnas.compat.smooth_darts under the conditions that SmoothDARTS' scripts set."""

import argparse
import copy
import functools
import logging
import pickle

import pytest
import torch
from darts_reference import Reference, state_of
from torch import nn
from torch.nn import functional as F

from fastnas import nn as fnn
from fastnas.compat import darts, smooth_darts
from fastnas.compat.smooth_darts import Linf_PGD_alpha, Random_alpha, spaces_dict

ARGS = argparse.Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-2, arch_weight_decay=1e-3)
TWO = ["skip_connect", "sep_conv_3x3"]


def batch(seed, N=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(5, (N,), generator=generator)


def network(primitives=TWO, layers=3, **options):
    torch.manual_seed(0)
    return smooth_darts.Network(4, 5, layers, nn.CrossEntropyLoss(), primitives, **options)


@pytest.mark.parametrize("space", spaces_dict)
@pytest.mark.parametrize("perturb", [None, Random_alpha, Linf_PGD_alpha], ids=["none", "random", "pgd"])
def test_a_search_loop_runs(space, perturb):
    """train_search.py's loop, as it is in the scripts but for ``.cuda()``."""
    model = network(spaces_dict[space], 3)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    architect = smooth_darts.Architect(model, ARGS)
    start = [alpha.detach().clone() for alpha in model.arch_parameters()]
    for step in range(2):
        model.train()
        input, target = batch(step)
        architect.step(input, target, *batch(10 + step), 0.025, optimizer, unrolled=False)
        optimizer.zero_grad()
        architect.optimizer.zero_grad()
        kept = [alpha.detach().clone() for alpha in model.arch_parameters()]
        model.softmax_arch_parameters()
        if perturb:
            perturb(model, input, target, 0.3)
            optimizer.zero_grad()
            architect.optimizer.zero_grad()
        for alpha in model.arch_parameters():
            assert (alpha >= 0).all()
            torch.testing.assert_close(alpha.sum(-1), torch.ones(14))
        assert model.training
        loss = criterion(model(input, updateType="weight"), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        model.restore_arch_parameters()
        assert all(torch.equal(a, k) for a, k in zip(model.arch_parameters(), kept, strict=True))
    for alpha, was in zip(model.arch_parameters(), start, strict=True):
        assert alpha.isfinite().all()
        assert not torch.equal(alpha, was)
    model.eval()
    with torch.no_grad():
        assert model(batch(0)[0]).isfinite().all()
    genotype = model.genotype()
    assert isinstance(genotype, smooth_darts.Genotype)
    assert "none" not in dict(genotype.normal)


def test_spaces():
    assert list(spaces_dict) == ["s1", "s2", "s3", "s4", "s5"]
    for space in spaces_dict.values():
        assert list(space) == ["primitives_normal", "primitives_reduct"]
        for rows in space.values():
            assert len(rows) == 14
            assert len({len(row) for row in rows}) == 1
            assert all(p in smooth_darts.OPS for row in rows for p in row)
    assert spaces_dict["s1"]["primitives_normal"][12] == ["dil_conv_3x3", "dil_conv_5x5"]
    assert spaces_dict["s5"]["primitives_normal"][0] == smooth_darts.PRIMITIVES
    assert len(smooth_darts.PRIMITIVES) == 7


def test_mixed_op_and_cell(monkeypatch):
    assert smooth_darts.MixedOp is fnn.MixedOp
    x = torch.randn(2, 8, 6, 6)
    assert smooth_darts.MixedOp(8, 2, TWO)(x, torch.rand(2)).shape == (2, 8, 3, 3)
    rows = list(torch.rand(14, 7))
    assert smooth_darts.Cell(4, 4, 8, 8, 4, False, False)(x, x, rows).shape == (2, 16, 6, 6)
    # published scripts set this on all of torch's modules
    monkeypatch.setattr(nn.Module, "PRIMITIVES", spaces_dict["s2"], raising=False)
    cell = smooth_darts.Cell(4, 4, 8, 8, 8, True, False)
    assert [type(op) for op in cell._ops[0]._ops] == [fnn.operations.FactorizedReduce, fnn.operations.SepConv]
    assert cell(x, x, torch.rand(14, 2), 0.0).shape == (2, 32, 3, 3)


def test_each_edge_has_its_own_candidates():
    model = network(spaces_dict["s1"], 3)
    assert [tuple(alpha.shape) for alpha in model.arch_parameters()] == [(14, 2), (14, 2)]
    assert all(alpha.is_leaf and 3e-4 < alpha.std() < 3e-3 for alpha in model.arch_parameters())
    keys = set(model.state_dict())
    assert "cells.0._ops.0._ops.1.op.1.weight" in keys  # dil_conv_3x3
    assert "cells.0._ops.5._ops.0.1.running_mean" in keys  # max_pool_3x3
    assert "cells.1._ops.4._ops.1.op.1.weight" in keys  # of the reduction, dil_conv_5x5
    assert model.state_dict()["cells.1._ops.4._ops.1.op.1.weight"].shape[-1] == 5
    assert not [key for key in keys if "alpha" in key]
    # every edge prefers its second candidate, and later inputs
    for alpha in model.arch_parameters():
        alpha.data = torch.stack([torch.zeros(14), torch.arange(1.0, 15.0)], 1)
    rows = spaces_dict["s1"]
    normal, reduce = model.genotype().normal, model.genotype().reduce
    edges = [0, 2, 5, 9]
    for genes, names in ((normal, rows["primitives_normal"]), (reduce, rows["primitives_reduct"])):
        expected = []
        for node, first in enumerate(edges):
            expected += [(names[first + j][1], j) for j in (node + 1, node)]
        assert genes == expected


def test_none_is_never_derived():
    model = network(spaces_dict["s3"], 3)
    for alpha in model.arch_parameters():
        alpha.data = torch.tensor([9.0, 1.0, 2.0]).repeat(14, 1)
    assert {op for op, _ in model.genotype().normal} == {"sep_conv_3x3"}


@pytest.mark.parametrize("update", ["alpha", "weight"])
def test_forward_and_gradient_are_the_definition(update):
    model = network(TWO).double()
    for alpha in model.arch_parameters():
        alpha.data.normal_()
    if update == "weight":
        model.softmax_arch_parameters()
    reference = Reference(state_of(model, torch.float64), primitives=TWO)
    x, target = batch(1, dtype=torch.float64)
    arch = model.arch_parameters()
    tables = arch if update == "weight" else [alpha.softmax(-1) for alpha in arch]
    expected = reference.network(x, dict(zip(("normal", "reduce"), tables, strict=True)), 3)
    torch.testing.assert_close(model(x, updateType=update), expected, rtol=1e-9, atol=1e-11)
    got = torch.autograd.grad(model._loss(x, target, updateType=update), arch)
    want = torch.autograd.grad(F.cross_entropy(expected, target), arch)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="updateType='x'"):
        model(x, updateType="x")


def test_clip():
    model = network()
    model.alphas_normal.data[:3] = torch.tensor([[0.5, 1.5], [-0.2, 0.3], [-0.2, -0.1]])
    model.clip()
    torch.testing.assert_close(
        model.alphas_normal.data[:3], torch.tensor([[1 / 3, 2 / 3], [0.0, 1.0], [0.0, 1.0]]), rtol=1e-6, atol=0
    )


def test_random_perturbation_stays_near():
    model = network(spaces_dict["s5"], 3)
    model.softmax_arch_parameters()
    before = model.alphas_normal.detach().clone()
    torch.manual_seed(0)
    Random_alpha(model, None, None, 0.03)
    # rows of 1/7 move by at most 0.03, and are then divided by a sum within 1 +- 0.21
    assert 0 < (model.alphas_normal - before).abs().max() < (1 / 7 + 0.03) / 0.79 - 1 / 7
    # with the published largest radius some rows of 7 have nothing left to divide by
    for _ in range(300):
        model.alphas_normal.data.copy_(before)
        Random_alpha(model, None, None, 0.3)
        assert model.alphas_normal.isfinite().all()


def test_pgd_raises_the_loss_and_nothing_else():
    model = network(spaces_dict["s5"], 3)
    x, target = batch(0)
    model._loss(x, target).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.softmax_arch_parameters()
    start = [alpha.detach().clone() for alpha in model.arch_parameters()]
    model.eval()
    with torch.no_grad():
        before = model._loss(x, target, "weight")
    model.train()
    Linf_PGD_alpha(model, x, target, 0.1)
    assert model.training
    model.eval()
    with torch.no_grad():
        after = model._loss(x, target, "weight")
        Random_alpha(model, x, target, 0.0)
        chance = []
        for _ in range(5):
            for alpha, value in zip(model.arch_parameters(), start, strict=True):
                alpha.data.copy_(value)
            Random_alpha(model, x, target, 0.1)
            chance.append(model._loss(x, target, "weight"))
    assert after > before
    assert after > max(chance)
    now = model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in state.items())
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)


def test_pgd_without_success_changes_nothing():
    losses = iter([torch.tensor(1.0), torch.tensor(2.0)])  # at what was found, and at the start

    def criterion(logits, target):
        return F.cross_entropy(logits, target) if torch.is_grad_enabled() else next(losses)

    model = smooth_darts.Network(4, 5, 3, criterion, TWO)
    model.softmax_arch_parameters()
    start = model.alphas_normal.detach().clone()
    Linf_PGD_alpha(model, *batch(0), 0.1)
    assert next(losses, None) is None
    assert torch.equal(model.alphas_normal, start)


def test_drop_path():
    x = batch(0)[0]
    model = network(drop_path_prob=0.5)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    model.drop_path_prob = 0.0
    undropped = model(x)
    cell = smooth_darts.Cell(4, 4, 12, 12, 4, False, False, primitives=TWO)
    y = torch.randn(2, 12, 6, 6)
    weights = torch.rand(14, 2)
    # nearly nothing is dropped, and the kept is scaled by nearly 1
    torch.testing.assert_close(cell(y, y, weights, 1e-7), cell(y, y, weights), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(undropped, model(x))


def test_new_copies_and_pickles():
    model = network(spaces_dict["s1"], 3).double()
    model._loss(*batch(0, dtype=torch.float64)).backward()
    new = model.new()
    assert torch.equal(new.alphas_normal, model.alphas_normal)
    assert new.alphas_normal is not model.alphas_normal
    assert new.alphas_normal.grad is None
    assert not torch.equal(new.classifier.weight, model.classifier.weight)
    new.load_state_dict(model.state_dict())
    x = batch(1, dtype=torch.float64)[0]
    assert torch.equal(new(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model)).alphas_reduce, model.alphas_reduce)


@pytest.mark.parametrize("space", ["s2", "s4"])
def test_second_order(space, monkeypatch):
    """Noise is the same in all passes of a step, so what the finite difference sees is not chance."""
    gradients = []
    exact = darts.second_order
    for radius in (1e-5, 1e-6):
        torch.manual_seed(0)
        model = network(spaces_dict[space], 3).double()
        architect = smooth_darts.Architect(model, ARGS)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        monkeypatch.setattr(darts, "second_order", functools.partial(exact, radius=radius))
        double = {"dtype": torch.float64}
        architect.step(*batch(0, **double), *batch(1, **double), 0.05, optimizer, unrolled=True)
        gradients.append(torch.cat([alpha.grad.flatten() for alpha in model.arch_parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_errors():
    with pytest.raises(ValueError, match="14 edges"):
        network({"primitives_normal": [TWO] * 3, "primitives_reduct": [TWO] * 14})
    with pytest.raises(ValueError, match="primitives_reduct"):
        network({"primitives_normal": [TWO] * 14})
    with pytest.raises(ValueError, match="not 'none'"):
        network(["none"])
    with pytest.raises(ValueError, match="sep_conv_9x9"):
        network(["sep_conv_9x9"])
    with pytest.raises(RuntimeError, match="softmax_arch_parameters first"):
        network().restore_arch_parameters()


def test_show_alphas(caplog):
    with caplog.at_level(logging.INFO):
        network().show_alphas()
    assert "normal" in caplog.text
    assert "0.5" in caplog.text
