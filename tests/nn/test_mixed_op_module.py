"""MixedOp as a drop-in module: whatever its candidates are, it computes what calling them one by one computes."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastnas
from fastnas import MixedOp
from fastnas.nn import Cell
from fastnas.nn.operations import OPS, PRIMITIVES, FactorizedReduce, Identity, ReLUConvBN, SepConv


def eager(m, x, weights):
    """The definition, on the very same modules."""
    return sum(w * op(x) for w, op in zip(weights, m._ops, strict=True))


def compare(m, shape=(3, 8, 6, 6), dtype=torch.float64, tolerance=1e-9, steps=2):
    """Runs ``m`` and a copy of it by the definition: outputs, all gradients and buffers must agree."""
    m = m.to(dtype)
    other = deepcopy(m)
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(shape, dtype=dtype)
        weights = torch.rand(len(m._ops), dtype=dtype)
        sides = []
        for module, forward in ((m, m), (other, lambda x, w: eager(other, x, w))):
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *module.parameters()]
            y = forward(*leaves[:2])
            grads = torch.autograd.grad((y * y.detach().cos()).sum(), leaves, materialize_grads=True)
            sides.append([y.detach(), *grads, *(b.clone() for b in module.buffers())])
        for a, b in zip(*sides, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert float((a - b).double().norm()) <= tolerance * max(1e-3, float(b.double().norm()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
def test_darts(stride, training):
    m = MixedOp(8, stride)
    with torch.no_grad():
        m(torch.randn(4, 8, 6, 6), torch.ones(8))  # running statistics that are not the initial ones
    compare(m.train(training))


def test_float32():
    compare(MixedOp(16, 1), (4, 16, 8, 8), torch.float32, 1e-4)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, None])
def test_momentum(momentum):
    m = MixedOp(4, 1)
    for norm in m.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    m._ops[1][1].momentum = 0.5  # one of its own
    compare(m, (3, 4, 5, 5), steps=3)


def test_norms_without_running_statistics():
    m = MixedOp([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False))])
    compare(m, (3, 4, 5, 5))
    compare(m.eval(), (3, 4, 5, 5))


def test_a_norm_in_another_mode_than_the_rest():
    m = MixedOp(4, 1)
    m._ops[4].op[7].eval()
    m._ops[1][1].eval()
    compare(m, (3, 4, 5, 5))


def test_other_eps():
    m = MixedOp(4, 1)
    m._ops[2][1].eps = 0.3
    compare(m, (3, 4, 5, 5))
    m._ops[2][1].eps = 0.01  # changed after the first call
    compare(m, (3, 4, 5, 5))


def candidates(kind):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    norm = nn.BatchNorm2d(4, affine=False)
    return {
        "affine": [SepConv(4, 4, 3, 1, 1, affine=True), ReLUConvBN(4, 4, 3, 1, 1, affine=True)],
        "convolutions": [ReLUConvBN(4, 4, 3, 1, 1, affine=False), ReLUConvBN(4, 4, 1, 1, 0, affine=False), Identity()],
        "no norm": [conv, nn.Identity(), nn.Sequential(nn.ReLU(), conv)],
        "other pools": [nn.MaxPool2d(5, 1, 2), nn.Sequential(nn.AvgPool2d(3, 1, 1), norm), nn.MaxPool2d(3, 1, 1)],
        "other kernels": [SepConv(4, 4, 9, 1, 4, affine=False), OPS["conv_7x1_1x7"](4, 1, False)],
        "bias": [nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1), norm)],
        "dropout between": [nn.Sequential(nn.Sequential(conv, nn.Tanh()), nn.Sequential(norm))],
        "group norm": [nn.Sequential(conv, nn.GroupNorm(2, 4))],
        "more than the fused op takes": [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))] * 30,
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["affine", "convolutions", "no norm", "other pools", "other kernels", "bias", "dropout between", "group norm"],
)
def test_modules_of_your_own(kind):
    compare(MixedOp(candidates(kind)), (3, 4, 6, 6))


def test_more_candidates_than_the_kernel_takes():
    m = MixedOp([nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False)) for _ in range(30)])
    compare(m, (2, 2, 4, 4), steps=1)


def test_candidates_that_change_channels_and_size():
    norm = nn.BatchNorm2d(6, affine=False)
    m = MixedOp([nn.Sequential(nn.Conv2d(4, 6, 3, 3), norm), nn.Conv2d(4, 6, 3, 3)])
    compare(m, (2, 4, 9, 9))


def test_candidates_on_other_than_images():
    compare(MixedOp([nn.Linear(5, 5), nn.Tanh(), nn.Identity()]), (3, 7, 5))


def test_a_custom_forward_is_called():
    class Doubled(SepConv):
        def forward(self, x):
            return 2 * super().forward(x)

    compare(MixedOp([Doubled(4, 4, 3, 1, 1, affine=False), Identity()]), (3, 4, 5, 5))


def test_hooks_are_called_also_when_added_late():
    m = MixedOp(4, 1)
    x, weights = torch.randn(2, 4, 5, 5), torch.rand(8)
    m(x, weights)
    calls = []
    m._ops[4].op[1].register_forward_hook(lambda *_: calls.append("conv"))
    handle = m._ops[7].register_forward_hook(lambda module, args, y: calls.append("candidate") or y * 3)
    y = m(x, weights)
    assert calls == ["conv", "candidate"]
    handle.remove()
    assert not torch.allclose(m(x, weights), y)


def test_replaced_modules_are_seen():
    m = MixedOp(4, 1).double()
    compare(m, (2, 4, 5, 5), steps=1)
    m._ops[5] = Identity()
    m._ops[4].op[3] = nn.BatchNorm2d(4)
    compare(m, (2, 4, 5, 5), steps=1)


def test_changed_settings_are_seen():
    m = MixedOp(4, 1).double()
    compare(m, (2, 4, 5, 5), steps=1)
    m._ops[6].op[3].weight = nn.Parameter(torch.rand(4, dtype=torch.float64))
    m._ops[1][1].track_running_stats = False
    m._ops[1][1].running_mean = m._ops[1][1].running_var = None
    compare(m, (2, 4, 5, 5), steps=1)
    m._ops[7].op[1].dilation = m._ops[7].op[1].padding = (1, 1)
    m._ops[7].op[1].padding = (2, 2)
    compare(m, (2, 4, 5, 5), steps=1)
    compare(m.eval(), (2, 4, 5, 5), steps=1)
    m._ops[5].forward = lambda x: 2 * x
    compare(m, (2, 4, 5, 5), steps=1)
    m._ops = nn.ModuleList([Identity(), Identity()])
    compare(m, (2, 4, 5, 5), steps=1)


def test_fused_again_after_hooks_are_gone():
    m, x, weights = MixedOp(4, 1), torch.randn(2, 4, 5, 5), torch.rand(8)
    handles = [child.register_forward_hook(lambda *_: None) for child in m._ops.modules()]
    m(x, weights)
    assert {c.kind for c in m._plans[None].candidates} == {"map"}
    for handle in handles:
        handle.remove()
    m(x, weights)
    assert {c.kind for c in m._plans[None].candidates} == {"none", "max_pool", "avg_pool", "skip", "separable"}


def test_replicas_of_data_parallel_use_their_own_parameters():
    m, x, weights = MixedOp(4, 1).double().eval(), torch.randn(2, 4, 5, 5).double(), torch.rand(8).double()
    m(x, weights)
    replica = m._replicate_for_data_parallel()
    replica._ops = deepcopy(m._ops)
    for p in replica._ops.parameters():
        p.data.mul_(2)
    torch.testing.assert_close(replica(x, weights), eager(replica, x, weights))


def test_an_empty_batch_leaves_the_statistics():
    m = MixedOp(4, 1)
    y = m(torch.randn(0, 4, 5, 5), torch.rand(8))
    assert y.shape == (0, 4, 5, 5)
    assert all(bool(torch.isfinite(b).all()) for b in m.buffers())


def test_train_and_eval_alternate():
    m = MixedOp(4, 1).double()
    for training in (True, False, True, False):
        compare(m.train(training), (2, 4, 5, 5), steps=1)


class TestSignatures:
    def test_primitives(self):
        m = MixedOp(4, 1, ["none", "skip_connect", "sep_conv_3x3"])
        assert len(m._ops) == 3
        compare(m, (2, 4, 5, 5))

    def test_state_dict_has_the_published_names(self):
        assert list(MixedOp(4, 1).state_dict())[:4] == [
            "_ops.1.1.running_mean",
            "_ops.1.1.running_var",
            "_ops.1.1.num_batches_tracked",
            "_ops.2.1.running_mean",
        ]
        names = set(MixedOp(4, 2).state_dict())
        assert {"_ops.3.conv_1.weight", "_ops.4.op.1.weight", "_ops.4.op.6.weight", "_ops.7.op.3.running_var"} <= names

    def test_weights_as_a_list_of_scalars(self):
        m, x = MixedOp(4, 1).eval(), torch.randn(2, 4, 5, 5)
        weights = torch.rand(8)
        assert torch.equal(m(x, list(weights)), m(x, weights))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, 1, 4), "k=4 does not divide the C=10 channels"),
            ((8, 1, 0), "k=0"),
            ((8, 3), "stride is 3"),
            ((8, 1, ["sep_conv_4x4"]), "sep_conv_4x4"),
            ((8, 1, "none"), "choose a sequence"),
            (([],), "at least one candidate"),
            (([nn.Identity()], 1, 2), "go with a number of channels"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MixedOp(*arguments)

    def test_other_channels_than_the_candidates_have(self):
        with pytest.raises(ValueError, match="x has 6 channels: expected 4"):
            MixedOp(4, 1, ["max_pool_3x3"])(torch.randn(2, 6, 5, 5), torch.rand(1))

    def test_k_given_twice(self):
        with pytest.raises(ValueError, match="give it once"):
            MixedOp(8, 1, 4, k=2)

    def test_numbers_that_are_not_plain(self):
        import numpy as np

        m = MixedOp(np.int64(8), 1, np.int64(4)).eval()
        assert m.k == 4
        assert m(torch.randn(1, 8, 4, 4), [0.1] * 8).shape == (1, 8, 4, 4)

    def test_weights_of_the_wrong_length(self):
        with pytest.raises(ValueError, match=r"weights has shape \(7,\): expected \(8,\)"):
            MixedOp(4, 1)(torch.randn(2, 4, 5, 5), torch.rand(7))

    def test_one_value_a_channel(self):
        x = torch.randn(1, 4, 1, 1)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            MixedOp(4, 1)(x, torch.rand(8))
        MixedOp(4, 1).eval()(x, torch.rand(8))


@pytest.mark.parametrize("stride", [1, 2])
def test_partial_channels(stride):
    m = MixedOp(16, stride, 4).double()
    x, weights = torch.randn(3, 16, 6, 6, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    mixed = eager(deepcopy(m), x[:, :4], weights)
    bypass = x[:, 4:] if stride == 1 else nn.functional.max_pool2d(x[:, 4:], 2, 2)
    expected = torch.cat([mixed, bypass], 1)
    n, c, h, w = expected.shape
    expected = expected.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
    torch.testing.assert_close(m(x, weights), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_wider(stride):
    m = MixedOp(16, stride, 4).double()
    x, weights = torch.randn(3, 16, 6, 6, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    m(x, weights)
    old = deepcopy(m)
    m.wider(2, torch.Generator().manual_seed(0))
    assert m.k == 2
    wide = deepcopy(m)
    y = m(x, weights)
    assert y.shape == (3, 16, 6 // stride, 6 // stride)
    for op, before in zip(wide._ops, old._ops, strict=True):
        for a, b in zip([*op.parameters(), *op.buffers()], [*before.parameters(), *before.buffers()], strict=True):
            if b.dim() == 0:
                continue
            half = len(b) if not isinstance(op, FactorizedReduce) or len(b) == 2 else len(b) // 2
            assert len(a) == 2 * len(b)
            assert torch.equal(a[:half, : b.shape[1]] if b.dim() > 1 else a[:half], b[:half])  # g(j) = j up to n
    # beyond, a copy: the second depthwise convolution follows its input channels, which follow the pointwise's rows
    _, dw, pw, _, _, dw2, *_ = m._ops[4].op
    for j in range(4, 8):
        rows = [i for i in range(4) if torch.equal(pw.weight[i], pw.weight[j])]
        assert rows
        assert torch.equal(dw2.weight[rows[0]], dw2.weight[j])
        assert any(torch.equal(dw.weight[i], dw.weight[j]) for i in range(4))
    with pytest.raises(ValueError, match="smaller than 2"):
        m.wider(2)
    with pytest.raises(ValueError, match="k=0"):
        m.wider(0)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("order", ["keep", "keep then widen", "widen then keep"])
def test_keep(order, stride, backend):
    torch.manual_seed(0)
    m = MixedOp(8, stride, 4).double()
    x, weights = torch.randn(3, 8, 6, 10, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    with fastnas.use_backend(backend):
        m(x, weights)
        for step in order.split(" then "):
            if step == "keep":
                m.keep((6, 3))
            else:
                m.wider(2, torch.Generator().manual_seed(0))
        kept = deepcopy(m._ops)
        y = m(x, weights)
    part = 8 // m.k
    mixed = weights[3] * kept[3](x[:, :part]) + weights[6] * kept[6](x[:, :part])
    rest = x[:, part:] if stride == 1 else nn.functional.max_pool2d(x[:, part:], 2, 2)
    expected = torch.cat([mixed, rest], 1).unflatten(1, (m.k, -1)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(y, expected)
    assert {name.split(".")[1] for name in m.state_dict()} == ({"6"} if stride == 1 else {"3", "6"})
    other = MixedOp(8, stride, m.k).double()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(m.state_dict())
    other.keep([3, 6])
    other.load_state_dict(m.state_dict())
    with fastnas.use_backend(backend):
        torch.testing.assert_close(other.eval()(x, weights), m.eval()(x, weights))


def test_what_is_left_without_parameters_is_widened():
    m = MixedOp(8, 1, k=4, primitives=["skip_connect", "avg_pool_3x3", "nor_conv_1x1"], pool_norm=False)
    m.keep([0, 1])
    m.wider(2)
    x, weights = torch.randn(2, 8, 5, 3), torch.rand(3)
    part = x[:, :4]
    mixed = weights[0] * part + weights[1] * nn.functional.avg_pool2d(part, 3, 1, 1, count_include_pad=False)
    expected = torch.cat([mixed, x[:, 4:]], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(m(x, weights), expected)


def test_kept_edges_run_in_the_cell():
    torch.manual_seed(0)
    cell = Cell(2, 2, 4, 4, 4, False, False).double()
    keep = [[1, 4], [0, 3], [2], [5, 6, 7], [0, 4]]
    for op, indices in zip(cell._ops, keep, strict=True):
        op.keep(indices)
    x, weights = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.rand(5, 8, dtype=torch.float64).requires_grad_()
    with torch.profiler.profile() as trace:
        y = cell(x, x, weights)
    assert "fastnas::mixed_cell" in {e.key for e in trace.key_averages()}
    with fastnas.use_backend("reference"):
        torch.testing.assert_close(y, deepcopy(cell)(x, x, weights))
    (gradient,) = torch.autograd.grad(y.square().sum(), weights)
    for row, indices in zip(gradient, keep, strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(indices) - {0}


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, "indices is empty: keep at least one candidate"),
        ([0, 8], ValueError, r"indices\[1\]=8: expected 0 to 7, one of the edge's 8 candidates"),
        ([-1], ValueError, r"indices\[0\]=-1: expected 0 to 7"),
        (["none"], TypeError, r"indices\[0\] is a str: expected an int"),
    ],
)
def test_bad_indices(indices, error, message):
    m = MixedOp(4)
    with pytest.raises(error, match=message):
        m.keep(indices)
    assert len(m.state_dict()) == len(MixedOp(4).state_dict())


def test_copies():
    m = MixedOp(4, 1)
    x, weights = torch.randn(2, 4, 5, 5), torch.rand(8)
    m(x, weights)
    for other in (deepcopy(m), pickle.loads(pickle.dumps(m))):
        with torch.no_grad():
            other._ops[4].op[1].weight.zero_()
        assert not torch.equal(other.eval()(x, weights), m.eval()(x, weights))
        m.train()


def test_autocast():
    m = MixedOp(8, 2)
    other = deepcopy(m)
    x, weights = torch.randn(3, 8, 6, 6), torch.rand(8)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = m(x, weights), eager(other, x, weights)
    assert y.dtype == torch.bfloat16
    exact = eager(deepcopy(m).double(), x.double(), weights.double()).detach()
    y, z = y.detach(), z.detach()
    assert float((y - exact).norm()) <= 2 * float((z - exact).norm())


def test_autocast_leaves_float64_and_promotes_as_torch_does():
    m = MixedOp(4, 1).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert m(torch.randn(2, 4, 5, 5).double(), torch.rand(8)).dtype == torch.float64
        assert MixedOp([nn.Linear(5, 5), nn.Identity()])(torch.randn(3, 5), torch.rand(2)).dtype == torch.float32


def test_the_reference_backend():
    m, x, weights = MixedOp(4, 1).double().eval(), torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.rand(8).double()
    with fastnas.use_backend("reference"):
        y = m(x, weights)
    torch.testing.assert_close(m(x, weights), y)


class Trace(TorchDispatchMode):
    """The names of the ATen ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["native", "emulated"])
def test_one_edge_runs_as_one_op(backend, request):
    if backend == "emulated":
        library = request.getfixturevalue("emulated")
        library.reset_counters()
    m = MixedOp(8, 1)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.rand(8).requires_grad_()
    with fastnas.use_backend(backend), Trace() as trace:
        y = m(x, weights)
        if backend == "emulated":
            forward = library.counters()
            library.reset_counters()
        y.backward(torch.randn(y.shape).contiguous(memory_format=torch.channels_last))
    kinds = {n.split("::")[1].split(".")[0] for n in trace.names if n.startswith("aten")}
    for name in ("batch_norm", "pool", "cat", "transpose"):
        assert not any(name in kind for kind in kinds), kinds
    assert not kinds & {"mul", "mul_", "add", "add_", "sum"}, kinds
    assert len(trace.names) < 90  # eager: some 400
    if backend == "emulated":
        assert forward["mixed_op_sum"][0] == 1
        backward = {k: v for k, v in library.counters().items() if k.startswith("mixed_op_sum_backward")}
        assert 1 <= sum(launches for launches, _ in backward.values()) <= 3, backward


def test_primitives_are_those_of_darts():
    assert len(PRIMITIVES) == 8
    assert PRIMITIVES[0] == "none"
