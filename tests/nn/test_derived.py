"""The network of a genotype against a transcription of DARTS' definition that shares no code with fastnas."""

import pytest
import torch
from darts_reference import Reference, state_of
from torch.nn import functional as F

from fastnas.compat.darts import DARTS_V2, AmoebaNet
from fastnas.genotype import Genotype
from fastnas.nn import Network
from fastnas.nn.derived import Logits
from fastnas.nn.operations import Identity
from fastnas.spaces import get_space

PC_DARTS = Genotype(  # the cell that PC-DARTS reports for CIFAR-10 (arXiv:1907.05737, figure 3)
    normal=[
        *[("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 0), ("dil_conv_3x3", 1)],
        *[("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 1)],
    ],
    normal_concat=range(2, 6),
    reduce=[
        *[("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_5x5", 2)],
        *[("sep_conv_3x3", 0), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2)],
    ],
    reduce_concat=range(2, 6),
)


class Derived(Reference):
    """The final networks; pools have no norm there."""

    def candidate(self, primitive, name, x, stride):
        if primitive == "max_pool_3x3":
            return F.max_pool2d(x, 3, stride, 1)
        if primitive == "avg_pool_3x3":
            return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        return super().candidate(primitive, name, x, stride)

    def derived_cell(self, name, s0, s1, genotype, reduction, reduction_prev):
        first = self.factorized_reduce if reduction_prev else self.relu_conv_bn
        states = [first(f"{name}.preprocess0", s0), self.relu_conv_bn(f"{name}.preprocess1", s1)]
        edges, concat = (genotype[2], genotype[3]) if reduction else (genotype[0], genotype[1])
        for n in range(len(edges) // 2):
            pair = [
                self.candidate(op, f"{name}._ops.{2 * n + e}", states[j], 2 if reduction and j < 2 else 1)
                for e, (op, j) in enumerate(edges[2 * n : 2 * n + 2])
            ]
            states.append(pair[0] + pair[1])
        return torch.cat([states[i] for i in concat], dim=1)

    def conv_bn(self, conv, norm, x, stride):
        return self.batch_norm(norm, F.conv2d(x, self.state[f"{conv}.weight"], None, stride, 1))

    def logits(self, x, genotype, layers, imagenet=False):
        if imagenet:
            s0 = self.conv_bn("stem0.3", "stem0.4", self.conv_bn("stem0.0", "stem0.1", x, 2).relu(), 2)
            s1 = self.conv_bn("stem1.1", "stem1.2", s0.relu(), 2)
        else:
            s0 = s1 = self.conv_bn("stem.0", "stem.1", x, 1)
        reduction_prev = imagenet
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            y = self.derived_cell(f"cells.{layer}", s0, s1, genotype, reduction, reduction_prev)
            s0, s1, reduction_prev = s1, y, reduction
        return F.linear(s1.mean(dim=(2, 3)), self.state["classifier.weight"], self.state["classifier.bias"])


SMALL = Genotype(
    [("skip_connect", 0), ("sep_conv_3x3", 1), ("dil_conv_5x5", 2), ("avg_pool_3x3", 0)],
    [3, 2],
    [("skip_connect", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 2), ("none", 1)],
    [3],
)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("genotype", [SMALL, DARTS_V2], ids=["small", "darts"])
def test_equals_the_definition_in_float64(genotype, stem, training):
    torch.manual_seed(0)
    net = Network(genotype, 4, 3, 5, 2, stem=stem).double().train(training)
    for p in net.parameters():  # so that affine parameters count
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(3, 2, *((8, 12) if stem == "cifar" else (64, 32)), dtype=torch.float64)
    state = state_of(net, torch.float64)
    theirs = Derived(state, training).logits(x, genotype, 3, stem == "imagenet")
    ours = net(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    target = torch.arange(3)
    F.cross_entropy(ours, target).backward()
    F.cross_entropy(theirs, target).backward()
    for name, p in net.named_parameters():
        if state[name].grad is None:  # what no output reads
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-6, atol=1e-8)
    for name, t in net.named_buffers():
        torch.testing.assert_close(t, state[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("genotype", "arguments", "millions"),
    [
        (DARTS_V2, (36, 20, 10), 3.3),  # arXiv:1806.09055, table 1
        (PC_DARTS, (36, 20, 10), 3.6),  # arXiv:1907.05737, table 1
        (AmoebaNet, (36, 20, 10), 3.2),  # arXiv:1806.09055, table 1: AmoebaNet-A
    ],
    ids=["darts", "pc-darts", "amoebanet"],
)
def test_published_number_of_parameters(genotype, arguments, millions):
    with torch.device("meta"):
        net = Network(genotype, *arguments)
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) <= 0.1
    if genotype is not AmoebaNet:
        assert round(sum(p.numel() for p in net.parameters()) / 1e6 - 0.005, 1) == millions


def test_published_imagenet_network():
    """4.7 M parameters (arXiv:1806.09055, table 3); its 574 M multiply-adds count more than these modules."""
    net = Network(DARTS_V2, 48, 14, 1000, stem="imagenet").eval()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 4.7
    counts, sizes = [], []

    def count(module, inputs, output):
        fan_in = module.weight.numel() // module.weight.shape[0]
        counts.append(output.numel() * fan_in)

    for m in net.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
            m.register_forward_hook(count)
    for cell in net.cells:
        cell.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[2]))
    with torch.no_grad():
        net(torch.zeros(1, 3, 224, 224))
    assert round(sum(counts) / 1e6) == 530
    assert sizes == [28] * 4 + [14] * 5 + [7] * 5


def test_auxiliary_head():
    torch.manual_seed(0)
    net = Network(SMALL, 2, 3, 5, auxiliary=True)
    x = torch.randn(4, 3, 32, 32)
    # by hand: 2 * layers // 3 = 2 is the last cell, a reduction of one state: 8 channels
    assert net.auxiliary_head.features[2].weight.shape == (128, 8, 1, 1)
    outputs = net(x)
    assert isinstance(outputs, Logits)
    assert outputs.logits.shape == outputs.auxiliary.shape == (4, 5)
    assert net.eval()(x).shape == (4, 5)
    plain = Network(SMALL, 2, 3, 5)
    head = sum(p.numel() for p in net.auxiliary_head.parameters())
    assert head == 8 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 5 + 5
    assert sum(p.numel() for p in net.parameters()) == head + sum(p.numel() for p in plain.parameters())
    with pytest.raises(
        ValueError, match=r"the auxiliary head reads maps of \(8, 8\), got \(4, 4\): give images of 32x32"
    ):
        net.train()(x[:, :, :16, :16])


def test_auxiliary_head_reads_the_second_reduction():
    torch.manual_seed(0)
    net = Network(SMALL, 2, 6, 5, auxiliary=True)
    seen = {}
    net.cells[4].register_forward_hook(lambda _, inputs, output: seen.update(cell=output))
    net.auxiliary_head.register_forward_hook(lambda _, inputs, output: seen.update(head=inputs[0]))
    net(torch.randn(2, 3, 32, 32))
    assert seen["head"] is seen["cell"]
    z, head = seen["cell"].detach(), net.auxiliary_head
    y = F.avg_pool2d(z.relu(), 5, 3)
    y = F.batch_norm(F.conv2d(y, head.features[2].weight), None, None, torch.ones(128), torch.zeros(128), True).relu()
    y = F.batch_norm(F.conv2d(y, head.features[5].weight), None, None, torch.ones(768), torch.zeros(768), True).relu()
    torch.testing.assert_close(head(z), F.linear(y[:, :, 0, 0], head.classifier.weight, head.classifier.bias))


def test_imagenet_auxiliary_head_has_one_norm():
    net = Network(SMALL, 2, 3, 5, auxiliary=True, stem="imagenet")
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.auxiliary_head.modules()) == 1
    assert net(torch.randn(2, 3, 224, 224)).auxiliary.shape == (2, 5)


def test_drop_path():
    """An image loses an edge that is not the identity with the probability given; what stays is scaled up."""
    torch.manual_seed(0)
    genotype = Genotype(
        [("skip_connect", 0), ("avg_pool_3x3", 1)], [2], [("avg_pool_3x3", 0), ("avg_pool_3x3", 1)], [2]
    )
    cell = Network(genotype, 2, 3, 5).cells[0]
    x = torch.randn(4000, 6, 4, 4)
    with torch.no_grad():
        states = cell.preprocess0(x), cell.preprocess1(x)
        y = cell(x, x, 0.25) - states[0]
        kept = F.avg_pool2d(states[1], 3, 1, 1, count_include_pad=False) / 0.75
    lost = y.abs().amax((1, 2, 3)) < 1e-5
    torch.testing.assert_close(y[~lost], kept[~lost], rtol=1e-4, atol=1e-5)
    assert abs(lost.double().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    with torch.no_grad():
        assert torch.equal(cell.eval()(x[:8], x[:8], 0.25), cell(x[:8], x[:8]))


def test_drop_path_is_set_on_the_network():
    torch.manual_seed(0)
    net = Network(DARTS_V2, 4, 3, 5, drop_path=0.5)
    x = torch.randn(8, 3, 8, 8)
    outputs = [net(x), net(x)]
    assert not torch.equal(*outputs)
    net.drop_path = 0.0
    assert torch.equal(net(x), net(x))
    assert any(isinstance(op, Identity) for op in net.cells[0]._ops)


def test_state_dict_names_are_the_published_ones():
    names = set(Network(DARTS_V2, 4, 3, auxiliary=True).state_dict())
    assert {
        "stem.0.weight",
        "cells.0.preprocess0.op.1.weight",
        "cells.2.preprocess0.conv_1.weight",
        "cells.0._ops.0.op.1.weight",
        "cells.0._ops.0.op.7.bias",
        "auxiliary_head.features.6.weight",
        "classifier.bias",
    } <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"stem": "mnist"}, "stem='mnist': expected cifar or imagenet"),
        ({"stem": "imagenet", "channels": 3}, "channels=3 must be even"),
        ({"drop_path": 1.0}, "drop_path=1.0 must be a probability below 1"),
        ({"genotype": DARTS_V2._replace(normal=[("conv_9x9", 0), ("none", 1)])}, "unknown op 'conv_9x9'"),
        ({"genotype": DARTS_V2._replace(normal_concat=[9])}, "normal_concat must hold different states"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Network(**{"genotype": DARTS_V2, "channels": 4, "layers": 2, **arguments})


def test_the_space_refuses_what_is_not_of_it():
    space = get_space("darts")
    assert isinstance(space.network(DARTS_V2, 4, 2, stem="imagenet", drop_path=0.1), Network)
    with pytest.raises(ValueError, match="genotype: normal has 2 nodes, the space 'darts' has 4"):
        space.network(SMALL._replace(reduce=SMALL.normal))
    with pytest.raises(ValueError, match="unknown op 'sep_conv_7x7'"):
        space.network(AmoebaNet)
    with pytest.raises(ValueError, match="genotype is none of the space 'darts'"):
        space.network(get_space("nb201").sample())
