"""DrNAS' widening against its equations, one filter after the other (arXiv:2006.10355, Eq. 7 and 8)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas import MixedOp
from fastnas.nn.operations import OPS, FactorizedReduce, Identity, ReLUConvBN, Zero
from fastnas.nn.widen import Replaced, widen

NAMES = ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "nor_conv_1x1", "nor_conv_3x3"]


def copied(old, new, dim=0):
    """Which slice of ``old`` each slice of ``new`` is, found by looking; slices of ``old`` are all different."""
    found = []
    for piece in new.unbind(dim):
        equal = [j for j, other in enumerate(old.unbind(dim)) if torch.equal(piece, other)]
        assert len(equal) == 1
        found.append(equal[0])
    return found


def scrambled(module):
    """The module with random parameters and statistics, in float64."""
    module = module.double()
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point():
            t.data = torch.rand_like(t) + 0.5
    return module


def grow(before, after, g_in, g_out):
    """Eq. 8, one number after the other: W'[j, i] = W[g_out(j), g_in(i)]."""
    expected = torch.empty_like(after)
    for j, source in enumerate(g_out):
        for i, column in enumerate(g_in):
            expected[j, i] = before[source, column]
    return expected


class ByHand:
    """Goes through the layers of an old and a widened candidate, checks each, and knows what was copied."""

    def __init__(self, old, new):
        # of what comes in, the first layer shows what was copied
        self.old, self.new, self.g = old, new, None
        self.layers()

    def layers(self):
        pairs = [
            (a, b)
            for a, b in zip(self.old.modules(), self.new.modules(), strict=True)
            if isinstance(a, (nn.Conv2d, nn.BatchNorm2d))
        ]
        for a, b in pairs:
            self.norm(a, b) if isinstance(a, nn.BatchNorm2d) else self.conv(a, b)

    def conv(self, a, b):
        if a.groups > 1:
            g_out = copied(a.weight, b.weight) if self.g is None else self.g
            assert torch.equal(b.weight, torch.stack([a.weight[j] for j in g_out]))
            assert b.groups == len(g_out)
        else:
            g_in = copied(a.weight, b.weight[: a.out_channels], 1) if self.g is None else self.g
            g_out = copied(a.weight[:, 0], b.weight[:, 0])
            assert torch.equal(b.weight, grow(a.weight, b.weight, g_in, g_out))
        n = a.out_channels
        assert g_out[:n] == list(range(n))  # Eq. 7: g(j) = j up to n
        assert set(g_out[n:]) <= set(range(n))
        assert (b.in_channels, b.out_channels) == b.weight.shape[1::-1] or b.groups > 1
        self.g = g_out

    def norm(self, a, b):
        assert b.num_features == len(self.g)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(a, name)
            if value is not None:
                assert torch.equal(getattr(b, name), torch.stack([value[j] for j in self.g]))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_where_the_equations_say(name, stride, affine):
    torch.manual_seed(0)
    for old, new in ((3, 7), (4, 5), (2, 12)):
        op = scrambled(OPS[name](old, stride, affine))
        before, replaced = copy.deepcopy(op), []
        widen(op, old, new, torch.Generator().manual_seed(old), replaced)
        ByHand(before, op)
        assert op(torch.randn(2, new, 6, 10, dtype=torch.float64)).shape[1] == new
        assert [r.new for r in replaced] == list(op.parameters())
        for r, p in zip(replaced, before.parameters(), strict=True):
            assert torch.equal(r.old, p)
            assert torch.equal(r.select(r.old), r.new)


def test_random_copies_are_uniform():
    op = ReLUConvBN(4, 4, 1, 1, 0)
    widen(op, 4, 4004, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor(copied_of_many(op.op[1].weight)), minlength=4)
    assert ((counts - 1000).abs() < 110).all()  # 4 standard deviations


def copied_of_many(weight):
    return (weight[4:, None, :4] == weight[None, :4, :4]).all(2).flatten(2).all(2).int().argmax(1).tolist()


@pytest.mark.parametrize("affine", [False, True])
def test_factorized_reduce(affine):
    torch.manual_seed(0)
    op = scrambled(FactorizedReduce(4, 4, affine))
    before, replaced = copy.deepcopy(op), []
    widen(op, 4, 10, torch.Generator().manual_seed(1), replaced)
    g_in = copied(before.conv_1.weight, op.conv_1.weight[:2], 1)
    halves = []
    for name in ("conv_1", "conv_2"):
        a, b = getattr(before, name).weight, getattr(op, name).weight
        halves.append(copied(a[:, 0], b[:, 0]))
        assert halves[-1][:2] == [0, 1]
        assert torch.equal(b, grow(a, b, g_in, halves[-1]))
    g = [*halves[0], *(2 + j for j in halves[1])]
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(before.bn, name)
        if value is not None:
            assert torch.equal(getattr(op.bn, name), value[g])
    assert [r.new for r in replaced] == list(op.parameters())
    # a widened layer on copies of the old channels computes copies of what the old one computes, times those copies
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    doubled = x[:, g_in]
    weight = [F.conv2d(doubled.relu()[:, :, s:, s:], c.weight, None, 2) for s, c in enumerate((op.conv_1, op.conv_2))]
    expected = F.batch_norm(torch.cat(weight, 1), op.bn.running_mean, op.bn.running_var, op.bn.weight, op.bn.bias)
    torch.testing.assert_close(op.eval()(doubled), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("stride", [1, 2])
def test_momentum_follows_and_the_edge_computes_what_a_hand_built_one_does(stride, backend):
    torch.manual_seed(0)
    m = MixedOp(12, stride, k=6).double()
    optimizer = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
    x, weights = torch.randn(3, 12, 6, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    with fastnas.use_backend(backend):
        m(x, weights).square().sum().backward()
        optimizer.step()
        old, replaced = copy.deepcopy(m), []
        m.wider(3, torch.Generator().manual_seed(1), replaced)
    assert {id(r.new) for r in replaced} == {id(p) for p in m.parameters()}
    for r in replaced:
        momentum = optimizer.state[r.old]["momentum_buffer"]
        # the same numbers, wherever they are: what is equal in the parameter is equal in its momentum
        code = torch.arange(r.old.numel(), dtype=torch.float64).view(r.old.shape)
        places = r.select(code).long()
        assert torch.equal(r.new, r.old.flatten()[places])
        assert torch.equal(r.select(momentum), momentum.flatten()[places])
        assert r.select(momentum).shape == r.new.shape
    for a, b in zip(old._ops, m._ops, strict=True):
        if not isinstance(a, (Zero, Identity, FactorizedReduce)) and next(a.parameters(), None) is not None:
            ByHand(a, b)
    part = x[:, :4]
    with fastnas.use_backend("reference"):
        mixed = sum(w * op(part) for w, op in zip(weights, copy.deepcopy(m._ops), strict=True))
    rest = x[:, 4:] if stride == 1 else F.max_pool2d(x[:, 4:], 2, 2)
    expected = torch.cat([mixed, rest], 1).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    with fastnas.use_backend(backend):
        torch.testing.assert_close(m(x, weights), expected)


def test_pruned_candidates_widen_to_themselves():
    m, replaced = MixedOp(8, 2, k=4), []
    m.keep([3, 7])
    zeros = [op for op in m._ops if isinstance(op, Zero)]
    assert len(zeros) == 6
    m.wider(2, replaced=replaced)
    assert [op for op in m._ops if isinstance(op, Zero)] == zeros
    assert {id(r.new) for r in replaced} == {id(p) for p in m.parameters()}
    assert m(torch.randn(2, 8, 4, 4), torch.rand(8)).isfinite().all()


def test_frozen_parameters_stay_frozen_and_biases_are_widened():
    conv, replaced = nn.Conv2d(2, 2, 3, padding=1), []
    conv.weight.requires_grad_(False)
    widen(conv, 2, 5, replaced=replaced)
    assert [type(r) for r in replaced] == [Replaced, Replaced]
    assert not conv.weight.requires_grad
    assert conv.bias.shape == (5,)
    assert conv(torch.randn(1, 5, 4, 4)).shape == (1, 5, 4, 4)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "a convolution with groups=2 cannot be widened: only dense and depthwise"),
        (nn.Linear(4, 4), "Linear cannot be widened: only convolutions, batch norms and pools can"),
    ],
)
def test_what_cannot_be_widened(op, message):
    with pytest.raises(ValueError, match=message):
        widen(op, 4, 8)
