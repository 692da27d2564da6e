import pytest
import torch
from torch import nn

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
    monkeypatch.setattr("fastnas.nn.operations.OPS", dict(OPS))

    @primitive("conv_1x1")
    def conv_1x1(C, stride, affine):
        return ReLUConvBN(C, C, 1, stride, 0, affine)

    from fastnas.nn import operations

    assert operations.OPS["conv_1x1"](4, 2, False)(torch.randn(2, 4, 8, 8)).shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="'conv_1x1' is already registered"):
        primitive("conv_1x1")(conv_1x1)
