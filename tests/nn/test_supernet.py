"""The whole supernet against an independent transcription of the DARTS definition."""

from copy import deepcopy

import pytest
import torch
from darts_reference import Reference, state_of
from torch.nn import functional as F

import fastnas
from fastnas.nn import Cell, Supernet

CASES = {
    # channels, layers, image (C, H, W), N, k, edge weights
    "digits": (4, 3, (1, 8, 8), 3, 1, False),
    "wide": (8, 5, (3, 12, 20), 2, 1, False),
    "two reductions only": (4, 2, (3, 8, 12), 3, 1, False),
    "one cell": (4, 1, (2, 6, 10), 3, 1, False),
    "partial": (8, 3, (1, 8, 8), 3, 4, True),
    "partial, one channel each": (4, 3, (3, 12, 4), 3, 4, False),
    "partial, wide": (16, 5, (3, 12, 20), 2, 4, True),
    "float32": (4, 3, (3, 8, 8), 8, 1, False),
    "partial, float32": (8, 3, (3, 8, 8), 8, 4, True),
}


class Case:
    def __init__(self, name, seed=0):
        self.channels, self.layers, image, N, self.k, edges = CASES[name]
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.net = Supernet(self.channels, self.layers, 7, image[0], k=self.k).double()
        draw = {"generator": generator, "dtype": torch.float64}
        self.x = torch.randn(N, *image, **draw)
        self.target = torch.randint(7, (N,), generator=generator)
        self.alphas = {"normal": torch.randn(14, 8, **draw), "reduce": torch.randn(14, 8, **draw)}
        self.betas = {"normal": torch.rand(14, **draw), "reduce": torch.rand(14, **draw)} if edges else None

    def settle(self):
        """Sets the running statistics to those of the batch: with the initial ones, signals die out layer by layer."""
        norms = [m for m in self.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self.net(self.x, {k: v.softmax(-1) for k, v in self.alphas.items()}, self.betas)
        for norm in norms:
            norm.momentum = 0.1

    def run(self, dtype, forward, parameters, buffers):
        """Returns logits, gradients and running statistics of ``forward(x, weights, edge_weights)``."""
        leaves = {f"alphas {k}": v.to(dtype, copy=True).requires_grad_() for k, v in self.alphas.items()}
        weights = {k: leaves[f"alphas {k}"].softmax(-1) for k in self.alphas}
        edges = None
        if self.betas is not None:
            edges = {k: v.to(dtype, copy=True).requires_grad_() for k, v in self.betas.items()}
            leaves |= {f"betas {k}": v for k, v in edges.items()}
        leaves |= parameters
        logits = forward(self.x.to(dtype), weights, edges)
        loss = F.cross_entropy(logits, self.target)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {"logits": logits.detach(), **dict(zip(leaves, gradients, strict=True)), **buffers()}

    def fastnas(self, dtype, training=True):
        net = deepcopy(self.net).to(dtype).train(training)
        return self.run(dtype, net, dict(net.named_parameters()), lambda: dict(net.named_buffers()))

    def reference(self, dtype, training=True, memory_format=torch.contiguous_format):
        state = state_of(self.net, dtype)
        reference = Reference(state, training=training, k=self.k, memory_format=memory_format)
        parameters = {k: v for k, v in state.items() if v.requires_grad}
        return self.run(
            dtype,
            lambda x, weights, edges: reference.network(x, weights, self.layers, edges),
            parameters,
            lambda: {k: v for k, v in state.items() if not v.requires_grad},
        )


def distance(a, b):
    return float(torch.linalg.vector_norm((a.double() - b.double()).flatten()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_float64(name, training):
    case = Case(name)
    if not training:
        case.settle()
    expected, got = case.reference(torch.float64, training), case.fastnas(torch.float64, training)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].shape == value.shape
        assert distance(got[key], value) <= 1e-9 * max(1e-6, float(value.double().norm())), key
    assert any(float(expected[key].norm()) > 1e-3 for key in ("alphas normal", "alphas reduce"))


@pytest.mark.parametrize("name", ["float32", "partial, float32"])
def test_float32_error_is_at_most_twice_that_of_eager(name):
    # A rounding error is luck for a tensor of a few elements, so errors are summed over networks and over orders of the
    # batch, which change the rounding and nothing else. Eager's own is that of its less accurate memory format.
    errors, norms = {}, {}
    for seed in range(2):
        exact = Case(name, seed).reference(torch.float64)
        for rotation in range(3):
            case = Case(name, seed)
            case.x, case.target = case.x.roll(rotation, 0), case.target.roll(rotation, 0)
            expected = exact | {"logits": exact["logits"].roll(rotation, 0)}
            sides = [
                case.fastnas(torch.float32),
                case.reference(torch.float32),
                case.reference(torch.float32, memory_format=torch.channels_last),
            ]
            for key, value in expected.items():
                squares = torch.tensor([distance(side[key], value) ** 2 for side in sides])
                errors[key] = errors.get(key, 0.0) + squares
                norms[key] = norms.get(key, 0.0) + float(value.double().norm()) ** 2
    for key in errors:
        ours, *eager = errors[key].sqrt().tolist()
        unit = torch.finfo(torch.float32).eps * norms[key] ** 0.5
        assert ours <= 2 * max(*eager, unit), key


def test_training_learns_and_statistics_move():
    case = Case("digits")
    before = deepcopy(case.net.state_dict())
    after = case.fastnas(torch.float64)
    assert int(after["stem.1.num_batches_tracked"]) == 1
    assert not torch.equal(
        before["cells.0._ops.0._ops.4.op.3.running_mean"], after["cells.0._ops.0._ops.4.op.3.running_mean"]
    )


def test_same_bits_again():
    case = Case("digits")
    first, second = case.fastnas(torch.float32), case.fastnas(torch.float32)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_alphas_are_no_part_of_the_module():
    net = Supernet(4, 3, 10, 1)
    assert not [name for name in net.state_dict() if "alpha" in name or "beta" in name]


def test_mixed_ops_in_the_order_of_cells_and_edges():
    net = Supernet(4, 3, 5, 1)
    expected = [
        (kind, e, cell._ops[e])
        for kind, cell in zip(["normal", "reduce", "reduce"], net.cells, strict=True)
        for e in range(14)
    ]
    assert list(net.mixed_ops()) == expected


def test_other_nodes_and_primitives():
    primitives = ("skip_connect", "max_pool_3x3", "sep_conv_3x3")
    torch.manual_seed(0)
    net = Supernet(4, 3, 5, 2, primitives=primitives, steps=3, multiplier=2, stem_multiplier=2).double()
    state = state_of(net, torch.float64)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    weights = {k: torch.randn(9, 3, dtype=torch.float64).softmax(-1) for k in ("normal", "reduce")}
    expected = Reference(state, primitives=primitives).network(x, weights, 3, steps=3, multiplier=2)
    assert net.stem[0].weight.shape == (8, 2, 3, 3)
    torch.testing.assert_close(net(x, weights), expected.detach(), rtol=1e-9, atol=1e-12)


def test_cell_takes_rows():
    torch.manual_seed(0)
    cell = Cell(2, 2, 4, 4, 4, False, False).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    weights = torch.rand(5, 8, dtype=torch.float64)
    assert torch.equal(cell(x, x, list(weights)), cell(x, x, weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"multiplier": 5}, "multiplier=5 must be from 1 to steps=4"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Supernet(**{"channels": 4, "layers": 3, **arguments})


def test_bad_weights():
    net = Supernet(4, 3, 10, 1)
    x, good = torch.randn(2, 1, 8, 8), torch.rand(14, 8)
    with pytest.raises(ValueError, match=r"weights\['reduce'\] must have one row for each of 14 edges, got nothing"):
        net(x, {"normal": good})
    with pytest.raises(ValueError, match=r"weights\['normal'\] must have one row for each of 14 edges, got 13 rows"):
        net(x, {"normal": good[:13], "reduce": good})
    with pytest.raises(ValueError, match=r"edge_weights\['normal'\] must have one row"):
        net(x, {"normal": good, "reduce": good}, {"normal": torch.rand(3), "reduce": torch.rand(14)})
    with pytest.raises(ValueError, match="must be even"):
        net(torch.randn(2, 1, 10, 10), {"normal": good, "reduce": good})


def test_second_derivatives_in_the_block():
    case = Case("digits")
    alphas = {k: v.requires_grad_() for k, v in case.alphas.items()}
    with fastnas.twice_differentiable():
        loss = F.cross_entropy(case.net(case.x, {k: v.softmax(-1) for k, v in alphas.items()}), case.target)
        (first,) = torch.autograd.grad(loss, alphas["normal"], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), alphas["normal"])
    assert second.isfinite().all()
    assert second.any()


def test_imagenet_stem():
    """Three convolutions of stride 2; the first cell reads as many channels from both stems."""
    torch.manual_seed(0)
    net = Supernet(4, 3, 5, 2, stem="imagenet").double()
    x = torch.randn(2, 2, 32, 64, dtype=torch.float64)
    weights = {k: torch.rand(14, 8, dtype=torch.float64).softmax(-1) for k in ("normal", "reduce")}
    state = state_of(net, torch.float64)
    reference = Reference(state)

    def conv_bn(conv, norm, x):
        return reference.batch_norm(norm, F.conv2d(x, state[f"{conv}.weight"], None, 2, 1))

    s0 = conv_bn("stem0.3", "stem0.4", conv_bn("stem0.0", "stem0.1", x).relu())
    s1 = conv_bn("stem1.1", "stem1.2", s0.relu())
    assert s0.shape == (2, 4, 8, 16)
    assert s1.shape == (2, 4, 4, 8)
    for layer, (kind, reduction_prev) in enumerate([("normal", True), ("reduce", False), ("reduce", True)]):
        y = reference.cell(f"cells.{layer}", s0, s1, weights[kind], None, kind == "reduce", reduction_prev, 4, 4)
        s0, s1 = s1, y
    expected = F.linear(s1.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(net(x, weights), expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="height 3 and width 4, both must be even"):
        net(x[:, :, :24, :32], weights)


def test_networks_pickled_before_there_were_stems():
    net = Supernet(4, 2, 5, 1).eval()
    x, weights = torch.randn(2, 1, 8, 8), {k: torch.full((14, 8), 0.125) for k in ("normal", "reduce")}
    expected = net(x, weights)
    del net.__dict__["_stem"]
    assert torch.equal(deepcopy(net)(x, weights), expected)


def test_imagenet_sizes():
    net = Supernet(4, 4, 5, stem="imagenet").eval()
    sizes = []
    for cell in net.cells:
        cell.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[2]))
    weights = {k: torch.full((14, 8), 0.125) for k in ("normal", "reduce")}
    with torch.no_grad():
        net(torch.zeros(1, 3, 224, 224), weights)
    assert sizes == [28, 14, 7, 7]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_between_replaces_what_the_next_cell_reads(stem):
    torch.manual_seed(0)
    net = Supernet(4, 3, 5, 1, stem=stem).double().eval()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    weights = {k: torch.rand(14, 8, dtype=torch.float64) for k in ("normal", "reduce")}
    seen = []

    def between(states):
        seen.append(len(states))
        return states[0] * 3, states[1] * 2

    outputs = net(x, weights, between=between)
    s0 = s1 = net.stem(x) if stem == "cifar" else net.stem0(x)
    if stem == "imagenet":
        s1 = net.stem1(s0)
    for cell in net.cells:
        y = cell(s0, s1, weights["reduce" if cell.reduction else "normal"])
        s0, s1 = 3 * s1, 2 * y
    torch.testing.assert_close(outputs, net.classifier(s1.mean((2, 3))))
    assert seen == [2, 2, 2]
    assert torch.equal(net(x, weights, between=lambda states: states), net(x, weights))
