"""abs_cell on every backend against every candidate by itself, in plain PyTorch and float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from op_checks import DTYPES, LAYOUTS, Record, assert_as_precise, gradients, lay_out
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastnas
from fastnas import use_backend
from fastnas.nn.nasbench201 import NASBENCH201_PRIMITIVES, NASBench201Cell
from fastnas.ops import AbsOp, abs_cell

NASBENCH201: tuple[AbsOp, ...] = ("none", "skip", "conv_1x1", "conv_3x3", "avg_pool_3x3")
WIDTHS = {"conv_1x1": 1, "conv_3x3": 3}

# (N, C, H, W) and nodes. The large one has several bands, chunks and chains, and channels that are no whole vector.
SHAPES = {
    "empty": ((0, 4, 4, 4), 3),
    "one": ((1, 1, 1, 1), 2),
    "odd": ((3, 5, 7, 9), 4),
    "large": ((2, 36, 9, 14), 4),
}
OPS: dict[str, tuple[AbsOp, ...]] = {
    "nasbench201": NASBENCH201,
    "pool": ("avg_pool_3x3",),
    "convolutions": ("conv_3x3", "conv_1x1", "conv_3x3"),
    "no_convolution": ("skip", "none", "avg_pool_3x3", "skip", "avg_pool_3x3"),
    "none": ("none",),
}


def make(
    shape: tuple[int, ...], nodes: int, ops: Sequence[AbsOp] = NASBENCH201, device: str = "cpu", seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Returns x, the weights and the kernels, and a gradient; x and the gradient are not negative."""
    random = torch.Generator().manual_seed(seed)
    edges, c = nodes * (nodes - 1) // 2, shape[1]
    inputs = [torch.rand(shape, generator=random, dtype=torch.float64)]
    inputs.append(torch.randn(edges, len(ops), generator=random, dtype=torch.float64))
    widths = [WIDTHS[op] for op in ops if op in WIDTHS] * edges
    inputs += [torch.randn(c, c, k, k, generator=random, dtype=torch.float64) / c for k in widths]
    grad = torch.rand(shape, generator=random, dtype=torch.float64)
    return [t.to(device) for t in inputs], grad.to(device)


def call(ops: Sequence[AbsOp] = NASBENCH201):
    return lambda tensors: abs_cell(tensors[0], tensors[1], ops, tensors[2:])


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    """Checks each element by itself: where all terms are positive, nothing cancels."""
    assert len(ours) == len(exact)
    for i, (x, y) in enumerate(zip(ours, exact, strict=True)):
        assert x.shape == y.shape, i
        assert torch.all((x.double() - y).abs() <= tolerance * y.abs()), i


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(target, shape, dtype, layout):
    inputs, grad = make(*SHAPES[shape], device=target.device)
    inputs[0] = lay_out(inputs[0].to(dtype), layout)
    inputs[2:] = [w.to(dtype) for w in inputs[2:]]
    grad = lay_out(grad.to(dtype), layout)
    ours = gradients(call(), inputs, grad)
    with use_backend("reference"):
        theirs = gradients(call(), inputs, grad)
        exact = gradients(call(), [t.double() for t in inputs], grad.double())
    if dtype in (torch.float32, torch.float64):
        # An expanded x repeats one rounding error in every term: 2.2e-6 in the chains of the CUDA kernels.
        tight = 2e-6 if (target.backend, target.device) == ("native", "cpu") else 4e-6
        assert_close(ours, exact, tight if dtype == torch.float32 else 1e-13)
    else:
        assert_as_precise(ours, theirs, exact)


@pytest.mark.parametrize("name", OPS)
def test_matches_reference_with_any_candidates(target, name):
    ops = OPS[name]
    inputs, grad = make((2, 5, 6, 5), 4, ops, target.device)
    ours = gradients(call(ops), [t.float() for t in inputs], grad)
    with use_backend("reference"):
        exact = gradients(call(ops), [t.float().double() for t in inputs], grad.float().double())
    assert_close(ours, exact, 2e-6)
    assert name != "none" or not any(t.any() for t in ours)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 7), (3, 3), (2, 9), (5, 4), (40, 1)], ids=str)
def test_matches_reference_where_all_is_border(target, size):
    inputs, grad = make((2, 3, *size), 3, device=target.device)
    ours = gradients(call(), inputs, grad)
    with use_backend("reference"):
        exact = gradients(call(), inputs, grad)
    assert_close(ours, exact, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c", [3, 8, 16, 20, 48, 68])
def test_matches_reference_at_every_width(target, c, dtype):
    """Whole vectors, nodes that share a vector, and more channels than a chain."""
    inputs, grad = make((1, c, 5, 12), 4, device=target.device)
    inputs, grad = [t.to(dtype) for t in inputs], grad.to(dtype)
    ours = gradients(call(), inputs, grad)
    with use_backend("reference"):
        exact = gradients(call(), [t.double() for t in inputs], grad.double())
    assert_close(ours, exact, 2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_matches_reference_with_any_number_of_nodes(target, nodes):
    inputs, grad = make((1, 3, 4, 5), nodes, device=target.device)
    with use_backend("reference"):
        exact = gradients(call(), inputs, grad)
    assert_close(gradients(call(), inputs, grad), exact, 1e-13)


def test_matches_reference_on_fresh_inputs(target):
    seed = int(torch.seed() % 2**31)
    inputs, grad = make((1, 6, 5, 6), 4, device=target.device, seed=seed)
    with use_backend("reference"):
        exact = gradients(call(), inputs, grad)
    assert_close(gradients(call(), inputs, grad), exact, 1e-13)


def test_inputs_of_either_sign(target):
    """The op is linear in x and in the gradient; only the weights are taken by their absolute values."""
    inputs, grad = make((2, 5, 6, 5), 4, device=target.device)
    inputs[0], grad = inputs[0] - 0.5, grad - 0.5
    ours = gradients(call(), inputs, grad)
    with use_backend("reference"):
        theirs = gradients(call(), inputs, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_reference_is_nasbench201s_cell_without_its_norms():
    """With positive weights, and each batch norm replaced by the identity."""
    cell = NASBench201Cell(3).double()
    for module in cell.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
            if isinstance(child, torch.nn.Conv2d):
                child.weight.data.abs_()
    assert NASBENCH201_PRIMITIVES == ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    x, weights = torch.rand(2, 3, 5, 6).double(), torch.rand(6, 5).double()
    ours = abs_cell(x, weights, NASBENCH201, list(cell.parameters()), backend="reference")
    torch.testing.assert_close(ours, cell(x, weights), rtol=1e-12, atol=0)


def test_values_and_gradients_are_those_worked_out_by_hand(target):
    """One channel, two pixels: the pool is the mean of both, a 3x3 kernel meets its middle row alone."""

    def leaf(values: Sequence[float], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=target.device).view(shape).requires_grad_()

    def check(ours: Tensor, values: Sequence[float]) -> None:
        torch.testing.assert_close(ours.flatten().tolist(), [float(v) for v in values], rtol=1e-14, atol=0)

    x, weights = leaf([1, 2], 1, 1, 1, 2), leaf([7, -2, 0, 3, -4], 1, 5)
    narrow, wide = leaf([-5], 1, 1, 1, 1), leaf([0, -1, -2, -3, -4, -5, -6, -7, -8], 1, 1, 3, 3)
    y = abs_cell(x, weights, NASBENCH201, [narrow, wide])
    check(y, [2 * 1 + 3 * (4 * 1 + 5 * 2) + 4 * 1.5, 2 * 2 + 3 * (3 * 1 + 4 * 2) + 4 * 1.5])
    grads = torch.autograd.grad(y, [x, weights, narrow, wide], leaf([1, 10], 1, 1, 1, 2).detach())
    check(grads[0], [2 + 3 * (4 + 30) + 4 * 5.5, 20 + 3 * (5 + 40) + 4 * 5.5])
    check(grads[1], [0, -21, 5 * 21, 14 + 110, -1.5 * 11])  # +1 is the sign of the zero
    check(grads[2], [0])
    check(grads[3], [0, 0, 0, -3 * 10, -3 * 21, -3 * 2, 0, 0, 0])


def test_signs(target):
    """A zero weight has the derivative of a positive one; a zero in a kernel has none, as torch.abs."""
    inputs, grad = make((1, 3, 4, 4), 2, device=target.device)
    inputs[1][0] = torch.tensor([0.0, -0.0, 0.0, -1.0, -0.0])
    inputs[3][0, 0] = torch.tensor([[0.0, -0.0, 1.0], [-1.0, 0.0, 1.0], [1.0, 1.0, -0.0]])
    _, grad_x, grad_weights, *grad_kernels = gradients(call(), inputs, grad)
    assert grad_weights[0, 0] == 0
    assert torch.all(grad_weights[0, [1, 2, 4]] > 0)
    assert grad_weights[0, 3] < 0
    assert not grad_kernels[0].any()
    assert torch.equal(torch.sign(grad_kernels[1]), torch.sign(inputs[3]))
    assert torch.all(grad_x > 0)


def test_parameters_are_not_written(target):
    inputs, grad = make((1, 5, 6, 5), 4, device=target.device)
    before = [t.clone() for t in inputs]
    gradients(call(), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_kernels_products_are_the_weights(target):
    """Σ θ ∂R/∂θ over an op's parameters is α ∂R/∂α of the op."""
    inputs, grad = make((2, 5, 6, 5), 3, device=target.device)
    _, _, grad_weights, *grad_kernels = gradients(call(), inputs, grad)
    products = torch.stack([(w * g).sum() for w, g in zip(inputs[2:], grad_kernels, strict=True)]).view(-1, 2)
    torch.testing.assert_close(products, (inputs[1] * grad_weights)[:, 2:4], rtol=1e-12, atol=0)


def test_a_network_of_ones_is_exact(target):
    """Fifteen cells on an input of ones in float32, rescaled on the way, against float64."""
    torch.manual_seed(0)
    weights = torch.randn(6, 5, device=target.device) * 1e-3
    cells = [make((1, 4, 6, 6), 4, device=target.device, seed=seed)[0][2:] for seed in range(15)]

    def scores(dtype: torch.dtype) -> Tensor:
        alphas = weights.to(dtype).requires_grad_()
        y = torch.ones(1, 4, 6, 6, dtype=dtype, device=target.device)
        for kernels in cells:
            y = abs_cell(y, alphas, NASBENCH201, [w.to(dtype) for w in kernels])
            y = y / y.detach().amax()
        return alphas.detach() * torch.autograd.grad(y.sum(), alphas)[0]

    ours = scores(torch.float32)
    with use_backend("reference"):
        exact = scores(torch.float64)
    assert_close([ours], [exact], 5e-6)


def test_infinity_and_nan_go_on(target):
    for value in (float("inf"), float("nan")):
        inputs, _ = make((1, 2, 5, 5), 2, ("skip", "conv_3x3"), target.device)
        inputs[0][0, 0, 2, 2] = value
        y = call(("skip", "conv_3x3"))(inputs)
        theirs = abs_cell(inputs[0], inputs[1], ("skip", "conv_3x3"), inputs[2:], backend="reference")
        reached = ~torch.isfinite(theirs)
        assert reached.any()
        assert torch.all(~torch.isfinite(y)[reached])


def test_gradcheck(target):
    inputs, _ = make((2, 3, 3, 4), 3, device=target.device)
    assert min(t.abs().min() for t in inputs[1:]) > 1e-4  # away from the kink
    assert torch.autograd.gradcheck(lambda *t: call()(t), [t.requires_grad_() for t in inputs])


def test_opcheck(target):
    (x, weights, *kernels), grad = make((3, 5, 6, 10), 3, device=target.device)
    x, grad = (lay_out(t, "channels_last") for t in (x, grad))
    codes = [0, 1, 2, 3, 4]
    opcheck(target.ops.abs_cell.default, (x, weights, codes, kernels))
    _, states = target.ops.abs_cell(x, weights, codes, kernels)
    for need in [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]:
        opcheck(target.ops._abs_cell_backward.default, (grad, states, weights, codes, kernels, *need))


@pytest.mark.parametrize("wanted", ["x", "weights", "kernels", "one kernel"])
@pytest.mark.parametrize("nodes", [2, 4])
def test_each_gradient_alone(target, wanted, nodes):
    inputs, grad = make((2, 5, 4, 6), nodes, device=target.device)
    chosen = {"x": inputs[:1], "weights": inputs[1:2], "kernels": inputs[2:], "one kernel": inputs[3:4]}[wanted]
    leaves = [t.requires_grad_() for t in chosen]
    ours = torch.autograd.grad(call()(inputs), leaves, grad)
    with use_backend("reference"):
        theirs = torch.autograd.grad(call()(inputs), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_same_bits_with_any_order_of_threads(target, monkeypatch):
    inputs, grad = make((2, 20, 16, 16), 4, device=target.device)
    inputs, grad = [t.float() for t in inputs], grad.float()
    first = gradients(call(), inputs, grad)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            monkeypatch.setenv("FASTNAS_EMULATOR_SEED", str(n))  # another order of threads and blocks
            again = gradients(call(), inputs, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_kernels_in_any_layout(target):
    inputs, grad = make((1, 6, 4, 4), 2, device=target.device)
    laid_out = [*inputs[:2], *(w.contiguous(memory_format=torch.channels_last) for w in inputs[2:])]
    first, second = gradients(call(), inputs, grad), gradients(call(), laid_out, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_graphs_and_checkpoints(target):
    inputs, grad = make((2, 5, 4, 6), 3, device=target.device)
    leaves = [t.requires_grad_() for t in inputs]
    y = call()(leaves)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    other = call()([2 * t for t in leaves])  # a second graph, alive at the same time
    second = torch.autograd.grad(y, leaves, grad)
    torch.autograd.grad(other, leaves, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        hooked = torch.autograd.grad(call()(leaves), leaves, grad)
    again = torch.autograd.grad(checkpoint(lambda *t: call()(t), *leaves, use_reentrant=False), leaves, grad)
    for results in (second, hooked, again):
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_a_kernel_changed_before_the_backward_is_an_error(target):
    inputs, grad = make((1, 5, 4, 6), 2, device=target.device)
    y = call()([inputs[0], inputs[1].requires_grad_(), *inputs[2:]])
    inputs[2].abs_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, inputs[1], grad)


def test_launches_and_no_arithmetic_elsewhere(target):
    nodes, edges, c, pixels = 4, 6, 5, 48
    inputs, grad = make((2, c, 4, 6), nodes, device=target.device)
    leaves = [lay_out(t, "channels_last") if i == 0 else t for i, t in enumerate(inputs)]
    leaves, grad = [t.requires_grad_() for t in leaves], lay_out(grad, "channels_last")
    target.library.reset_counters()
    with Record() as record:
        torch.autograd.grad(call()(leaves), leaves, grad)
    counters = target.library.counters()
    one_map, kernels, merged = pixels * c, edges * 10 * c * c, edges * 9 * c * c
    # Node 0 writes 3 nodes, node 1 adds to 2, node 2 to 1; the backward is its mirror image.
    fans = (1 + 3) + (1 + 2 * 2) + (1 + 2)
    expected = {
        "abs_cell_merge": (2, 2 * (kernels + merged)),
        "abs_cell_load": (2, 2 * 2 * one_map),
        "abs_cell_fan": (6, 2 * (fans * one_map + merged)),
        "abs_cell_gradient": (1, 2 * 3 * one_map + merged),
    }
    if target.ops is torch.ops.fastnas_emulated or target.device == "cuda":
        expected |= {  # all pixels are one chunk
            "abs_cell_sum": (1, 2 * merged),
            "abs_cell_finish": (1, merged + kernels),
            "abs_cell_kernels": (1, merged + 2 * kernels),
        }
    else:
        expected["abs_cell_finish"] = (1, merged + 2 * kernels)
    assert counters == {name: (n, 8 * elements) for name, (n, elements) in expected.items()}
    assert set(record.names) <= {"abs_cell", "_abs_cell_backward", "detach"}


def test_differentiable_once_says_what_to_do(target):
    inputs, _ = make((1, 2, 3, 3), 2, device=target.device)
    leaves = [t.requires_grad_() for t in inputs]
    grads = torch.autograd.grad(call()(leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(grads[0].sum(), leaves[1])
    with fastnas.twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda *t: call()(t), leaves)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does it
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(target, dynamic):
    inputs, grad = make((2, 5, 4, 6), 3, device=target.device)
    function = torch.compile(call(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    ours, theirs = gradients(function, inputs, grad), gradients(call(), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_debug_finds_nan(target):
    inputs, _ = make((1, 2, 3, 3), 2, device=target.device)
    inputs[1][0, 0] = float("nan")
    with fastnas.debug(), pytest.raises(ValueError, match="weights holds NaN"):
        call()(inputs)


def arguments(**changes):
    x, weights, *kernels = make((1, 4, 2, 2), 2)[0]
    return {"x": x, "weights": weights, "ops": NASBENCH201, "kernels": kernels, **changes}


K1, K3 = torch.ones(4, 4, 1, 1).double(), torch.ones(4, 4, 3, 3).double()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x\[0\] is a list"),
        ({"x": torch.ones(1, 4, 2, 2, dtype=torch.int64)}, TypeError, r"x\[0\] has dtype torch.int64"),
        ({"x": torch.ones(4, 2, 2)}, ValueError, "x has 3 dimensions"),
        ({"ops": "skip"}, ValueError, "ops is 'skip': expected a sequence of 1 to 16"),
        ({"ops": []}, ValueError, r"ops is \[\]"),
        ({"ops": ["skip"] * 17}, ValueError, "expected a sequence of 1 to 16"),
        ({"ops": ["skip", "conv_5x5"]}, ValueError, r"ops\[1\] is 'conv_5x5': expected one of none, skip"),
        ({"weights": None}, TypeError, r"weights is a NoneType: expected a tensor of shape \(edges, 5\)"),
        ({"weights": torch.ones(1, 5, dtype=torch.int64)}, TypeError, "weights has dtype torch.int64"),
        ({"weights": torch.ones(1, 4)}, ValueError, r"weights has shape \(1, 4\): expected \(edges, 5\)"),
        ({"weights": torch.ones(2, 5)}, ValueError, r"n \(n - 1\) / 2 edges for n nodes: 1, 3, 6, 10, 15, 21, 28"),
        ({"weights": torch.ones(1, 5, device="meta")}, ValueError, "weights is on meta but x is on cpu"),
        ({"kernels": [K1]}, ValueError, "kernels has 1 tensors: expected 2, one for each convolution of each edge"),
        ({"kernels": torch.ones(2, 4)}, ValueError, "kernels has 2 tensors"),
        ({"kernels": [K3, K1]}, ValueError, r"kernels\[0\] has shape \(4, 4, 3, 3\): expected \(4, 4, 1, 1\)"),
        ({"kernels": [K1, None]}, TypeError, r"kernels\[1\] is a NoneType"),
        ({"kernels": [K1, K3.float()]}, ValueError, r"kernels\[1\] has dtype torch.float32 but x has torch.float64"),
        ({"kernels": [K1, K3.to("meta")]}, ValueError, r"kernels\[1\] is on meta but x is on cpu"),
    ],
    ids=lambda v: None if isinstance(v, (dict, type)) else v[:24],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_arguments_are_named(backend, changes, kind, message):
    with pytest.raises(kind, match=message):
        abs_cell(**arguments(**changes), backend=backend)


def test_raw_ops_check_their_arguments(target):
    ops, codes = target.ops, [0, 1, 2, 3, 4]
    (x, weights, *kernels), _ = make((2, 4, 4, 6), 2, device=target.device)
    x = lay_out(x, "channels_last")
    _, states = ops.abs_cell(x, weights, codes, kernels)
    for call_, message in [
        (
            lambda: ops.abs_cell(x.contiguous(), weights, codes, kernels),
            "x must be 4-d, not empty and in channels_last",
        ),
        (lambda: ops.abs_cell(x[:0], weights, codes, kernels), "x must be 4-d, not empty"),
        (lambda: ops.abs_cell(x, weights, [], kernels), "expected 1 to 16 candidates, got 0"),
        (lambda: ops.abs_cell(x, weights, [0, 1, 2, 3, 5], kernels), "no candidate has the code 5"),
        (lambda: ops.abs_cell(x, weights.float(), codes, kernels), "weights must be contiguous, of shape"),
        (lambda: ops.abs_cell(x, weights[0], codes, kernels), "weights must be contiguous, of shape"),
        (lambda: ops.abs_cell(x, weights.repeat(2, 1), codes, kernels), r"weights must have n \(n - 1\) / 2 rows"),
        (lambda: ops.abs_cell(x, weights.repeat(36, 1), codes, kernels), "n of 2 to 8, got 36"),
        (lambda: ops.abs_cell(x, weights, codes, kernels[:1]), "fewer kernels than convolutions: 1"),
        (lambda: ops.abs_cell(x, weights, codes, kernels * 2), "more kernels than convolutions: 4"),
        (
            lambda: ops.abs_cell(x, weights, codes, kernels[::-1]),
            r"kernels must be contiguous, of shape \(4, 4, 1, 1\)",
        ),
        (
            lambda: ops._abs_cell_backward(x, states[:1], weights, codes, kernels, True, True, True),
            "states must be what abs_cell returned",
        ),
        (
            lambda: ops._abs_cell_backward(x.contiguous(), states, weights, codes, kernels, True, True, True),
            "grad must be 4-d, not empty and in channels_last",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call_()
