"""The supernet of NAS-Bench-1Shot1 and the networks of NAS-Bench-101 against transcriptions of their definitions."""

import pytest
import torch
from torch.nn import functional as F

from fastnas.genotype import OneShotGenotype
from fastnas.nn import NASBENCH1SHOT1_PRIMITIVES, NASBench101Network, OneShotSupernet
from fastnas.nn.nasbench1shot1 import vertex_channels
from fastnas.nn.operations import OPS

POOL, CONV3, CONV1 = NASBENCH1SHOT1_PRIMITIVES


class Reference:
    """Functions of a state dict."""

    def __init__(self, net):
        self.state = {name: t.detach().clone() for name, t in net.state_dict().items()}
        self.training = net.training

    def norm(self, name, x):
        affine = [self.state.get(f"{name}.{what}") for what in ("weight", "bias")]
        stats = [self.state[f"{name}.running_{what}"] for what in ("mean", "var")]
        return F.batch_norm(x, *([None, None] if self.training else stats), *affine, self.training, 0.1, 1e-5)

    def conv(self, name, x):
        weight = self.state[f"{name}.op.0.weight"]
        return self.norm(f"{name}.op.1", F.conv2d(x, weight, padding=weight.shape[-1] // 2)).relu()

    def op(self, op, name, x):
        return F.max_pool2d(x, 3, 1, 1) if op == POOL else self.conv(name, x)

    def supernet_cell(self, name, x, weights, steps):
        nodes = []
        for i in range(1, steps + 1):
            read = [self.conv(f"{name}._input_projections.{i - 1}", x), *nodes]
            if f"inputs-{i}" in weights:
                read = [weights[f"inputs-{i}"][0, j] * y for j, y in enumerate(read)]
            block = f"{name}._choice_blocks.{i - 1}._ops"
            y = sum(read)
            nodes.append(
                sum(
                    w * self.op(op, f"{block}.{o}", y)
                    for o, (op, w) in enumerate(zip(NASBENCH1SHOT1_PRIMITIVES, weights["ops"][i - 1], strict=True))
                )
            )
        nodes = [self.conv(f"{name}._input_projections.{steps}", x), *nodes]
        return torch.cat([weights["output"][0, j] * y for j, y in enumerate(nodes)], 1)

    def supernet(self, x, weights, layers, steps):
        x = self.conv("stem", x)
        for i in range(layers):
            if i in (layers // 3, 2 * layers // 3):
                x = F.max_pool2d(x, 2, 2, padding=1)
            x = self.supernet_cell(f"cells.{i}", x, weights, steps)
        x = self.norm("postprocess.op.2", F.conv2d(x.relu(), self.state["postprocess.op.1.weight"]))
        return F.linear(x.mean((2, 3)), self.state["classifier.weight"], self.state["classifier.bias"])

    def network(self, x, genotype, widths):
        """A cell by its definition: what is read of the input is a projection, all else is cut to size."""
        x = self.conv("stem", x)
        for i, C in enumerate(widths):
            if i:
                x = F.max_pool2d(x, 2, 2)
            nodes, name = {}, f"cells.{i}"
            for n, op in enumerate(genotype.ops):
                read = [nodes[j][:, : C[n]] for j in genotype.inputs[n] if j]
                if 0 in genotype.inputs[n]:
                    read.append(self.conv(f"{name}.projections.{n}", x))
                nodes[n + 1] = self.op(op, f"{name}.ops.{n}", sum(read))
                assert nodes[n + 1].shape[1] == C[n]
            ends = [nodes[j] for j in genotype.inputs[-1] if j]
            y = torch.cat(ends, 1) if ends else 0
            if 0 in genotype.inputs[-1]:
                y = y + self.conv(f"{name}.projections.{len(genotype.ops)}", x)
            x = y
        return F.linear(x.mean((2, 3)), self.state["classifier.weight"], self.state["classifier.bias"])


def randomise(net):
    """Affine parameters and statistics that are not the neutral ones."""
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                torch.nn.init.normal_(m.weight)
                torch.nn.init.normal_(m.bias)
    return net


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_supernet_equals_the_definition(training):
    torch.manual_seed(0)
    net = randomise(OneShotSupernet([False, True, True, True], 4, 3, 5, 2)).double().train(training)
    draw = {"dtype": torch.float64}
    shapes = {"ops": (3, 3), "inputs-2": (1, 2), "inputs-3": (1, 3), "output": (1, 4)}
    weights = {name: torch.rand(shape, **draw) for name, shape in shapes.items()}
    x = torch.randn(3, 2, 10, 12, **draw)
    expected = Reference(net).supernet(x, weights, 3, 3)
    torch.testing.assert_close(net(x, weights), expected, rtol=1e-9, atol=1e-9)


def test_supernet_gradients_reach_every_table():
    torch.manual_seed(0)
    net = OneShotSupernet([False, True, True], 4, 2, 5)
    shapes = {"ops": (2, 3), "inputs-2": (1, 2), "output": (1, 3)}
    alphas = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    net(torch.randn(4, 3, 8, 8), {k: v.softmax(-1) for k, v in alphas.items()}).square().sum().backward()
    assert all(alpha.grad.abs().sum() > 0 for alpha in alphas.values())


def test_published_supernet():
    with torch.device("meta"):
        net = OneShotSupernet([False, True, True, True, True])
    assert [cell._choice_blocks[0]._ops[1].op[0].out_channels for cell in net.cells] == [16] * 3 + [32] * 3 + [64] * 3
    assert net.postprocess.op[1].in_channels == 5 * 64
    assert {m.momentum for m in net.cells.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.997}
    # by arithmetic: 5 projections, and per node a 3x3 and a 1x1 convolution; norms have two parameters a channel
    total = 27 * 16 + 32
    C_in = 16
    for C in [16] * 3 + [32] * 3 + [64] * 3:
        total += 5 * (C_in * C + 2 * C) + 4 * (10 * C * C + 4 * C)
        C_in = 5 * C
    total += 5 * 64 * 64 + 64 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == total


def test_between():
    torch.manual_seed(0)
    net = OneShotSupernet([False, True], 4, 3, 5, 1).eval()
    weights = {"ops": torch.rand(1, 3), "output": torch.rand(1, 2)}
    seen = []

    def between(states):
        seen.append(tuple(states[0].shape[1:]))
        return (2 * states[0],)

    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(net(x, weights, between=between), net(x, weights))
    assert seen == [(8, 8, 8), (16, 5, 5), (32, 3, 3)]
    assert torch.equal(net(x, weights, between=lambda states: states), net(x, weights))


def test_supernet_errors():
    net = OneShotSupernet([False, True], 4, 3, 5, 1)
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"weights\['output'\] must have shape \(1, 2\), got nothing"):
        net(x, {"ops": torch.rand(1, 3)})
    with pytest.raises(ValueError, match=r"weights\['ops'\] must have shape \(1, 3\), got \(3, 1\)"):
        net(x, {"ops": torch.rand(3, 1), "output": torch.rand(1, 2)})
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        OneShotSupernet([False, True], 0)
    with pytest.raises(ValueError, match=r"primitives: \['conv9x9'\] not known"):
        OneShotSupernet([False, True], primitives=["conv9x9"])
    with pytest.raises(ValueError, match="conv3x3-bn-relu with stride 2"):
        OPS["conv3x3-bn-relu"](4, 2, True)


def cell(labels, rows):
    return OneShotGenotype.from_table(["input", *labels, "output"], [[int(c) for c in row] for row in rows.split()])


CELLS = {
    "inception": cell(  # the example of the benchmark's README
        [CONV1, CONV3, CONV3, CONV3, POOL], "0111010 0000001 0000001 0000100 0000001 0000001 0000000"
    ),
    "resnet": cell([CONV3, CONV3], "0101 0010 0001 0000"),
    "uneven": OneShotGenotype((CONV3, POOL, CONV1, CONV3), ((0,), (1,), (0, 1, 2), (0, 3), (1, 2, 4))),
    "projection": OneShotGenotype((), ((0,),)),
    "loose end": OneShotGenotype((CONV3, POOL), ((0,), (0, 1), (1,))),
}


# channels of the nodes where the output has 8, 16, 32
WIDTHS = {
    "inception": [(2,) * 5, (4,) * 5, (8,) * 5],
    "resnet": [(8, 8), (16, 16), (32, 32)],
    "uneven": [(3, 3, 2, 2), (6, 5, 5, 5), (11, 11, 10, 10)],
    "projection": [(), (), ()],
    "loose end": [(8,), (16,), (32,)],
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CELLS)
def test_network_equals_the_definition(name, training):
    torch.manual_seed(0)
    net = randomise(NASBench101Network(CELLS[name], 8, 3, 5, 2)).double().train(training)
    x = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    expected = Reference(net).network(x, CELLS[name].pruned(), WIDTHS[name])
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_published_number_of_parameters():
    with torch.device("meta"):
        net = NASBench101Network(CELLS["inception"])
    assert sum(p.numel() for p in net.parameters()) == 2_694_282  # the benchmark's entry for its README's example
    assert {m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.003}


@pytest.mark.parametrize(
    ("rows", "channels", "expected"),
    [
        ("0100 0010 0001 0000", 16, (16, 16, 16)),
        ("0110 0001 0001 0000", 15, (8, 7, 15)),
        ("01110 00001 00001 00001 00000", 8, (3, 3, 2, 8)),
        ("01000 00110 00001 00001 00000", 9, (5, 5, 4, 9)),  # as many as the widest that reads it
        ("01010 00101 00010 00001 00000", 15, (8, 7, 7, 15)),
    ],
)
def test_vertex_channels(rows, channels, expected):
    labels = [CONV1] * (len(rows.split()) - 2)
    assert vertex_channels(cell(labels, rows), channels) == expected


def test_network_errors():
    with pytest.raises(ValueError, match="reads 3 nodes: 2 channels are too few"):
        NASBench101Network(CELLS["uneven"], 2)
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        NASBench101Network(CELLS["resnet"], layers=0)
    with pytest.raises(ValueError, match=r"ops\[0\] is the unknown op 'conv9x9'"):
        NASBench101Network(OneShotGenotype(("conv9x9",), ((0,), (1,))))
