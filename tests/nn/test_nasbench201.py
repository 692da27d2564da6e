"""The NAS-Bench-201 supernet against a transcription of its definition that shares no code with fastnas."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

import fastnas
from fastnas.genotype import NASBench201Genotype
from fastnas.nn import NASBENCH201_PRIMITIVES, NASBench201Cell, NASBench201Network, NASBench201Supernet
from fastnas.nn.nasbench201 import ResidualReduction

EDGES = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]  # node, input


class Reference:
    """The network as a function of a state dict; updates the running statistics in it."""

    def __init__(self, state, training=True, k=1, betas=None):
        self.state, self.training, self.k, self.betas = state, training, k, betas

    def norm(self, name, x):
        stats = [self.state[f"{name}.running_{what}"] for what in ("mean", "var")]
        affine = [self.state.get(f"{name}.{what}") for what in ("weight", "bias")]
        if self.training:
            self.state[f"{name}.num_batches_tracked"] += 1
        return F.batch_norm(x, *stats, *affine, self.training, 0.1, 1e-5)

    def relu_conv_norm(self, name, x, stride=1):
        weight = self.state[f"{name}.op.1.weight"]
        return self.norm(f"{name}.op.2", F.conv2d(F.relu(x), weight, None, stride, weight.shape[-1] // 2))

    def edge(self, name, x, weights):
        return (
            weights[0] * torch.zeros_like(x)
            + weights[1] * x
            + weights[2] * self.relu_conv_norm(f"{name}._ops.2", x)
            + weights[3] * self.relu_conv_norm(f"{name}._ops.3", x)
            + weights[4] * F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        )

    def partial_edge(self, name, x, weights):
        """The first C/k channels through the candidates; of C = k g, channel c is then what (c % k) g + c // k was."""
        C = x.shape[1]
        y = torch.cat([self.edge(name, x[:, : C // self.k], weights), x[:, C // self.k :]], 1)
        return torch.stack([y[:, (c % self.k) * (C // self.k) + c // self.k] for c in range(C)], 1)

    def cell(self, name, x, weights):
        nodes = [x, 0, 0, 0]
        for e, (i, j) in enumerate(EDGES):
            factor = 1 if self.betas is None else self.betas[e]
            nodes[i] = nodes[i] + factor * self.partial_edge(f"{name}_ops.{e}", nodes[j], weights[e])
        return nodes[3]

    def reduction(self, name, x):
        y = self.relu_conv_norm(f"{name}.conv_b", self.relu_conv_norm(f"{name}.conv_a", x, 2))
        return y + F.conv2d(F.avg_pool2d(x, 2), self.state[f"{name}.downsample.1.weight"])

    def network(self, x, weights, cells):
        x = self.norm("stem.1", F.conv2d(x, self.state["stem.0.weight"], padding=1))
        layer = 0
        for stage in range(3):
            if stage:
                x = self.reduction(f"cells.{layer}", x)
                layer += 1
            for _ in range(cells):
                x = self.cell(f"cells.{layer}.", x, weights)
                layer += 1
        x = F.relu(self.norm("lastact.0", x)).mean((2, 3))
        return F.linear(x, self.state["classifier.weight"], self.state["classifier.bias"])


def outcome(forward, x, alphas, parameters, buffers):
    """Returns the logits, the gradients of a loss by alphas and parameters, and the buffers after it."""
    logits = forward(x, alphas.softmax(-1))
    loss = F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1])
    leaves = {"alphas": alphas, **parameters}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"logits": logits.detach(), **dict(zip(leaves, gradients, strict=True)), **buffers}


def both(net, shape, training, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    alphas = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    net = deepcopy(net).to(dtype).train(training)
    state = {name: t.detach().clone() for name, t in net.state_dict().items()}
    names = dict(net.named_parameters()).keys()
    for name in names:
        state[name].requires_grad_()
    ours = outcome(net, x, alphas, dict(net.named_parameters()), dict(net.named_buffers()))
    cells = sum(isinstance(m, NASBench201Cell) for m in net.modules()) // 3
    theirs = outcome(
        lambda x, weights: Reference(state, training).network(x, weights, cells),
        *(x, alphas, {name: state[name] for name in names}),
        {name: t for name, t in state.items() if name not in names},
    )
    return ours, theirs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels", "cells", "shape"), [(4, 1, (3, 3, 8, 8)), (6, 2, (2, 1, 12, 20))])
def test_equals_the_definition_in_float64(channels, cells, shape, training):
    torch.manual_seed(0)
    net = NASBench201Supernet(channels, cells, 7, shape[1])
    ours, theirs = both(net, shape, training)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        worst = float((ours[name] - expected).double().norm())
        assert worst <= 1e-9 * max(1e-6, float(expected.double().norm())), name
    assert float(theirs["alphas"].norm()) > 1e-4
    moved = not torch.equal(ours["cells.0._ops.0._ops.3.op.2.running_mean"], torch.zeros(channels))
    assert moved is training


def test_float32_is_close_to_the_definition():
    torch.manual_seed(0)
    net = NASBench201Supernet(8, 1, 10)
    ours, _ = both(net, (4, 3, 8, 8), True, torch.float32)
    _, exact = both(net, (4, 3, 8, 8), True)
    for name, expected in exact.items():
        worst = float((ours[name].double() - expected.double()).norm())
        assert worst <= 1e-4 * max(1e-3, float(expected.double().norm())), name


def test_skeleton():
    net = NASBench201Supernet(16, 5)
    kinds = "".join("c" if isinstance(m, NASBench201Cell) else "r" for m in net.cells)
    assert kinds == "cccccrcccccrccccc"
    assert [m.conv_a.op[1].out_channels for m in net.cells if isinstance(m, ResidualReduction)] == [32, 64]
    assert net.classifier.in_features == 64
    in_cells = [m for cell in net.cells[:5] for m in cell.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(in_cells) == 5 * 6 * 2  # the two convolutions of each edge: the pool has none
    assert not any(m.affine for m in in_cells)
    assert net.cells[5].conv_a.op[2].affine
    assert NASBENCH201_PRIMITIVES == ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def test_one_edge_at_a_time():
    """Each row of the weights reaches the edge of its place in the published order."""
    torch.manual_seed(0)
    cell = NASBench201Cell(2).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for path in ([(3, 0)], [(1, 0), (3, 1)], [(2, 0), (3, 2)], [(1, 0), (2, 1), (3, 2)]):
        weights = torch.zeros(6, 5, dtype=torch.float64)
        for factor, edge in enumerate(path, 2):
            weights[EDGES.index(edge), 1] = factor  # skip_connect
        product = torch.arange(2, 2 + len(path)).prod()
        torch.testing.assert_close(cell(x, weights), product * x)


def test_other_nodes_and_primitives():
    torch.manual_seed(0)
    cell = NASBench201Cell(4, 3, primitives=["skip_connect", "nor_conv_1x1"]).double()
    x, weights = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    edges = [lambda t, e=e: weights[e, 0] * t + weights[e, 1] * cell._ops[e]._ops[1](t) for e in range(3)]
    torch.testing.assert_close(cell(x, weights), edges[1](x) + edges[2](edges[0](x)))
    assert torch.equal(cell(x, list(weights)), cell(x, weights))
    net = NASBench201Supernet(4, 1, 3, 1, nodes=3, primitives=["skip_connect", "nor_conv_1x1"])
    assert net(torch.randn(2, 1, 4, 4), weights.float()).shape == (2, 3)


def test_second_derivatives_in_the_block():
    torch.manual_seed(0)
    net = NASBench201Supernet(4, 1, 3, 1).double()
    x, alphas = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64).requires_grad_()
    with fastnas.twice_differentiable():
        loss = F.cross_entropy(net(x, alphas.softmax(-1)), torch.arange(3))
        (first,) = torch.autograd.grad(loss, alphas, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), alphas)
    assert second.isfinite().all()
    assert second.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"cells": 0}, "cells=0 must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"nodes": 1}, "nodes=1 must be at least 2"),
        ({"primitives": ["none", "nor_conv_9x9"]}, r"primitives: \['nor_conv_9x9'\] not known; choose from none"),
        ({"primitives": "none"}, "primitives: .* not known"),
        ({"k": 3}, "k=3 does not divide the C=4 channels: choose a k that does"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NASBench201Supernet(**{"channels": 4, "cells": 1, **arguments})


def test_bad_inputs():
    net = NASBench201Supernet(4, 1, 10, 1)
    with pytest.raises(ValueError, match="weights must have one row for each of 6 edges, got 5 rows"):
        net(torch.randn(2, 1, 8, 8), torch.rand(5, 5))
    with pytest.raises(ValueError, match="edge_weights must have one row for each of 6 edges, got 7 rows"):
        net(torch.randn(2, 1, 8, 8), torch.rand(6, 5), torch.rand(7))
    with pytest.raises(ValueError, match="edge_weights has no 'cell', only 'normal'"):
        net(torch.randn(2, 1, 8, 8), torch.rand(6, 5), {"normal": torch.rand(6)})
    with pytest.raises(ValueError, match="height 8 and width 10, both must be multiples of 4"):
        net(torch.randn(2, 1, 8, 10), torch.rand(6, 5))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["fused", "edge by edge", "emulated", "reference"])
@pytest.mark.parametrize(("k", "with_betas"), [(2, False), (3, True), (1, True)])
def test_partial_channels_and_edge_weights_equal_the_definition(k, with_betas, way, training, request):
    torch.manual_seed(0)
    if way == "emulated":
        request.getfixturevalue("emulated")
    net = NASBench201Supernet(6, 1, 5, 2, k=k).double().train(training)
    state = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in net.state_dict().items()}
    for name, _ in net.named_buffers():
        state[name] = state[name].detach()
    x = torch.randn(3, 2, 12, 8, dtype=torch.float64)
    weights = torch.rand(6, 5, dtype=torch.float64).requires_grad_()
    betas = torch.rand(6, dtype=torch.float64).requires_grad_() if with_betas else None
    if way == "edge by edge":
        for _, _, op in net.mixed_ops():
            op.register_forward_hook(lambda *_: None)
    with fastnas.use_backend(way if way in ("emulated", "reference") else "native"):
        logits = net(x, {"cell": weights}, None if betas is None else {"cell": betas})
        leaves = {"weights": weights, **({"betas": betas} if with_betas else {})}
        ours = torch.autograd.grad(logits.square().sum(), [*leaves.values(), *net.parameters()])
    expected = Reference(state, training, k, betas).network(x, weights, 1)
    parameters = [state[name] for name, _ in net.named_parameters()]
    theirs = torch.autograd.grad(expected.square().sum(), [*leaves.values(), *parameters])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    for name, t in net.named_buffers():
        torch.testing.assert_close(t, state[name], rtol=1e-9, atol=1e-9)
    assert all(g.any() for g in ours[: len(leaves)])


def test_partial_channels_keep_the_pool_without_a_norm():
    net = NASBench201Supernet(4, 1, 5, 2, k=2)
    for _, _, op in net.mixed_ops():
        assert isinstance(op._ops[4], torch.nn.AvgPool2d)
        assert op.k == 2
    assert net.state_dict().keys() == NASBench201Supernet(4, 1, 5, 2).state_dict().keys()
    assert net.cells[0]._ops[0]._ops[3].op[1].weight.shape == (2, 2, 3, 3)


def test_mixed_ops_in_the_order_of_cells_and_edges():
    net = NASBench201Supernet(4, 2, 5, 2)
    cells = [cell for cell in net.cells if isinstance(cell, NASBench201Cell)]
    assert list(net.mixed_ops()) == [("cell", e, cell._ops[e]) for cell in cells for e in range(6)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_final_network_equals_the_definition(training):
    """The network of a genotype is the supernet's definition with one candidate an edge, and affine batch norms."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        choice = torch.randint(5, (6,), generator=generator)
        genotype = NASBench201Genotype(tuple(NASBENCH201_PRIMITIVES[o] for o in choice))
        net = NASBench201Network(genotype, 4, 2, 7).double().train(training)
        for p in net.parameters():  # so that affine parameters count
            torch.nn.init.normal_(p, std=0.5, generator=generator)
        x = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
        reference = FinalReference({name: t.clone() for name, t in net.state_dict().items()}, training)
        expected = reference.final(x, genotype.ops, 2)
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
        for name, t in net.named_buffers():
            torch.testing.assert_close(t, reference.state[name], rtol=1e-9, atol=1e-9)


class FinalReference(Reference):
    def cell(self, name, x, ops):
        nodes = [x, *[torch.zeros_like(x)] * 3]
        for e, (i, j) in enumerate(EDGES):
            if ops[e] == "skip_connect":
                nodes[i] = nodes[i] + nodes[j]
            elif ops[e] == "avg_pool_3x3":
                nodes[i] = nodes[i] + F.avg_pool2d(nodes[j], 3, 1, 1, count_include_pad=False)
            elif ops[e] != "none":
                nodes[i] = nodes[i] + self.relu_conv_norm(f"{name}layers.{e}", nodes[j])
        return nodes[3]

    def final(self, x, ops, cells):
        return self.network(x, ops, cells)


def test_cells_without_a_way_through():
    genotype = NASBench201Genotype(("none",) * 6)
    net = NASBench201Network(genotype, 4, 1, 3).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x)[0], net(x)[1])
    # what follows a node without inputs is computed on zeros: a trained norm's bias counts
    genotype = NASBench201Genotype(("none", "none", "nor_conv_1x1", "none", "none", "skip_connect"))
    cell = NASBench201Network(genotype, 4, 1, 3).cells[0].eval()
    assert not cell(torch.randn(2, 4, 8, 8)).any()
    with torch.no_grad():
        cell.layers[2].op[2].bias.fill_(2.0)
    assert (cell(torch.randn(2, 4, 8, 8)) == 2.0).all()


def test_none_is_not_called_and_every_other_edge_is():
    genotype = NASBench201Genotype(("nor_conv_3x3", "none", "skip_connect", "avg_pool_3x3", "none", "none"))
    net = NASBench201Network(genotype, 4, 1, 3)
    called = []
    for e, layer in enumerate(net.cells[0].layers):
        layer.register_forward_hook(lambda *_, e=e: called.append(e))
    net(torch.randn(2, 3, 8, 8))
    assert called == [0, 2, 3]


def test_bad_final_networks():
    with pytest.raises(ValueError, match=r"ops\[0\] is the unknown op 'conv_9x9'"):
        NASBench201Network(NASBench201Genotype(("conv_9x9",)))
    genotype = NASBench201Genotype(("skip_connect",))
    with pytest.raises(ValueError, match="cells=0 must be at least 1"):
        NASBench201Network(genotype, 4, 0)
    with pytest.raises(ValueError, match="height 8 and width 10, both must be multiples of 4"):
        NASBench201Network(genotype, 4, 1)(torch.randn(2, 3, 8, 10))


def test_between_replaces_what_the_next_cell_reads():
    torch.manual_seed(0)
    net = NASBench201Supernet(4, 1, 5, 1).double().eval()
    x, weights = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    seen = []

    def between(states):
        seen.append(states)
        return tuple(state * 2 for state in states)

    outputs = net(x, weights, between=between)
    assert [[tuple(state.shape[1:]) for state in states] for states in seen] == [
        [(4, 8, 8)],
        [(8, 4, 4)],
        [(8, 4, 4)],
        [(16, 2, 2)],
        [(16, 2, 2)],
    ]
    state = net.stem(x)
    for cell in net.cells:
        state = 2 * (cell(state, weights) if isinstance(cell, NASBench201Cell) else cell(state))
    torch.testing.assert_close(outputs, net.classifier(net.lastact(state).mean((2, 3))))
    assert torch.equal(net(x, weights, between=lambda states: states), net(x, weights))
