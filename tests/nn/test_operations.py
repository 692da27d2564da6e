import copy

import pytest
import torch
from torch import nn

from fastnas import _C, use_backend
from fastnas.nn import OPS, PRIMITIVES, primitive
from fastnas.nn.operations import FactorizedReduce, Identity, ReLUConvBN, Zero


def test_primitives_are_in_the_published_order():
    assert list(PRIMITIVES) == [
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ]
    assert {*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7"} <= set(OPS)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["sep_conv_7x7", "conv_7x1_1x7", "nor_conv_1x1", "nor_conv_3x3", *PRIMITIVES])
def test_shapes_and_affine(name, stride, affine):
    op = OPS[name](4, stride, affine)
    assert op(torch.randn(2, 4, 8, 6)).shape == (2, 4, 8 // stride, 6 // stride)
    assert all(m.affine == affine for m in op.modules() if isinstance(m, nn.BatchNorm2d))


# The keys of the published modules, written out: a checkpoint holds exactly these.
BN = ("running_mean", "running_var", "num_batches_tracked")
KEYS = {
    "none": {},
    "max_pool_3x3": {},
    "avg_pool_3x3": {},
    "sep_conv_3x3": {
        "op.1.weight": (4, 1, 3, 3),
        "op.2.weight": (4, 4, 1, 1),
        "op.3": BN,
        "op.5.weight": (4, 1, 3, 3),
        "op.6.weight": (4, 4, 1, 1),
        "op.7": BN,
    },
    "dil_conv_5x5": {"op.1.weight": (4, 1, 5, 5), "op.2.weight": (4, 4, 1, 1), "op.3": BN},
    "conv_7x1_1x7": {"1.weight": (4, 4, 1, 7), "2.weight": (4, 4, 7, 1), "3": BN},
}


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_has_the_published_keys(name):
    expected = {}
    for key, value in KEYS[name].items():
        expected.update({f"{key}.{n}": None for n in BN} if value == BN else {key: value})
    state = OPS[name](4, 1, False).state_dict()
    assert list(state) == list(expected)
    assert all(shape is None or tuple(state[key].shape) == shape for key, shape in expected.items())


def test_skip_connect():
    assert isinstance(OPS["skip_connect"](4, 1, False), Identity)
    reduce = OPS["skip_connect"](4, 2, False)
    assert isinstance(reduce, FactorizedReduce)
    assert [k for k in reduce.state_dict() if "bn" not in k] == ["conv_1.weight", "conv_2.weight"]
    assert reduce.conv_1.weight.shape == (2, 4, 1, 1)


def test_zero_has_zero_gradient():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = Zero(2)(x)
    assert y.shape == (2, 3, 2, 2)
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()


def test_average_pool_divides_by_what_it_covers():
    y = OPS["avg_pool_3x3"](1, 1, False)(torch.ones(1, 1, 4, 4))
    assert torch.equal(y, torch.ones_like(y))


def test_factorized_reduce_reads_both_parities():
    reduce = FactorizedReduce(1, 2).eval()
    nn.init.ones_(reduce.conv_1.weight)
    nn.init.ones_(reduce.conv_2.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    y = reduce(x) * (1 + 1e-5) ** 0.5
    torch.testing.assert_close(y[0, 0], x[0, 0, ::2, ::2])
    torch.testing.assert_close(y[0, 1], x[0, 0, 1::2, 1::2])


def test_factorized_reduce_names_the_remedy():
    with pytest.raises(ValueError, match=r"height 7 and width 8, both must be even: pad or resize"):
        FactorizedReduce(4, 4)(torch.randn(1, 4, 7, 8))
    with pytest.raises(ValueError, match=r"C_out=5 must be even"):
        FactorizedReduce(4, 5)


def test_own_primitive(monkeypatch):
    monkeypatch.setattr("fastnas.nn.operations.OPS", copy.copy(OPS))

    @primitive("conv_1x1")
    def conv_1x1(C, stride, affine):
        return ReLUConvBN(C, C, 1, stride, 0, affine)

    from fastnas.nn import operations

    assert operations.OPS["conv_1x1"](4, 2, False)(torch.randn(2, 4, 8, 8)).shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="'conv_1x1' is already registered"):
        primitive("conv_1x1")(conv_1x1)


def by_hand(op, x):
    """What the published code computes, every module being called."""
    if isinstance(op, ReLUConvBN):
        return op.op[2](op.op[1](op.op[0](x)))
    r = op.relu(x)
    return op.bn(torch.cat([op.conv_1(r), op.conv_2(r[:, :, 1:, 1:])], 1))


def preprocess(kind, affine=False):
    torch.manual_seed(0)
    return ReLUConvBN(5, 6, 1, 1, 0, affine) if kind == "relu_conv_bn" else FactorizedReduce(5, 6, affine)


def parts(op):
    """(parent, name) of ReLU, a convolution and the norm."""
    if isinstance(op, ReLUConvBN):
        return [(op.op, "0"), (op.op, "1"), (op.op, "2")]
    return [(op, "relu"), (op, "conv_2"), (op, "bn")]


def step(op, call, x):
    y = call(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y.detach(), *torch.autograd.grad(y, [x, *op.parameters()], grad)


def same(op, other, x):
    """Outputs, gradients and buffers, over two steps in float64."""
    op, other, x = op.double(), other.double(), x.detach().double().requires_grad_()
    for _ in range(2):
        ours, theirs = step(op, op, x), step(other, lambda t: by_hand(other, t), x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert list(op.state_dict()) == list(other.state_dict())
    for (name, a), b in zip(op.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def launches():
    return {name: n for name, (n, _) in _C.counters().items() if name.startswith(("relu_pointwise", "mixed_op"))}


KINDS = ["relu_conv_bn", "factorized_reduce"]
FUSED = {"relu_pointwise": 2, "relu_pointwise_backward": 2}
FUSED_NORM = {**FUSED, "mixed_op": 2, "mixed_op_backward": 2}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_preprocessing_is_fused_and_what_its_modules_are(kind, affine, training):
    op = preprocess(kind, affine).train(training)
    other = copy.deepcopy(op)
    _C.reset_counters()
    same(op, other, torch.randn(3, 5, 6, 8))
    assert launches() == (FUSED if affine else FUSED_NORM)


@pytest.mark.parametrize(
    "settings", [{"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"track_running_stats": False}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_any_setting(kind, settings):
    op = preprocess(kind)
    parent, name = parts(op)[2]
    setattr(parent, name, nn.BatchNorm2d(6, affine=False, **settings))
    _C.reset_counters()
    same(op, copy.deepcopy(op), torch.randn(3, 5, 6, 8))
    assert launches() == FUSED_NORM
    same(op.eval(), copy.deepcopy(op), torch.randn(3, 5, 6, 8))


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(m):
    m.register_forward_hook(lambda module, args, y: y * 2)


def patched(m):
    forward = m.forward
    m.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("change", [hooked, patched])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_does_more_is_called(kind, which, change):
    op = preprocess(kind)
    other = copy.deepcopy(op)
    for o in (op, other):
        change(getattr(*parts(o)[which]))
    _C.reset_counters()
    same(op, other, torch.randn(3, 5, 6, 8))
    norm_only = {name: n for name, n in FUSED_NORM.items() if name not in FUSED}
    fused_norm = norm_only if kind == "factorized_reduce" else {}  # a Sequential is called whole
    assert launches() == (FUSED if which == 2 else fused_norm)


def replacement(name, kind):
    out, stride = (6, 1) if kind == "relu_conv_bn" else (3, 2)
    return {
        "relu6": lambda: nn.ReLU6(),
        "bias": lambda: nn.Conv2d(5, out, 1, stride),
        "own class": lambda: Twice(5, out, 1, stride, bias=False),
        "3x3": lambda: nn.Conv2d(5, out, 3, stride, 1, bias=False),
        "group norm": lambda: nn.GroupNorm(2, 6),
    }[name]()


@pytest.mark.parametrize("name", ["relu6", "bias", "own class", "3x3", "group norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_part_is_called(kind, name):
    op = preprocess(kind)
    if name == "3x3" and kind == "factorized_reduce":
        op.conv_1 = replacement(name, kind)  # both, so that their outputs agree in shape
    which = {"relu6": 0, "group norm": 2}.get(name, 1)
    setattr(*parts(op)[which], replacement(name, kind))
    _C.reset_counters()
    same(op, copy.deepcopy(op), torch.randn(3, 5, 6, 8))
    assert launches().get("relu_pointwise", 0) == (2 if which == 2 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_relu_in_place_stays_so(kind):
    op = preprocess(kind)
    getattr(*parts(op)[0]).inplace = True
    x = torch.randn(2, 5, 4, 4)
    op(x)
    assert (x >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_reference_backend_calls_the_norm(kind):
    op = preprocess(kind)
    _C.reset_counters()
    with use_backend("reference"):
        same(op, copy.deepcopy(op), torch.randn(3, 5, 6, 8))
    assert launches() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtype_of_the_modules(kind):
    op = preprocess(kind).eval()
    x = torch.randn(2, 5, 4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = op(x), by_hand(op, x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    ours.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_a_channel_is_refused_as_torch_does(kind):
    op = preprocess(kind)
    size = 1 if kind == "relu_conv_bn" else 2
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        op(torch.randn(1, 5, size, size))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_passes(kind):
    op = preprocess(kind).eval()
    x = torch.randn(0, 5, 4, 4)
    assert op(x).shape == by_hand(op, x).shape
