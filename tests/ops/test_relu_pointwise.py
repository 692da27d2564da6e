"""relu_pointwise on every backend against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_checks import DTYPES, LAYOUTS, Record, assert_as_precise, gradients, lay_out
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastnas
from fastnas import use_backend
from fastnas.ops import relu_pointwise

# x, and the channels that each weight gives. The large one has several chunks of pixels, the last of them not full.
SHAPES = {
    "empty": ((0, 4, 4, 4), (2, 3)),
    "one": ((1, 1, 2, 2), (1, 1)),
    "odd": ((3, 5, 6, 10), (7, 3)),
    "large": ((2, 36, 22, 18), (20, 24)),
}
MODES = [(1, 1), (2, 1), (2, 2)]  # stride, weights


def make(
    shape: tuple[int, ...], outs: tuple[int, ...], stride: int, device: str = "cpu", seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Returns x and the weights, and a gradient."""
    random = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64).to(device)

    n, c, h, w = shape
    inputs = [draw(*shape), *(draw(out, c, 1, 1) / c**0.5 for out in outs)]
    return inputs, draw(n, sum(outs), h // stride, w // stride)


def call(stride: int):
    return lambda tensors: relu_pointwise(tensors[0], tensors[1:], stride)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stride", "groups"), MODES)
def test_matches_reference(target, stride, groups, shape, dtype, layout):
    size, outs = SHAPES[shape]
    (x, *weights), grad = make(size, outs[:groups], stride, target.device)
    inputs = [lay_out(x.to(dtype), layout), *(w.to(dtype) for w in weights)]
    grad = lay_out(grad.to(dtype), layout)
    ours = gradients(call(stride), inputs, grad)
    with use_backend("reference"):
        theirs = gradients(call(stride), inputs, grad)
        exact = gradients(call(stride), [t.double() for t in inputs], grad.double())
    assert_as_precise(ours, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("c", "outs"), [(68, (40, 4)), (16, (16, 16)), (70, (33, 5)), (8, (72, 8)), (3, (12, 50))])
def test_matches_reference_at_every_width(target, c, outs, dtype):
    """One to five vectors of channels, and every tile of the CUDA kernels."""
    for stride, used in ((1, outs[:1]), (2, outs)):
        inputs, grad = make((2, c, 12, 12), used, stride, target.device)
        inputs, grad = [t.to(dtype) for t in inputs], grad.to(dtype)
        ours = gradients(call(stride), inputs, grad)
        with use_backend("reference"):
            theirs = gradients(call(stride), inputs, grad)
            exact = gradients(call(stride), [t.double() for t in inputs], grad.double())
        assert_as_precise(ours, theirs, exact)


def test_reference_is_the_published_definition():
    """FactorizedReduce before its batch norm: two convolutions of stride 2, the second on x[:, :, 1:, 1:]."""
    (x, *weights), _ = make((2, 6, 8, 4), (3, 3), 2)
    y = relu_pointwise(x, weights, 2, backend="reference")
    r = torch.relu(x)
    apart = [F.conv2d(r, weights[0], stride=2), F.conv2d(r[:, :, 1:, 1:], weights[1], stride=2)]
    assert torch.equal(y, torch.cat(apart, 1))
    assert torch.equal(relu_pointwise(x, weights[:1], backend="reference"), F.conv2d(r, weights[0]))


def test_values_and_gradients_are_those_worked_out_by_hand(target):
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0], [5.0, 6.0, 7.0, -8.0]], device=target.device).view(1, 1, 2, 4)
    x.requires_grad_()
    weights = [torch.full((1, 1, 1, 1), w, device=target.device, requires_grad=True) for w in (10.0, 100.0)]
    y = relu_pointwise(x, weights, 2)
    assert y.flatten().tolist() == [10, 30, 600, 0]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0], device=target.device).view(1, 2, 1, 2)
    grad_x, *grad_weights = torch.autograd.grad(y, [x, *weights], grad)
    assert grad_x.flatten().tolist() == [10, 0, 20, 0, 0, 300, 0, 0]
    assert [g.item() for g in grad_weights] == [7, 18]


@pytest.mark.parametrize("stride", [1, 2])
def test_several_weights_are_concatenated(target, stride):
    (x, *weights), _ = make((2, 5, 4, 4), (3, 1), stride, target.device)
    ours = relu_pointwise(x, weights, stride)
    r = torch.relu(x)
    apart = [F.conv2d(r[:, :, g:, g:] if stride == 2 else r, w, stride=stride) for g, w in enumerate(weights)]
    torch.testing.assert_close(ours, torch.cat(apart, 1), rtol=1e-12, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_memory(target, offset):
    """Maps at addresses that are no multiple of 16 bytes, though their channels are one of 4."""
    inputs, grad = make((2, 8, 4, 6), (4, 8), 2, target.device)

    def unaligned(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + offset, dtype=torch.float32, device=t.device)
        n, c, h, w = t.shape
        return room[offset:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)

    ours = gradients(call(2), [unaligned(inputs[0]), *(w.float() for w in inputs[1:])], unaligned(grad))
    with use_backend("reference"):
        theirs = gradients(call(2), inputs, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "groups"), MODES)
def test_nan_infinity_and_zero_go_where_torch_puts_them(target, stride, groups, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.ones(1, 3, 4, 8, dtype=dtype, device=target.device)
    x[0, 0, 0] = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 2.0], dtype=dtype)
    x[0, 2, 3] = torch.tensor([1.0, nan, -1.0, inf, 0.0, -inf, -nan, 1.0], dtype=dtype)
    weights = [torch.ones(2, 3, 1, 1, dtype=dtype, device=target.device) * (1 + g) for g in range(groups)]
    grad = torch.ones(1, 2 * groups, 4 // stride, 8 // stride, dtype=dtype, device=target.device)
    grad[0, 0, 0, 1] = nan
    grad[0, 1, -1, -1] = inf
    ours = gradients(call(stride), [x, *weights], grad)
    with use_backend("reference"):  # in float64: torch's bfloat16 convolution spreads an infinity to other pixels
        theirs = gradients(call(stride), [t.double() for t in (x, *weights)], grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(dtype), equal_nan=True, rtol=1e-6, atol=0)
    assert all(torch.isnan(t).any() for t in ours[:2])


@pytest.mark.parametrize(("stride", "groups"), MODES)
def test_gradcheck(target, stride, groups):
    inputs, _ = make((2, 3, 4, 2), (2, 3)[:groups], stride, target.device)
    assert inputs[0].abs().min() > 1e-3  # away from ReLU's kink
    assert torch.autograd.gradcheck(lambda *t: call(stride)(t), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize(("stride", "groups"), MODES)
def test_opcheck(target, stride, groups):
    (x, *weights), grad = make((3, 5, 6, 10), (7, 3)[:groups], stride, target.device)
    x, grad = (lay_out(t, "channels_last") for t in (x, grad))
    opcheck(target.ops.relu_pointwise.default, (x, weights, stride))
    for need in [(True, True), (True, False), (False, True)]:
        opcheck(target.ops._relu_pointwise_backward.default, (grad, x, weights, stride, *need))


@pytest.mark.parametrize(("stride", "groups"), MODES)
@pytest.mark.parametrize("wanted", ["x", "weights"])
def test_each_gradient_alone(target, wanted, stride, groups):
    (x, *weights), grad = make((2, 5, 4, 6), (3, 2)[:groups], stride, target.device)
    leaves = [t.requires_grad_() for t in ([x] if wanted == "x" else weights)]
    ours = torch.autograd.grad(relu_pointwise(x, weights, stride), leaves, grad)
    with use_backend("reference"):
        theirs = torch.autograd.grad(relu_pointwise(x, weights, stride), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stride", "groups"), MODES)
def test_same_bits_with_any_order_of_threads(target, stride, groups, monkeypatch):
    inputs, grad = make((4, 20, 32, 32), (9, 6)[:groups], stride, target.device)
    inputs, grad = [t.float() for t in inputs], grad.float()
    first = gradients(call(stride), inputs, grad)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            monkeypatch.setenv("FASTNAS_EMULATOR_SEED", str(n))  # another order of threads and blocks
            again = gradients(call(stride), inputs, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_graphs_and_checkpoints(target):
    inputs, grad = make((2, 5, 4, 6), (3, 2), 2, target.device)
    leaves = [t.requires_grad_() for t in inputs]
    y = call(2)(leaves)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    other = call(2)([2 * t for t in leaves])  # a second graph, alive at the same time
    second = torch.autograd.grad(y, leaves, grad)
    torch.autograd.grad(other, leaves, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        hooked = torch.autograd.grad(call(2)(leaves), leaves, grad)
    again = torch.autograd.grad(checkpoint(lambda *t: call(2)(t), *leaves, use_reentrant=False), leaves, grad)
    for results in (second, hooked, again):
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_saves_nothing_but_its_inputs(target):
    inputs, _ = make((2, 5, 4, 6), (3, 2), 2, target.device)
    inputs[0] = lay_out(inputs[0], "channels_last")
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        call(2)([t.requires_grad_() for t in inputs])
    assert sorted(saved) == sorted(t.data_ptr() for t in inputs)


@pytest.mark.parametrize(("stride", "groups"), MODES)
def test_launches_and_no_arithmetic_elsewhere(target, stride, groups):
    inputs, grad = make((2, 5, 4, 6), (3, 2)[:groups], stride, target.device)
    *leaves, grad = (lay_out(t, "channels_last") for t in (*inputs, grad))
    leaves = [t.requires_grad_() for t in leaves]
    target.library.reset_counters()
    with Record() as record:
        torch.autograd.grad(call(stride)(leaves), leaves, grad)
    counters = target.library.counters()
    out, pixels = sum((3, 2)[:groups]), 48 // stride**2
    operands = pixels * (5 * groups + out) + 5 * out
    assert counters["relu_pointwise"] == (1, 8 * operands)
    backward = {"relu_pointwise_backward": 8 * (operands + 5 * 48 + 5 * out)}
    if target.ops is torch.ops.fastnas_emulated or target.device == "cuda":
        backward = {  # all pixels are one chunk
            "relu_pointwise_backward_input": 8 * (operands + 5 * 48),
            "relu_pointwise_backward_weights": 8 * operands,
            "relu_pointwise_backward_finish": 8 * 2 * 5 * out,
        }
    assert {k: v for k, v in counters.items() if k != "relu_pointwise"} == {k: (1, v) for k, v in backward.items()}
    assert set(record.names) <= {"relu_pointwise", "_relu_pointwise_backward", "detach"}


def test_differentiable_once_says_what_to_do(target):
    inputs, _ = make((1, 2, 2, 2), (2, 1), 2, target.device)
    leaves = [t.requires_grad_() for t in inputs]
    grads = torch.autograd.grad(call(2)(leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(grads[0].sum(), leaves[1])
    with fastnas.twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda *t: call(2)(t), leaves)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does it
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(target, dynamic):
    inputs, grad = make((2, 5, 4, 6), (3, 2), 2, target.device)
    function = torch.compile(call(2), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    ours, theirs = gradients(function, inputs, grad), gradients(call(2), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def arguments(**changes):
    return {"x": torch.ones(1, 4, 2, 2), "weights": [torch.ones(3, 4, 1, 1)], "stride": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x\[0\] is a list"),
        ({"x": torch.ones(1, 4, 2, 2, dtype=torch.int64)}, TypeError, r"x\[0\] has dtype torch.int64"),
        ({"x": torch.ones(4, 2, 2)}, ValueError, "x has 3 dimensions"),
        ({"x": torch.ones(1, 4, 5, 2), "stride": 2}, ValueError, "x is 5x2.*must be even; pad x"),
        ({"stride": 3}, ValueError, "stride is 3: expected 1 or 2"),
        ({"weights": []}, ValueError, "weights must be a sequence of at least one tensor"),
        ({"weights": torch.ones(3, 4, 1, 1)}, ValueError, r"pass \[weight\]"),
        ({"weights": [torch.ones(3, 4, 1, 1)] * 3, "stride": 2}, ValueError, "weights has 3 tensors"),
        ({"weights": [torch.ones(3, 5, 1, 1)]}, ValueError, r"weights\[0\] has shape \(3, 5, 1, 1\).*4, 1, 1"),
        ({"weights": [torch.ones(3, 4, 3, 3)]}, ValueError, r"weights\[0\] has shape"),
        ({"weights": [torch.ones(0, 4, 1, 1)]}, ValueError, r"weights\[0\] has shape"),
        ({"weights": [torch.ones(3, 4, 1, 1), None]}, TypeError, r"weights\[1\]\[0\] is a NoneType"),
        ({"weights": [torch.ones(3, 4, 1, 1, device="meta")]}, ValueError, r"weights\[0\] is on meta but x is on cpu"),
        ({"weights": [torch.ones(3, 4, 1, 1).double()]}, ValueError, r"weights\[0\] has dtype torch.float64 but x"),
    ],
    ids=lambda v: None if isinstance(v, (dict, type)) else v[:24],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_arguments_are_named(backend, changes, kind, message):
    with pytest.raises(kind, match=message):
        relu_pointwise(**arguments(**changes), backend=backend)


def test_raw_ops_check_their_arguments(target):
    ops = target.ops
    x = lay_out(torch.ones(2, 4, 4, 6, device=target.device), "channels_last")
    w = torch.ones(3, 4, 1, 1, device=target.device)
    for call_, message in [
        (lambda: ops.relu_pointwise(x.contiguous(), [w], 1), "x must be 4-d, not empty and in channels_last"),
        (lambda: ops.relu_pointwise(x[:0], [w], 1), "x must be 4-d, not empty"),
        (lambda: ops.relu_pointwise(x, [w], 3), "stride must be 1 or 2, got 3"),
        (lambda: ops.relu_pointwise(x, [w, w], 1), "one tensor where stride is 1"),
        (lambda: ops.relu_pointwise(x, [], 2), "one or two where it is 2"),
        (lambda: ops.relu_pointwise(lay_out(x[:, :, :3], "channels_last"), [w], 2), "even height and width"),
        (lambda: ops.relu_pointwise(x, [w.double()], 1), "weights must have x's dtype"),
        (lambda: ops.relu_pointwise(x, [w[:, :3]], 1), r"weights must be contiguous, of shape \(out, 4, 1, 1\)"),
        (lambda: ops._relu_pointwise_backward(x, x, [w], 1, True, True), "grad must have the output's shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call_()
