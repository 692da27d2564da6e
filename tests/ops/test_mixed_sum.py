"""mixed_sum on every backend against plain PyTorch."""

from __future__ import annotations

import op_checks
import pytest
import torch
from op_checks import DTYPES, LAYOUTS, Record, assert_as_precise, gradients, lay_out
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastnas
from fastnas import use_backend
from fastnas.ops import mixed_sum

SHAPES = {"empty": (0, 3, 2, 2), "one": (1, 1, 1, 1), "odd": (2, 3, 5, 7), "large": (2, 8, 33, 32)}  # large: 5 pieces


def make(shape: tuple[int, ...], count: int, device: str = "cpu", seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    xs = [torch.randn(shape, generator=random, dtype=torch.float64).to(device) for _ in range(count)]
    weights = torch.randn(count, generator=random, dtype=torch.float64).to(device)
    return xs, weights, torch.randn(shape, generator=random, dtype=torch.float64).to(device)


def call(tensors: list[Tensor]) -> Tensor:
    return mixed_sum(tensors[1:], tensors[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(target, shape, dtype, layout):
    xs, weights, grad = make(SHAPES[shape], 5, target.device)
    xs = [lay_out(x.to(dtype), layout) for x in xs]
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    grad = lay_out(grad.to(dtype), layout)
    ours = gradients(call, [weights, *xs], grad)
    with use_backend("reference"):
        theirs = gradients(call, [weights, *xs], grad)
        exact = gradients(call, [weights.double(), *(x.double() for x in xs)], grad.double())
    assert_as_precise(ours, theirs, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_layouts(target, layout):
    xs, weights, grad = make((2, 4, 3, 5), 3, target.device)
    xs[1] = lay_out(xs[1], layout)
    ours = gradients(call, [weights, *xs], grad)
    with use_backend("reference"):
        theirs = gradients(call, [weights, *xs], grad)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_unaligned_memory(target, offset):
    """Slices of one buffer: addresses that are no multiple of 16 bytes, and a length that is none of the vector's."""
    room = torch.arange(500, dtype=torch.float32, device=target.device).sin()
    xs = [room[offset + 100 * k : offset + 100 * k + 97] for k in range(4)]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], device=target.device)
    ours = gradients(call, [weights, *xs], room[:97])
    with use_backend("reference"):
        exact = gradients(call, [weights.double(), *(x.double() for x in xs)], room[:97].double())
    assert all(op_checks.error(a, b) < 1e-6 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("count", [1, 2, 32, 33, 70])
def test_any_number_of_summands(target, count):
    xs, weights, grad = make((3, 4), count, target.device)
    ours = gradients(call, [weights, *xs], grad)
    with use_backend("reference"):
        theirs = gradients(call, [weights, *xs], grad)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_any_dtype(target, weights_dtype):
    xs, weights, grad = make((2, 3), 3, target.device)
    y, grad_weights, *_ = gradients(call, [weights.to(weights_dtype), *(x.float() for x in xs)], grad)
    assert (y.dtype, grad_weights.dtype) == (torch.float32, weights_dtype)


def test_gradcheck(target):
    xs, weights, _ = make((2, 3, 2, 2), 3, target.device)
    assert torch.autograd.gradcheck(lambda *t: call(list(t)), [t.requires_grad_() for t in (weights, *xs)])


@pytest.mark.parametrize("shape", ["empty", "odd"])
def test_opcheck(target, shape):
    xs, weights, grad = make(SHAPES[shape], 3, target.device)
    opcheck(target.ops.mixed_sum.default, (xs, weights))
    for need in [(True, True), (True, False), (False, True)]:
        opcheck(target.ops._mixed_sum_backward.default, (grad, xs, weights, *need))


@pytest.mark.parametrize("need", ["weights", "xs", "one x"])
def test_only_the_wanted_gradients(target, need):
    xs, weights, grad = make((2, 3, 4), 3, target.device)
    wanted = {"weights": [weights], "xs": xs, "one x": [xs[1]]}[need]
    for t in wanted:
        t.requires_grad_()
    ours = torch.autograd.grad(mixed_sum(xs, weights), wanted, grad)
    with use_backend("reference"):
        theirs = torch.autograd.grad(mixed_sum(xs, weights), wanted, grad)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_same_tensor_twice(target):
    xs, weights, grad = make((5,), 1, target.device)
    ours = gradients(lambda t: mixed_sum([t[1], t[1]], t[0]), [weights.repeat(2), xs[0]], grad)
    assert torch.allclose(ours[2], 2 * weights * grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(target, dtype, monkeypatch):
    xs, weights, grad = make((3, 8, 33, 32), 4, target.device)
    inputs = [weights.to(torch.float64 if dtype == torch.float64 else torch.float32), *(x.to(dtype) for x in xs)]
    first = gradients(call, inputs, grad.to(dtype))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            monkeypatch.setenv("FASTNAS_EMULATOR_SEED", str(n))  # another order of threads and blocks
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(call, inputs, grad.to(dtype)), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_graphs_and_checkpoints(target):
    xs, weights, grad = make((2, 6), 3, target.device)
    leaves = [t.requires_grad_() for t in (weights, *xs)]
    y = call(leaves)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    other = call([2 * t for t in leaves])  # a second graph, alive at the same time
    second = torch.autograd.grad(y, leaves, grad)
    torch.autograd.grad(other, leaves, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        hooked = torch.autograd.grad(call(leaves), leaves, grad)
    again = torch.autograd.grad(checkpoint(lambda *t: call(list(t)), *leaves, use_reentrant=False), leaves, grad)
    for results in (second, hooked, again):
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_saves_nothing_but_its_inputs(target):
    xs, weights, _ = make((4, 4), 3, target.device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        call([t.requires_grad_() for t in (weights, *xs)])
    assert set(saved) == {t.data_ptr() for t in (weights, *xs)}


def test_one_launch_and_no_arithmetic_elsewhere(target):
    xs, weights, grad = make((2, 4, 5, 5), 3, target.device)
    leaves = [t.requires_grad_() for t in (weights, *xs)]
    target.library.reset_counters()
    with Record() as record:
        torch.autograd.grad(call(leaves), leaves, grad)
    counters = target.library.counters()
    assert counters["mixed_sum"] == (1, 4 * 200 * 8)
    assert counters["mixed_sum_backward"] == (1, 7 * 200 * 8)
    assert set(record.names) <= {"mixed_sum", "_mixed_sum_backward", "detach"}


def test_differentiable_once_says_what_to_do(target):
    xs, weights, _ = make((3,), 2, target.device)
    leaves = [t.requires_grad_() for t in (weights, *xs)]
    grads = torch.autograd.grad(call(leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(grads[0].sum(), leaves[1])
    with fastnas.twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda *t: call(list(t)), leaves)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does it
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(target, dynamic):
    xs, weights, grad = make((2, 3, 4, 4), 3, target.device)
    function = torch.compile(lambda t: call(t).relu(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    ours = gradients(function, [weights, *xs], grad)
    theirs = gradients(lambda t: call(t).relu(), [weights, *xs], grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nan_and_infinity_go_where_they_should(target):
    xs = [
        torch.tensor([1.0, float("nan"), float("inf"), 4.0], device=target.device),
        torch.ones(4, device=target.device),
    ]
    y = mixed_sum(xs, torch.tensor([0.0, 1.0], device=target.device))
    assert torch.equal(torch.isnan(y), torch.tensor([False, True, True, False], device=target.device))
    assert y[3] == 1


def tensors(**changes):
    arguments = {"xs": [torch.ones(2, 3), torch.ones(2, 3)], "weights": torch.ones(2)}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"xs": []}, ValueError, "xs is empty"),
        ({"xs": [torch.ones(2), 1.0]}, TypeError, r"xs\[1\] is a float"),
        ({"xs": [torch.ones(2, dtype=torch.int64)] * 2}, TypeError, r"xs\[0\] has dtype torch.int64"),
        ({"xs": [torch.ones(2, 3), torch.ones(3, 2)]}, ValueError, r"xs\[1\] has shape \(3, 2\).*\(2, 3\)"),
        ({"xs": [torch.ones(2, 3), torch.ones(2, 3).double()]}, ValueError, r"xs\[1\] has dtype torch.float64"),
        ({"xs": [torch.ones(2, 3), torch.ones(2, 3, device="meta")]}, ValueError, r"xs\[1\] has device meta"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\): expected \(2,\)"),
        ({"weights": torch.ones(2, 1)}, ValueError, "weights has shape"),
        ({"weights": [0.5, 0.5]}, TypeError, "weights is a list"),
        ({"weights": torch.ones(2, dtype=torch.int32)}, TypeError, "weights has dtype torch.int32"),
        ({"weights": torch.ones(2, device="meta")}, ValueError, "weights is on meta.*move weights there"),
    ],
    ids=lambda v: None if isinstance(v, (dict, type)) else v[:24],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_arguments_are_named(backend, changes, kind, message):
    with pytest.raises(kind, match=message):
        mixed_sum(**tensors(**changes), backend=backend)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='fast'"):
        mixed_sum(**tensors(), backend="fast")


def test_nan_weights_are_found_under_debug(target):
    arguments = tensors(weights=torch.tensor([0.5, float("nan")]))
    mixed_sum(**arguments)
    with fastnas.debug(), pytest.raises(ValueError, match="weights holds NaN"):
        mixed_sum(**arguments)


@pytest.mark.parametrize(
    ("xs", "weights", "message"),
    [
        ([], torch.ones(0), "1 to 32 tensors"),
        ([torch.ones(2)] * 33, torch.ones(33), "1 to 32 tensors"),
        ([torch.ones(2)], torch.ones(2), "one entry for each"),
        ([torch.ones(2)], torch.ones(1).double(), "float32"),
        ([torch.ones(2), torch.ones(3)], torch.ones(2), "shape and strides"),
        ([torch.ones(2), torch.ones(2).double()], torch.ones(2), "dtype, device and shape"),
    ],
)
def test_raw_op_checks_its_arguments(target, xs, weights, message):
    with pytest.raises(RuntimeError, match=message):
        target.ops.mixed_sum([x.to(target.device) for x in xs], weights.to(target.device))
