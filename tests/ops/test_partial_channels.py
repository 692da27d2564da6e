"""partial_channels on every backend against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from op_checks import DTYPES, LAYOUTS, Record, gradients, lay_out
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastnas
from fastnas import use_backend
from fastnas.ops import Bypass, partial_channels, partial_channels_split

SHAPES = {"empty": (0, 4, 4, 4), "one": (1, 4, 2, 2), "odd": (3, 12, 6, 10), "large": (2, 36, 16, 18)}
EDGES = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]  # k, stride


def make(shape: tuple[int, ...], stride: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns an input, full of ties so that the place of a maximum matters, and a gradient."""
    random = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    x = torch.randint(-2, 3, shape, generator=random).double().to(device)
    return x, torch.randn(n, c, h // stride, w // stride, generator=random, dtype=torch.float64).to(device)


def edge(x: Tensor, k: int, stride: int) -> Tensor:
    """A whole edge, its candidates being 3 times every stride-th pixel."""
    active, bypass = partial_channels_split(x, k, stride)
    return partial_channels(3 * active[:, :, ::stride, ::stride], bypass)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "stride"), EDGES)
def test_equals_reference(target, k, stride, shape, dtype, layout):
    x, grad = make(SHAPES[shape], stride, target.device)
    x, grad = lay_out(x.to(dtype), layout), lay_out(grad.to(dtype), layout)
    ours = gradients(lambda t: edge(t[0], k, stride), [x], grad)
    with use_backend("reference"):
        theirs = gradients(lambda t: edge(t[0], k, stride), [x], grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_reference_is_the_published_definition():
    """cat, then view(B, k, C/k, H, W).transpose(1, 2), and MaxPool2d(2, 2) on the bypass (arXiv:1907.05737)."""
    x, mixed = torch.randn(2, 8, 4, 4), torch.randn(2, 2, 2, 2)
    with use_backend("reference"):
        y = partial_channels(mixed, partial_channels_split(x, 4, 2)[1])
    together = torch.cat([mixed, torch.nn.MaxPool2d(2, 2)(x[:, 2:])], 1)
    assert torch.equal(y, torch.nn.ChannelShuffle(4)(together))


def test_values_and_gradients_are_those_worked_out_by_hand(target):
    x = torch.arange(4.0, device=target.device).view(1, 4, 1, 1).requires_grad_()
    mixed = torch.tensor([10.0, 11.0], device=target.device).view(1, 2, 1, 1).requires_grad_()
    active, bypass = partial_channels_split(x, 2)
    y = partial_channels(mixed, bypass)
    assert active.flatten().tolist() == [0, 1]
    assert y.flatten().tolist() == [10, 2, 11, 3]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0], device=target.device).view(1, 4, 1, 1)
    grad_x, grad_mixed = torch.autograd.grad(y, [x, mixed], grad)
    assert grad_x.flatten().tolist() == [0, 0, 2, 4]
    assert grad_mixed.flatten().tolist() == [1, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_takes_nan_and_the_first_of_equals(target, dtype):
    nan, inf = float("nan"), float("inf")
    windows = [[1, 1, 1, 1], [0, 2, 2, 1], [5, nan, 7, 6], [nan, 1, nan, 2], [-inf, -inf, -inf, -inf], [1, 2, inf, inf]]
    x = torch.tensor(windows, dtype=dtype, device=target.device).view(1, 6, 2, 2)
    x = torch.cat([torch.zeros_like(x[:, :2]), x], 1)

    def bypassed(t):
        _, bypass = partial_channels_split(t[0], 4, 2)
        return partial_channels(t[1], bypass)

    mixed, grad = x.new_zeros(1, 2, 1, 1), torch.arange(1, 9, device=target.device).to(dtype).view(1, 8, 1, 1)
    ours = gradients(bypassed, [x, mixed], grad)
    with use_backend("reference"):
        theirs = gradients(bypassed, [x, mixed], grad)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    assert torch.isnan(ours[0]).sum() == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_of_any_layout(target, layout):
    x, grad = make((2, 12, 4, 6), 1, target.device)
    mixed = lay_out(torch.randn(2, 3, 4, 6, dtype=torch.float64, device=target.device), layout)

    def merge(t):
        return partial_channels(t[1], partial_channels_split(t[0], 4)[1])

    ours = gradients(merge, [x, mixed], grad)
    with use_backend("reference"):
        theirs = gradients(merge, [x, mixed], grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_candidates_get_dense_channels_last_memory(target):
    for x in (torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 8).permute(0, 3, 1, 2)):
        active, bypass = partial_channels_split(x.to(target.device), 2)
        assert active.is_contiguous(memory_format=torch.channels_last)
        assert partial_channels(active, bypass).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("k", "stride"), EDGES)
def test_gradcheck(target, k, stride):
    random = torch.Generator().manual_seed(1)
    x = torch.randperm(2 * 4 * 4 * 2, generator=random).double().view(2, 4, 4, 2).to(target.device) / 7
    assert torch.autograd.gradcheck(lambda t: edge(t, k, stride), x.requires_grad_())


@pytest.mark.parametrize("shape", ["empty", "odd"])
@pytest.mark.parametrize(("k", "stride"), [(4, 1), (4, 2)])
def test_opcheck(target, k, stride, shape):
    x, grad = (lay_out(t, "channels_last") for t in make(SHAPES[shape], stride, target.device))
    active = target.ops.partial_channels_split(x, k)
    mixed = lay_out(active[:, :, ::stride, ::stride], "channels_last")
    opcheck(target.ops.partial_channels_split.default, (x, k))
    opcheck(target.ops.partial_channels.default, (mixed, x, k, stride))
    opcheck(target.ops._partial_channels_backward.default, (grad, k))
    for grads in [(active, grad), (active, None), (None, grad)]:
        opcheck(target.ops._partial_channels_split_backward.default, (*grads, x, list(x.shape), k, stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("used", ["active", "bypass", "mixed"])
def test_one_end_alone(target, used, stride):
    x, grad = make((2, 8, 4, 4), stride, target.device)
    x.requires_grad_()
    mixed = torch.randn(2, 2, 4 // stride, 4 // stride, dtype=torch.float64, device=target.device).requires_grad_()

    def run():
        active, bypass = partial_channels_split(x, 4, stride)
        if used == "active":
            return torch.autograd.grad(active.square().sum(), x)
        y = partial_channels(mixed, bypass)
        return torch.autograd.grad(y, x if used == "bypass" else mixed, grad)

    ours = run()
    with use_backend("reference"):
        theirs = run()
    assert torch.equal(ours[0], theirs[0])


def test_one_split_feeds_two_merges(target):
    x, grad = make((2, 8, 4, 4), 2, target.device)
    x.requires_grad_()

    def run():
        active, bypass = partial_channels_split(x, 4, 2)
        small = active[:, :, ::2, ::2]
        return torch.autograd.grad(partial_channels(small, bypass) + 2 * partial_channels(small, bypass), x, grad)[0]

    ours = run()
    with use_backend("reference"):
        theirs = run()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_of_the_input_is_written_once(target, stride):
    """One kernel a function is launched; no concatenation, transposition, pooling, copy or addition is dispatched."""
    x, grad = (lay_out(t, "channels_last") for t in make((2, 8, 4, 6), stride, target.device))
    x.requires_grad_()
    mixed = lay_out(grad[:, :2], "channels_last").requires_grad_()
    target.library.reset_counters()
    with Record() as record:
        active, bypass = partial_channels_split(x, 4, stride)
        y = partial_channels(mixed, bypass)
        torch.autograd.grad([y, active], [x, mixed], [grad, active.detach()])
    assert {name: n for name, (n, _) in target.library.counters().items()} == {
        "partial_channels_split": 1,
        "partial_channels": 1,
        "partial_channels_backward": 1,
        "partial_channels_split_backward": 1,
    }
    raw = {"partial_channels_split", "partial_channels"}
    raw |= {"_partial_channels_backward", "_partial_channels_split_backward"}
    assert raw <= set(record.names) <= raw | {"detach", "new_empty", "expand", "view", "alias"}


@pytest.mark.parametrize(("stride", "expected"), [(1, 0), (2, 2 * 8 * 4 * 6)])
def test_saves_the_input_only_for_the_places_of_maxima(target, stride, expected):
    x, _ = make((2, 8, 4, 6), stride, target.device)
    mixed = x.new_zeros(2, 2, 4 // stride, 6 // stride).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        partial_channels(mixed, partial_channels_split(lay_out(x, "channels_last").requires_grad_(), 4, stride)[1])
    assert sum(saved) == expected


def test_bytes_are_the_hand_count(target):
    x, _ = make((2, 8, 4, 6), 2, target.device)
    target.library.reset_counters()
    active, bypass = partial_channels_split(x, 4, 2)
    partial_channels(active[:, :, ::2, ::2], bypass)
    counters = target.library.counters()
    assert counters["partial_channels_split"] == (1, 8 * 48 * (2 + 2))  # 2 of 8 channels, read and written
    assert counters["partial_channels"] == (1, 8 * (12 * (8 + 2) + 48 * 6))


def test_graphs_and_checkpoints(target):
    x, grad = make((2, 8, 4, 4), 2, target.device)
    x.requires_grad_()
    y, other = edge(x, 4, 2), edge(2 * x, 4, 2)
    (first,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, grad)
    torch.autograd.grad(other, x, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        (hooked,) = torch.autograd.grad(edge(x, 4, 2), x, grad)
    again = [
        torch.autograd.grad(checkpoint(lambda t: edge(t, 4, 2), x, use_reentrant=False), x, grad)[0],
    ]
    for result in (second, hooked, *again):
        assert torch.equal(first, result)
    checkpoint(lambda t: edge(t, 4, 2), x, use_reentrant=True).backward(grad)
    assert torch.equal(first, x.grad)


def test_same_bits_with_any_order_of_threads(target, monkeypatch):
    x, grad = make((3, 36, 16, 18), 2, target.device)
    first = gradients(lambda t: edge(t[0], 4, 2), [x], grad)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            monkeypatch.setenv("FASTNAS_EMULATOR_SEED", str(n))
            again = gradients(lambda t: edge(t[0], 4, 2), [x], grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_differentiable_once_says_what_to_do(target):
    x, _ = make((1, 4, 2, 2), 1, target.device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(edge(x, 2, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(grad.sum(), x)
    with fastnas.twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda t: edge(t, 2, 1), x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does it
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(target, dynamic):
    x, grad = make((2, 8, 4, 4), 2, target.device)
    function = torch.compile(lambda t: edge(t[0], 4, 2), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    ours, theirs = gradients(function, [x], grad), gradients(lambda t: edge(t[0], 4, 2), [x], grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("x", "k", "stride", "kind", "message"),
    [
        (torch.ones(1, 6, 2, 2), 4, 1, ValueError, "k=4 does not divide the 6 channels"),
        (torch.ones(1, 6, 2, 2), 0, 1, ValueError, "k=0 does not divide"),
        (torch.ones(1, 6, 2, 2), -2, 1, ValueError, "k=-2 does not divide"),
        (torch.ones(1, 6, 2, 2), 1.5, 1, ValueError, "k=1.5 does not divide"),
        (torch.ones(1, 4, 2, 2), 2, 3, ValueError, "stride=3: expected 1 or 2"),
        (torch.ones(1, 4, 5, 4), 2, 2, ValueError, "x is 5x4.*must be even"),
        (torch.ones(1, 4, 4, 3), 2, 2, ValueError, "x is 4x3.*must be even"),
        (torch.ones(4, 2, 2), 2, 1, ValueError, r"x has shape \(4, 2, 2\)"),
        (torch.ones(1, 4, 2, 2, dtype=torch.int64), 2, 1, TypeError, "x is torch.int64"),
        ([1.0], 2, 1, TypeError, "x is list"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_arguments_of_the_split_are_named(backend, x, k, stride, kind, message):
    with pytest.raises(kind, match=message):
        partial_channels_split(x, k, stride, backend=backend)


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        (torch.ones(1, 4, 4, 4), r"mixed has shape \(1, 4, 4, 4\): expected \(1, 2, 2, 2\)"),
        (torch.ones(1, 2, 2, 2, dtype=torch.float64), "mixed has dtype torch.float64: expected torch.float32"),
        (torch.ones(1, 2, 2, 2, device="meta"), "mixed has device meta: expected cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_mixed_is_named(backend, mixed, message):
    _, bypass = partial_channels_split(torch.ones(1, 4, 4, 4), 2, 2, backend=backend)
    with pytest.raises(ValueError, match=message):
        partial_channels(mixed, bypass)


def test_raw_ops_check_their_arguments(target):
    ops = target.ops
    x = lay_out(torch.ones(1, 4, 4, 4, device=target.device), "channels_last")
    for call, message in [
        (lambda: ops.partial_channels_split(x, 3), "k = 3 must divide the 4 channels"),
        (lambda: ops.partial_channels_split(x.contiguous(), 2), "x must be channels_last"),
        (lambda: ops.partial_channels(x, x, 2, 1), "mixed must be channels_last of shape"),
        (lambda: ops.partial_channels(x[:, :2].double(), x, 2, 1), "mixed"),
        (lambda: ops._partial_channels_split_backward(None, None, x, [1, 4, 4, 4], 2, 1), "both missing"),
        (lambda: ops._partial_channels_split_backward(None, x, None, [1, 4, 8, 8], 2, 2), "stride 2 needs x"),
        (lambda: ops._partial_channels_backward(x.contiguous(), 2), "grad must be channels_last"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_bypass_is_a_plain_record():
    x = torch.ones(1, 4, 2, 2)
    _, bypass = partial_channels_split(x, 2, backend="reference")
    assert bypass == Bypass(x, 2, 1)
