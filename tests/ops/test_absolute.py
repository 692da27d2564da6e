"""Passes over lists of tensors on every backend: signs taken and given back bit for bit, products by group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from op_checks import DTYPES, Record
from torch import Tensor
from torch.library import opcheck

from fastnas.ops import absolute_, group_products, restore_

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
PIECE = 8192  # csrc/absolute.h: elements
# Whole words and parts of one, whole pieces and parts of one, nothing, one number.
SHAPES = [(7, 5), (0,), (), (4, 8), (3, 4, 5, 6), (1, 2, 0), (2 * PIECE,), (PIECE + 1,), (33,)]


def make(device: str = "cpu", seed: int = 0, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Tensor]:
    """Returns tensors of random bits: infinities, NaN of every payload, denormal numbers and -0.0 among them."""
    random = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in SHAPES:
        for dtype in dtypes:
            bytes_ = torch.randint(256, (*shape, dtype.itemsize), generator=random, dtype=torch.uint8)
            t = bytes_.view(dtype).view(shape)
            if t.dim():
                special = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf")])
                t.view(-1)[: min(6, t.numel())] = special[: min(6, t.numel())].to(dtype)
            tensors.append(t.to(device))
    return tensors


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.dtype])


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and torch.equal(bits(a), bits(b))


def lay_out(t: Tensor, layout: str) -> Tensor:
    """Returns a tensor with t's elements that is dense in another order, or is not dense."""
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and t.dim() > 0:
        return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2].copy_(t)
    return t


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_matches_reference_and_comes_back(target, layout):
    ours, theirs, before = ([lay_out(t, layout) for t in make(target.device)] for _ in range(3))
    signs, expected = absolute_(ours), absolute_(theirs, backend="reference")
    assert torch.equal(signs, expected)
    assert signs.numel() == sum((t.numel() + 31) // 32 for t in before)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    for t, b in zip(ours, before, strict=True):
        assert torch.equal(bits(t), bits(b) & torch.iinfo(BITS[t.dtype]).max)
    assert restore_(ours, signs) is None
    restore_(theirs, signs, backend="reference")
    assert all(same(a, b) for a, b in zip(ours, before, strict=True))
    assert all(same(a, b) for a, b in zip(theirs, before, strict=True))


def test_matches_reference_on_fresh_inputs(target):
    seed = int(torch.seed() % 2**31)
    ours, theirs = make(target.device, seed), make(target.device, seed)
    signs = absolute_(ours)
    assert torch.equal(signs, absolute_(theirs, backend="reference"))
    restore_(ours, signs)
    assert all(same(a, b) for a, b in zip(ours, make(target.device, seed), strict=True))


def test_signs_are_bits_in_order(target):
    t = torch.ones(40, device=target.device)
    t[[0, 5, 31, 32, 39]] = torch.tensor([-1.0, -0.0, -float("inf"), -2.0, -3.0], device=target.device)
    signs = absolute_([torch.zeros(0, device=target.device), t, -torch.ones((), device=target.device)])
    assert signs.tolist() == [(1 + (1 << 5) + (1 << 31)) - (1 << 32), 1 + (1 << 7), 1]
    assert torch.all(t >= 0)
    assert not torch.signbit(t).any()


def test_restoring_writes_signs_alone(target):
    """Whatever the values became meanwhile, and whatever their sign."""
    t = torch.tensor([-1.0, 2.0, -3.0, 4.0], device=target.device)
    signs = absolute_([t])
    t.copy_(torch.tensor([10.0, -20.0, -30.0, 0.0]))
    restore_([t], signs)
    assert t.tolist() == [-10, 20, -30, 0]


def test_parameters_and_their_neighbours(target):
    """Parameters that require gradients, views of one storage side by side, and the memory around them."""
    room = torch.randn(100, device=target.device)
    before = room.clone()
    first, second = torch.nn.Parameter(room[10:40]), torch.nn.Parameter(room[40:77])
    signs = absolute_([second, first])
    assert torch.equal(room[10:77], before[10:77].abs())
    assert torch.equal(room[:10], before[:10])
    assert torch.equal(room[77:], before[77:])
    restore_([second, first], signs)
    assert torch.equal(room, before)
    assert first.requires_grad
    assert not signs.requires_grad


def test_what_lies_between_the_elements_of_a_slice_stays(target):
    room = -torch.ones(6, 8, device=target.device)
    signs = absolute_([room[1:5, ::3]])
    expected = -torch.ones(6, 8, device=target.device)
    expected[1:5, ::3] = 1
    assert torch.equal(room, expected)
    restore_([room[1:5, ::3]], signs)
    assert torch.equal(room, -torch.ones(6, 8, device=target.device))


def test_graphs_notice_the_change(target):
    w = torch.randn(5, device=target.device, requires_grad=True)
    for change in (lambda: absolute_([w]), lambda: restore_([w], torch.zeros(1, dtype=torch.int32, device=w.device))):
        y = (w * w).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_empty_lists(target):
    signs = absolute_([])
    assert signs.numel() == 0
    restore_([], signs)
    assert group_products([], [], []).shape == (0,)
    empty = torch.zeros(0, 3, device=target.device)
    restore_([empty], absolute_([empty]))
    assert group_products([empty], [empty], [1]).tolist() == [0, 0]


def test_inference_tensors(target):
    with torch.inference_mode():
        t = -torch.ones(3, device=target.device)
        restore_([t], absolute_([t]))
        assert t.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_group_products_matches_reference(target, layout, absolute):
    random = torch.Generator().manual_seed(0)
    thetas, grads, groups = [], [], []
    for i, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            thetas.append(lay_out(torch.randn(shape, generator=random).to(target.device, dtype), layout))
            grad = torch.randn(shape, generator=random).to(target.device, dtype)
            grads.append([grad, lay_out(grad, layout), None][len(grads) % 3])
            groups.append([4, 0, 2, 6][i % 4])
    ours = group_products(thetas, grads, groups, absolute)
    theirs = group_products(thetas, grads, groups, absolute, backend="reference")
    exact = torch.zeros(7, dtype=torch.float64)
    for theta, grad, group in zip(thetas, grads, groups, strict=True):
        if grad is not None:
            product = theta.double().cpu() * grad.double().cpu()
            exact[group] += (product.abs() if absolute else product).sum()
    for sums in (ours, theirs):
        assert sums.dtype == torch.float64
        assert sums.device.type == target.device
        torch.testing.assert_close(sums.cpu(), exact, rtol=1e-12, atol=1e-11)
    assert ours[[1, 3, 5]].tolist() == [0, 0, 0]


def test_products_neither_overflow_nor_round(target):
    theta = torch.tensor([1e38, 1 + 2**-23, 1e-30], device=target.device)
    grad = torch.tensor([1e38, 1 + 2**-23, 1e-30], device=target.device)
    for i in range(3):
        expected = float(theta[i].double() * grad[i].double())
        assert group_products([theta[i]], [grad[i]], [0]).item() == expected
    assert group_products([theta, -theta], [grad, grad], [0, 0]).item() == 0
    assert group_products([theta, -theta], [grad, grad], [0, 0], True).item() > 1e76


def test_nan_and_infinity_reach_their_group_alone(target):
    ones = torch.ones(40, device=target.device)
    odd = ones.clone()
    odd[33] = float("nan")
    even = ones.clone()
    even[1] = -float("inf")
    sums = group_products([odd, ones, even], [ones, ones, ones], [0, 1, 2])
    assert torch.isnan(sums[0])
    assert sums[1:].tolist() == [40, -float("inf")]
    assert group_products([even], [ones], [0], True).item() == float("inf")
    assert torch.isnan(group_products([odd], [ones], [0], True)).all()


def test_products_have_no_graph(target):
    theta = torch.ones(3, device=target.device, requires_grad=True)
    assert not group_products([theta], [torch.ones(3, device=target.device)], [0]).requires_grad


def test_without_gradients_sums_are_zero(target):
    theta = torch.ones(3, device=target.device)
    assert group_products([theta, theta], [None, None], [2, 0]).tolist() == [0, 0, 0]


def test_same_bits_with_any_order_of_threads(target, monkeypatch):
    tensors = [torch.randn(shape, device=target.device) for shape in SHAPES * 3]
    groups = [i % 4 for i in range(len(tensors))]
    first = group_products(tensors, tensors, groups), absolute_([t.clone() for t in tensors])
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            monkeypatch.setenv("FASTNAS_EMULATOR_SEED", str(n))  # another order of threads and blocks
            assert torch.equal(group_products(tensors, tensors, groups), first[0])
            again = [t.clone() for t in tensors]
            signs = absolute_(again)
            assert torch.equal(signs, first[1])
            restore_(again, signs)
            assert all(torch.equal(a, b) for a, b in zip(again, tensors, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_launches_and_no_arithmetic_elsewhere(target):
    thetas = [
        torch.randn(n, device=target.device, dtype=d) for n, d in [(5, torch.float32), (PIECE + 7, torch.float64)]
    ]
    moved, words = 2 * (4 * 5 + 8 * (PIECE + 7)), 1 + PIECE // 32 + 1
    target.library.reset_counters()
    with Record() as record:
        restore_(thetas, absolute_(thetas))
        group_products(thetas, thetas, [1, 0])
    expected = {"absolute": (1, moved + 4 * words), "restore": (1, moved + 4 * words)}
    if target.ops is torch.ops.fastnas_emulated or target.device == "cuda":
        expected |= {"group_products": (1, moved + 8 * 3), "group_products_finish": (1, 8 * (3 + 2))}
    else:
        expected["group_products"] = (1, moved + 8 * 2)
    assert target.library.counters() == expected
    assert record.names == ["absolute_", "restore_", "group_products"]


def test_opcheck(target):
    tensors = [torch.randn(5, 7, device=target.device), torch.randn(40, device=target.device)]
    signs = torch.zeros(4, dtype=torch.int32, device=target.device)
    opcheck(target.ops.absolute_.default, (tensors,))
    opcheck(target.ops.restore_.default, (tensors, signs))
    opcheck(target.ops.group_products.default, (tensors, [t.clone() for t in tensors], [1, 0], 2, True))


T = torch.ones(4)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        (T, TypeError, "tensors is a tensor: pass a list of tensors"),
        ([T, 1.0], TypeError, r"tensors\[1\] is a float: expected a tensor"),
        ([T, T.long()], TypeError, r"tensors\[1\] has dtype torch.int64: expected float16"),
        ([T.to_sparse()], TypeError, r"tensors\[0\] has layout torch.sparse_coo"),
        ([T, torch.ones(2, device="meta")], ValueError, r"tensors\[1\] is on meta but tensors\[0\] is on cpu"),
        ([T, torch.ones(2), T], ValueError, r"tensors\[0\] and tensors\[2\] share memory: list it once"),
        ([T[:3], T[2:]], ValueError, r"tensors\[0\] and tensors\[1\] share memory"),
        ([T, T.view(2, 2).t()], ValueError, r"tensors\[0\] and tensors\[1\] share memory"),
        ([torch.ones(1).expand(3)], ValueError, r"tensors\[0\] repeats its elements \(expanded\)"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_lists_are_named(backend, tensors, kind, message):
    with pytest.raises(kind, match=message):
        absolute_(tensors, backend=backend)
    with pytest.raises(kind, match=message):
        restore_(tensors, torch.zeros(2, dtype=torch.int32), backend=backend)
    assert torch.all(T == 1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_signs_are_named(backend):
    with pytest.raises(TypeError, match="signs must be the tensor that absolute_ returned"):
        restore_([T], torch.zeros(1), backend=backend)
    with pytest.raises(ValueError, match="signs has 2 words but these tensors have 1"):
        restore_([T], torch.zeros(2, dtype=torch.int32), backend=backend)
    with pytest.raises(ValueError, match=r"signs is on meta but tensors\[0\] is on cpu"):
        restore_([T], torch.zeros(1, dtype=torch.int32, device="meta"), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((T, [T], [0]), TypeError, "thetas is a tensor"),
        (([T], [T, T], [0]), ValueError, "thetas, grads and groups have 1, 2 and 1 entries"),
        (([T], [T], []), ValueError, "have 1, 1 and 0 entries"),
        (([T], [T], [-1]), ValueError, r"groups\[0\] is -1: expected a whole number from 0 on"),
        (([T], [T], [0.5]), ValueError, r"groups\[0\] is 0.5"),
        (([T], [1.0], [0]), TypeError, r"grads\[0\] is a float: expected a tensor or None"),
        (([T, T], [None, T[:3]], [0, 0]), ValueError, r"grads\[1\] has shape \(3,\) but thetas\[1\] has \(4,\)"),
        (([T], [T.double()], [0]), ValueError, r"grads\[0\] has dtype torch.float64 but thetas\[0\] has torch.float32"),
        (([T], [T.to("meta")], [0]), ValueError, r"grads\[0\] has device meta but thetas\[0\] has cpu"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_products_are_named(backend, arguments, kind, message):
    with pytest.raises(kind, match=message):
        group_products(*arguments, backend=backend)


def test_raw_ops_check_their_arguments(target):
    ops = target.ops
    t = torch.ones(4, 6, device=target.device)
    signs = torch.zeros(1, dtype=torch.int32, device=target.device)
    for call, message in [
        (lambda: ops.absolute_([t.int()]), "must be float16, bfloat16, float32 or float64"),
        (lambda: ops.absolute_([t[:, ::2]]), "tensors must be dense in memory"),
        (lambda: ops.absolute_([t[:1].expand(4, 6)]), "tensors must be dense in memory"),
        (lambda: ops.restore_([], signs), "tensors must not be empty"),
        (lambda: ops.restore_([t], signs.float()), "signs must be what absolute_ returned"),
        (lambda: ops.restore_([t, t.clone()], signs), "signs must be what absolute_ returned"),
        (lambda: ops.group_products([t], [], [0], 1, False), "thetas, grads and groups must have the same length"),
        (lambda: ops.group_products([t], [t], [1], 1, False), "groups must be of 0 to 0, got 1"),
        (lambda: ops.group_products([t], [t.t()], [0], 1, False), "grads must have the thetas' shapes, strides"),
        (lambda: ops.group_products([t], [t.double()], [0], 1, False), "grads must have the thetas' shapes, strides"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
