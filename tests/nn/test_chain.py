"""Chains against plain functions: blocks, supernet and networks, forward and backward, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnas.genotype import ChainGenotype
from fastnas.nn import BLOCKS, ChainNetwork, ChainSupernet, InvertedResidual, MixedOp, block
from fastnas.nn.chain import Place, Skeleton
from fastnas.nn.operations import Zero

PRIMITIVES = ("skip_connect", "mb3_3x3", "mbconv6_5x5")
SMALL = Skeleton(stem=4, stem_stride=1, first=3, stages=((5, 2, 2), (6, 1, 1)), head=7, activation=nn.ReLU6, eps=1e-3)


def norm(x, module, eps=1e-5):
    return F.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=eps)


def plain_block(m, x, bound, stride, eps=1e-5):
    """The block of MobileNetV2 by functions, with batch statistics."""
    expand, bn1, _, depthwise, bn2, _, project, bn3 = m.conv
    y = norm(F.conv2d(x, expand.weight), bn1, eps).clamp(0, bound)
    y = F.conv2d(y, depthwise.weight, None, stride, depthwise.weight.shape[-1] // 2, groups=y.shape[1])
    y = norm(F.conv2d(norm(y, bn2, eps).clamp(0, bound), project.weight), bn3, eps)
    return y + x if stride == 1 and y.shape == x.shape else y


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith("mb")])
@pytest.mark.parametrize(("C_in", "C_out", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2), (3, 8, 2)])
def test_blocks_are_those_of_the_definition(name, C_in, C_out, stride):
    torch.manual_seed(0)
    m = BLOCKS[name](C_in, C_out, stride, True).double()
    x = 5 * torch.randn(3, C_in, 7, 5, dtype=torch.float64)
    bound = 6.0 if name.startswith("mbconv") else torch.inf
    expansion, kernel = int(name.split("_")[0][-1]), int(name[-1])
    assert m.conv[0].weight.shape == (expansion * C_in, C_in, 1, 1)
    assert m.conv[3].weight.shape == (expansion * C_in, 1, kernel, kernel)
    torch.testing.assert_close(m(x), plain_block(m, x, bound, stride))
    assert m(x).shape == (3, C_out, -(-7 // stride), -(-5 // stride))


def test_a_block_without_expansion_and_skips():
    m = InvertedResidual(4, 6, 3, 1, 1)
    assert [type(layer).__name__ for layer in m.conv] == ["Conv2d", "BatchNorm2d", "ReLU6", "Conv2d", "BatchNorm2d"]
    x = torch.randn(2, 4, 6, 6)
    assert BLOCKS["skip_connect"](4, 4, 1, True)(x) is x
    assert BLOCKS["skip_connect"](4, 8, 2, True)(x).shape == (2, 8, 3, 3)


def test_state_dict_has_the_names_of_nas_bench_macro():
    net = ChainNetwork(ChainGenotype.from_text("012"), Skeleton(4, 1, 0, ((8, 2, 2), (16, 1, 2)), 12))
    names = [name for name in net.state_dict() if name.endswith("weight")]
    assert names == [
        *("stem.0.weight", "stem.1.weight", "features.0.downsample.0.weight", "features.0.downsample.1.weight"),
        *(f"features.{layer}.conv.{i}.weight" for layer in (1, 2) for i in (0, 1, 3, 4, 6, 7)),
        *("out.0.weight", "out.1.weight", "classifier.weight"),
    ]


def test_places_and_sizes():
    assert SMALL.places == (Place(3, 5, 2), Place(5, 5, 1), Place(5, 6, 1))
    assert [place.same for place in SMALL.places] == [False, True, False]
    wide = SMALL.scaled(8, 1)
    assert (wide.stem, wide.first, wide.stages, wide.head) == (8, 6, ((10, 2, 2), (12, 1, 1)), 14)
    assert SMALL.scaled(2, 1).head == 7
    # MobileNetV2's rule: multiples of 8, at least 8, to the nearest unless that takes a tenth away
    sizes = Skeleton(32, 2, 16, ((24, 1, 1), (40, 1, 1), (44, 1, 1)), 1280).scaled(16, 8)
    assert (sizes.stem, sizes.first, [C for C, _, _ in sizes.stages]) == (16, 8, [16, 24, 24])


def supernet(seed=0, allowed=None, **kwargs):
    torch.manual_seed(seed)
    return ChainSupernet(SMALL, PRIMITIVES, 3, 2, allowed=allowed, **kwargs).double()


def plain(net, x, weights, path=None):
    """The supernet's logits from its own blocks, one after the other."""
    x = net.stem(x)
    for i, layer in enumerate(net.features):
        chosen = range(len(PRIMITIVES)) if path is None else [path[i]]
        x = sum(weights[i, o] * layer._ops[o](x) for o in chosen if not isinstance(layer._ops[o], Zero))
    return net.classifier(net.out(x).flatten(1))


ALLOWED = [[False, True, True], [True, True, True], [False, True, True]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("allowed", [None, ALLOWED])
@pytest.mark.parametrize("path", [None, [1, 0, 2], [2, 1, 1]])
def test_the_supernet_is_the_sum_of_its_blocks(path, allowed, training):
    net = supernet(allowed=allowed).train(training)
    other = copy.deepcopy(net)
    x = torch.randn(4, 2, 9, 6, dtype=torch.float64)
    weights = torch.rand(3, 3, dtype=torch.float64)
    grads = []
    for run in (
        lambda net, w: net(x, {"chain": w}, path=None if path is None else {"chain": path}),
        lambda net, w: plain(net, x, w, path),
    ):
        w, module = weights.clone().requires_grad_(), net if not grads else other
        logits = run(module, w)
        (logits**2).sum().backward()
        parameters = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        grads.append((logits, w.grad, parameters))
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))
    if allowed is not None:
        assert torch.all(grads[0][1][[0, 2], [0, 0]] == 0)


def test_norms_of_the_choices_have_no_parameters_unless_asked_for():
    def affine(net):
        return {m.affine for m in net.features.modules() if isinstance(m, nn.BatchNorm2d)}

    assert affine(supernet()) == {False}
    assert affine(supernet(affine=True)) == {True}
    assert {m.eps for m in supernet().modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert all(m.affine for m in supernet().stem.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_single_path_runs_nothing_else():
    net = supernet()
    ran = []
    for _, layer, op in net.mixed_ops():
        for o, candidate in enumerate(op._ops):
            candidate.register_forward_hook(lambda *_, place=(layer, o): ran.append(place))
    net(torch.randn(2, 2, 6, 6, dtype=torch.float64), {"chain": torch.ones(3, 3).double()}, path={"chain": [2, 1, 0]})
    assert ran == [(0, 2), (1, 1), (2, 0)]


def test_between_edge_weights_and_checkpoints():
    net = supernet()
    x, w = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    logits = net(x, {"chain": w})
    doubled = net(x, {"chain": w}, {"chain": torch.tensor([1.0, 2.0, 1.0]).double()})
    seen = []

    def between(states):
        seen.append(states[0].shape)
        return (states[0] * (2 if len(seen) == 2 else 1),)

    torch.testing.assert_close(net(x, {"chain": w}, between=between), doubled)
    assert seen == [(4, 5, 3, 3), (4, 5, 3, 3), (4, 6, 3, 3)]
    (gradient,) = torch.autograd.grad(logits.sum(), w)
    net.checkpoint_cells = True
    again = net(x, {"chain": w})
    torch.testing.assert_close((again, torch.autograd.grad(again.sum(), w)[0]), (logits, gradient))


def test_a_network_is_the_supernet_of_one_choice():
    genotype = ChainGenotype(("mb3_3x3", "skip_connect", "mbconv6_5x5"))
    net = supernet(affine=True)
    torch.manual_seed(1)
    single = ChainNetwork(genotype, SMALL, 3, 2).double()
    choices = [PRIMITIVES.index(op) for op in genotype.ops]
    for layer, o, alone in zip(net.features, choices, single.features, strict=True):
        alone.load_state_dict(layer._ops[o].state_dict())
    for name in ("stem", "out", "classifier"):
        getattr(single, name).load_state_dict(getattr(net, name).state_dict())
    x, weights = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[choices]
    for path in (None, {"chain": choices}):
        torch.testing.assert_close(net(x, {"chain": weights}, path=path), single(x))


def test_pruned_candidates_cost_nothing_where_the_shape_changes():
    torch.manual_seed(0)
    ops = [BLOCKS[name](3, 8, 2, False) for name in PRIMITIVES]
    op = MixedOp(ops, 2)
    x, weights = torch.randn(2, 3, 7, 7), torch.tensor([0.2, 0.3, 0.5])
    op.keep([0, 2])
    torch.testing.assert_close(op(x, weights), 0.2 * ops[0](x) + 0.5 * ops[2](x))
    torch.testing.assert_close(op(x, weights, 2), 0.5 * ops[2](x))
    with pytest.raises(ValueError, match="weights"):
        MixedOp(ops, 2)(x, torch.rand(4))


def test_a_block_of_your_own():
    @block("test_double")
    def double(C_in, C_out, stride, affine):
        return nn.Conv2d(C_in, C_out, 1, stride, bias=False)

    try:
        net = ChainNetwork(ChainGenotype(("test_double",) * 3), SMALL, 3, 2)
        assert net(torch.randn(2, 2, 8, 8)).shape == (2, 3)
        with pytest.raises(ValueError, match="block 'test_double' is already registered"):
            block("test_double")(nn.Identity)
    finally:
        del BLOCKS["test_double"]


def test_errors():
    with pytest.raises(ValueError, match="genotype has 2 blocks: expected one for each of 3"):
        ChainNetwork(ChainGenotype.from_text("00"), SMALL)
    with pytest.raises(ValueError, match=r"ops\[0\] is the unknown op 'sep_conv_3x3'"):
        ChainNetwork(ChainGenotype(("sep_conv_3x3",) * 3), SMALL)
    with pytest.raises(ValueError, match="block 'conv' is unknown"):
        ChainSupernet(SMALL, ["conv"])
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        ChainSupernet(SMALL, PRIMITIVES, 0)
    net, x = supernet(), torch.randn(2, 2, 6, 6).double()
    for weights, got in (({}, "nothing"), ({"chain": torch.ones(2, 3)}, "2 rows")):
        with pytest.raises(ValueError, match=rf"weights\['chain'\] must have one row for each of 3 layers, got {got}"):
            net(x, weights)
    with pytest.raises(ValueError, match=r"path\[1\]=3: expected 0 to 2"):
        net(x, {"chain": torch.ones(3, 3)}, path={"chain": [0, 3, 0]})
    with pytest.raises(ValueError, match=r"path\[0\]=0: layer 0 does not have that choice"):
        supernet(allowed=ALLOWED)(x, {"chain": torch.ones(3, 3).double()}, path={"chain": [0, 0, 1]})
