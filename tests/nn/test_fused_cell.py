"""Cells as one op: the same as their edges one by one, and one by one wherever the op would not be what modules do."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastnas
from fastnas.nn import Cell, MixedOp, NASBench201Cell


class Case:
    """A cell on random inputs, with everything that a step computes."""

    def __init__(self, kind="normal", training=True, k=1):
        torch.manual_seed(0)
        size = 6 if kind != "wide" else 12
        if kind == "nasbench201":
            self.cell = NASBench201Cell(4)
            self.inputs = [torch.randn(3, 4, 6, 6)]
        else:
            self.cell = Cell(3, 2, 8, 8, 4 * k, kind == "reduce", kind == "wide", k=k)
            self.inputs = [torch.randn(3, 8, size, size), torch.randn(3, 8, 6, 6)]
        self.cell.double().train(training)
        self.inputs = [i.double().requires_grad_() for i in self.inputs]
        self.weights = torch.rand(len(self.cell._ops), len(self.cell._ops[0]._ops), dtype=torch.float64)
        self.weights.requires_grad_()

    def fused(self):
        """Whether a forward of the cell is one op."""
        with torch.profiler.profile() as trace, torch.no_grad():
            self.cell(*self.inputs, self.weights)
        return "fastnas::mixed_cell" in {e.key for e in trace.key_averages()}

    def outcome(self, one_by_one=False, **more):
        cell = copy.deepcopy(self.cell)
        if one_by_one:
            for edge in cell._ops:
                edge.register_forward_hook(lambda *_: None)
        y = cell(*self.inputs, self.weights, **more)
        torch.manual_seed(1)
        leaves = [*self.inputs, self.weights, *cell.parameters()]
        grads = torch.autograd.grad(
            y, leaves, torch.randn(y.shape, dtype=y.dtype), allow_unused=True, materialize_grads=True
        )
        return [y.detach(), *grads, *cell.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["normal", "reduce", "wide", "nasbench201"])
def test_equals_its_edges_one_by_one(kind, training):
    case = Case(kind, training)
    assert case.fused()
    for a, b in zip(case.outcome(), case.outcome(one_by_one=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["normal", "reduce", "wide"])
def test_partial_channels_equal_their_edges_one_by_one(kind, training):
    case = Case(kind, training, k=2)
    assert case.fused()
    for a, b in zip(case.outcome(), case.outcome(one_by_one=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_widened_edges_are_read_again():
    case = Case("reduce", k=4)
    case.cell(*case.inputs, case.weights)
    for edge in case.cell._ops:
        edge.wider(2, torch.Generator().manual_seed(0))
    assert case.fused()
    for a, b in zip(case.outcome(), case.outcome(one_by_one=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    case.cell._ops[0].wider(1)
    assert not case.fused()
    assert case.cell(*case.inputs, case.weights).isfinite().all()


@pytest.mark.parametrize("k", [1, 2])
def test_edge_weights(k):
    case = Case(k=k)
    beta = torch.rand(len(case.cell._ops), dtype=torch.float64)
    for a, b in zip(
        case.outcome(edge_weights=beta), case.outcome(edge_weights=list(beta), one_by_one=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rows_of_scalars_and_more_rows_than_edges():
    case = Case()
    expected = case.cell(*case.inputs, case.weights)
    rows = [list(row) for row in case.weights]
    assert torch.equal(case.cell(*case.inputs, rows), expected)
    case = Case()
    more = torch.cat([case.weights, torch.ones(2, 8, dtype=torch.float64)])
    assert torch.equal(case.cell(*case.inputs, more, torch.ones(len(case.cell._ops) + 1)), expected)


@pytest.mark.parametrize("kind", ["normal", "nasbench201"])
def test_an_empty_batch_leaves_running_statistics_alone(kind):
    case = Case(kind)
    y = case.cell(*(i[:0] for i in case.inputs), case.weights)
    assert len(y) == 0
    assert all(b.isfinite().all() for n, b in case.cell.named_buffers() if "_ops" in n)


def test_a_cell_without_batch_norms_in_eval_mode():
    cell = NASBench201Cell(4, primitives=("none", "skip_connect", "avg_pool_3x3")).eval()
    assert cell(torch.ones(2, 4, 5, 5), torch.ones(6, 3)).isfinite().all()


def test_wrong_channels():
    with pytest.raises(ValueError, match="x has 6 channels: expected 4"):
        NASBench201Cell(4)(torch.ones(2, 6, 5, 5), torch.ones(6, 5))


def test_what_a_module_reads_is_read_again():
    case = Case()
    before = case.cell(*case.inputs, case.weights)
    case.cell._ops[0]._ops[2][0].count_include_pad = True
    changed = case.cell(*case.inputs, case.weights)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, case.outcome(one_by_one=True)[0])


def test_pruned_modules():
    edge = MixedOp([nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.Identity()])
    prune.random_unstructured(edge._ops[0][1], "bias", 0.5)
    assert edge(torch.ones(2, 4, 5, 5), torch.ones(2)).isfinite().all()


def test_copies_on_other_threads_use_their_own_parameters():
    # as torch.nn.DataParallel makes them: one __dict__ copied
    case = Case()
    twins = [copy.copy(case.cell) for _ in range(2)]
    for scale, twin in enumerate(twins, 1):
        twin._modules = dict(twin._modules, _ops=copy.deepcopy(case.cell._ops))
        with torch.no_grad():
            for p in twin._ops.parameters():
                p.mul_(scale)
    expected = [copy.deepcopy(t)(*case.inputs, case.weights) for t in twins]
    wrong, barrier = [], threading.Barrier(2)

    def work(i):
        for _ in range(20):
            barrier.wait()
            with torch.no_grad():
                if not torch.equal(twins[i](*case.inputs, case.weights), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def partial(cell):
    cell._ops[3] = MixedOp(4, 1, k=2).double()


def own_module(cell):
    cell._ops[8]._ops[3] = nn.Conv2d(4, 4, 3, padding=1, bias=False).double()


def edge_hook(cell):
    cell._ops[0].register_forward_hook(lambda *_: None)


def own_class(cell):
    cell._ops[1].__class__ = type("Mine", (MixedOp,), {})


def mixed_modes(cell):
    cell._ops[2].eval()


@pytest.mark.parametrize("change", [partial, own_module, edge_hook, own_class, mixed_modes])
def test_what_the_op_does_not_know_is_run_edge_by_edge(change):
    case = Case()
    assert case.fused()
    change(case.cell)
    assert not case.fused()
    with fastnas.use_backend("reference"):
        expected = case.outcome()
    for a, b in zip(case.outcome(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("where", ["candidate", "convolution"])
def test_hooks_inside_are_called(where):
    case, seen = Case(), []
    candidate = case.cell._ops[0]._ops[4]
    module = candidate if where == "candidate" else candidate.op[1]
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    case.cell(*case.inputs, case.weights)
    assert seen == [1]
    handle.remove()
    case.cell(*case.inputs, case.weights)
    assert seen == [1]
    assert case.fused()


def test_modes_follow_the_cell():
    case = Case()
    case.cell(*case.inputs, case.weights)
    before = [b.clone() for b in case.cell.buffers()]
    case.cell.eval()
    case.cell(*case.inputs, case.weights)
    assert all(torch.equal(a, b) for a, b in zip(before, case.cell.buffers(), strict=True))
    case.cell.train()
    case.cell(*case.inputs, case.weights)
    assert not all(torch.equal(a, b) for a, b in zip(before, case.cell.buffers(), strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_have_their_own_parameters(duplicate):
    case = Case()
    y = case.cell(*case.inputs, case.weights)
    case.cell = duplicate(case.cell)
    with torch.no_grad():
        for p in case.cell.parameters():
            p.zero_()
    assert not torch.allclose(case.cell(*case.inputs, case.weights), y)


def test_a_cell_that_was_pickled_whole_before_cells_were_fused():
    case = Case()
    expected = case.cell(*case.inputs, case.weights)
    del case.cell._fused
    case.cell = pickle.loads(pickle.dumps(case.cell))
    assert case.fused()
    torch.testing.assert_close(case.cell(*case.inputs, case.weights), expected)


def test_autocast_gives_its_dtype():
    case = Case()
    case.cell.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.cell(*(i.detach().float() for i in case.inputs), case.weights.detach().float())
    assert y.dtype == torch.bfloat16
