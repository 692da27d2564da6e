from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from benchmarks import plain
from fastnas import use_backend
from fastnas.nn import NASBench201Cell, NASBench201Supernet, Supernet
from fastnas.saliency import Batch, get_saliency, get_score
from fastnas.saliency.linearised import linearised
from fastnas.saliency.synflow import flow, operation_flow
from fastnas.spaces import get_space

Tables = dict[str, Tensor]


def batch(size: int, channels: int = 3) -> Batch:
    return Batch(torch.zeros(1, channels, size, size), torch.zeros(1, dtype=torch.int64))


def darts(channels: int, layers: int) -> tuple[Supernet, plain.Supernet]:
    net, other = Supernet(channels, layers), plain.Supernet(channels, layers)
    other.load_state_dict(net.state_dict())
    return net, other


def nasbench201(channels: int, cells: int) -> tuple[NASBench201Supernet, plain.NASBench201Supernet]:
    net, other = NASBench201Supernet(channels, cells), plain.NASBench201Supernet(channels, cells)
    other.load_state_dict(net.state_dict())
    return net, other


def expected(other: nn.Module, alphas: Tables, size: int) -> tuple[Tensor, Tables]:
    """R and the shares by the definition, in float64."""
    tables: Mapping[str, Tensor] | Tensor = alphas.get("cell", alphas)
    r, scores = plain.SynFlow(other)(tables, torch.zeros(1, 3, size, size))
    return r, {t: s / r for t, s in zip(alphas, scores, strict=True)}


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize(
    ("space", "build", "sizes", "image"),
    [
        ("darts", darts, (4, 3), 8),
        ("darts", darts, (6, 4), 12),
        ("nb201", nasbench201, (4, 1), 8),
        ("nb201", nasbench201, (5, 2), 12),
        ("nb201", nasbench201, (16, 1), 4),
    ],
)
def test_the_definition(space: str, build, sizes: tuple[int, int], image: int, scale: float) -> None:
    torch.manual_seed(sum(sizes))
    net, other = build(*sizes)
    alphas = get_space(space).init_alphas(scale=scale)
    r, shares = expected(other, alphas, image)
    for backend in ("native", "reference"):
        with use_backend(backend), linearised(net):
            got = flow(net, alphas, torch.zeros(1, 3, image, image))
        assert float(got.log) == pytest.approx(float(r.log()), abs=1e-5)
        for t, s in shares.items():
            torch.testing.assert_close(got.shares[t], s, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "build", "sizes", "draws"), [("darts", darts, (4, 3), 100), ("nb201", nasbench201, (4, 1), 1000)]
)
def test_the_order_on_every_edge_is_that_of_float64(space: str, build, sizes: tuple[int, int], draws: int) -> None:
    """What is closer than 1e-6 may change places."""
    torch.manual_seed(0)
    net, other = build(*sizes)
    exact = plain.SynFlow(other)
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(1, 3, 4, 4)
    with linearised(net):
        for _ in range(draws):
            alphas = get_space(space).init_alphas(generator)
            got = flow(net, alphas, image).shares
            r, scores = exact(alphas.get("cell", alphas), image)
            for t, score in zip(alphas, scores, strict=True):
                true = score / r
                best = true.max(1).values
                chosen = true.gather(1, got[t].argmax(1, keepdim=True)).flatten()
                assert bool((chosen >= best * (1 - 1e-6)).all())
                # the whole order: a pair that changes places is a tie
                order = true.gather(1, got[t].argsort(1))
                assert bool((order[:, 1:] >= order[:, :-1] * (1 - 1e-6)).all())


def test_shares_of_the_output_node_add_up_to_one() -> None:
    """Euler: R of a one-cell network is linear in the weights on the edges into its output node."""

    class OneCell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.cell = NASBench201Cell(6)
            self.classifier = nn.Linear(6, 4)

        def forward(self, x: Tensor, weights: Mapping[str, Tensor], between=lambda states: states) -> Tensor:
            (x,) = between((self.cell(self.stem(x), weights["cell"]),))
            return self.classifier(x.mean((2, 3)))

    torch.manual_seed(2)
    alphas = get_space("nb201").init_alphas()
    shares = get_saliency("synflow")(OneCell(), alphas, batch(7))["cell"]
    assert float(shares[3:].sum()) == pytest.approx(1, abs=1e-6)
    assert float(shares[:, 0].abs().max()) == 0  # none
    # what enters node 1 leaves it, and no more than all goes through it
    assert 0 < float(shares[0].sum()) < 1


@pytest.mark.parametrize(("layers", "scale"), [(20, 1.0), (20, 1e-3), (20, 1e3)])
def test_twenty_cells_neither_overflow_nor_vanish(layers: int, scale: float) -> None:
    torch.manual_seed(3)
    net, other = darts(4, layers)
    alphas = get_space("darts").init_alphas(scale=scale)
    r, shares = expected(other, alphas, 8)
    with linearised(net):
        got = flow(net, alphas, torch.zeros(1, 3, 8, 8))
    assert float(got.log) == pytest.approx(float(r.log()), abs=1e-4)
    for t, s in shares.items():
        torch.testing.assert_close(got.shares[t], s, rtol=1e-5, atol=0)
    if scale != 1e-3:
        assert abs(float(r.log())) > math.log(3e38), "float32 alone would do"


def test_a_deep_nasbench201_neither_overflows_nor_vanishes() -> None:
    torch.manual_seed(4)
    net, other = nasbench201(8, 7)
    for scale in (1.0, 1e-6):
        alphas = get_space("nb201").init_alphas(scale=scale)
        r, shares = expected(other, alphas, 8)
        assert abs(float(r.log())) > math.log(1e38)
        got = get_saliency("synflow")(net, alphas, batch(8))
        torch.testing.assert_close(got["cell"], shares["cell"], rtol=1e-5, atol=0)


def test_a_supernet_of_ones_own_runs_in_float64() -> None:
    """Nothing is rescaled between its layers, so its floats must reach far."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(30))

        def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            for layer, w in zip(self.layers, weights["chain"], strict=True):
                x = w[0] * layer(x) + w[1] * x
            return x.mean((2, 3))

    torch.manual_seed(5)
    net = Chain()
    alphas = {"chain": 100 * torch.rand(30, 2)}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    shares = get_saliency("synflow")(net, alphas, batch(6))["chain"]
    torch.testing.assert_close(shares.sum(1), torch.ones(30, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_max_pools_take_the_largest_of_what_is_not_negative() -> None:
    """Absolute values only: a max pool's gradient goes to the first maximum in scan order, as torch's own does."""
    torch.manual_seed(6)
    net, other = darts(4, 3)
    alphas = {t: torch.zeros(14, 8) for t in ("normal", "reduce")}
    for a in alphas.values():
        a[:, 1] = torch.rand(14)  # max_pool_3x3 alone
    _, shares = expected(other, alphas, 8)
    got = get_saliency("synflow")(net, alphas, batch(8))
    for t, s in shares.items():
        torch.testing.assert_close(got[t], s, rtol=1e-5, atol=0)


def test_nothing_flows() -> None:
    net = NASBench201Supernet(4, 1)
    alphas = {"cell": torch.zeros(6, 5)}
    alphas["cell"][:, 0] = 1.0  # none
    with pytest.raises(ValueError, match="no path of non-zero alphas and weights leads to the output"):
        get_saliency("synflow")(net, alphas, batch(8))
    with torch.no_grad():
        net.stem[0].weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the weights are not finite"):
        get_saliency("synflow")(net, get_space("nb201").init_alphas(), batch(8))


def test_a_failing_forward_leaves_the_supernet_as_it_was() -> None:
    torch.manual_seed(7)
    net = NASBench201Supernet(4, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="multiples of 4"):
        get_saliency("synflow")(net, get_space("nb201").init_alphas(), batch(7))
    assert net.training
    assert all("forward" not in m.__dict__ for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_score_of_a_network_is_the_definition() -> None:
    torch.manual_seed(8)
    space = get_space("nb201")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        genotype = space.sample(generator)
        net = space.network(genotype, 4, 1)
        got = get_score("synflow")(net, batch(8))
        copy = space.network(genotype, 4, 1).double()
        copy.load_state_dict(net.state_dict())
        for module in list(copy.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        copy.classifier.bias = None
        with torch.no_grad():
            for p in copy.parameters():
                p.abs_()
        parameters = list(copy.parameters())
        r = copy(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum()
        if not r.requires_grad or not genotype.has_path():
            assert float(got) == -math.inf
            continue
        gradients = torch.autograd.grad(r, parameters, materialize_grads=True)
        total = sum(float((p.detach() * g).sum()) for p, g in zip(parameters, gradients, strict=True))
        assert float(got) == pytest.approx(math.log(total), abs=1e-5)


def test_the_flow_through_operations() -> None:
    """A chain carries all of R in every layer, a branch a part of it."""
    torch.manual_seed(9)

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.a(x) + self.b(x)

    net = Branch()
    parts = operation_flow(net, {"first": net.first, "a": net.a, "b": net.b, "none": nn.ReLU()}, batch(3))
    assert float(parts["none"]) == 0
    assert float(parts["first"]) == pytest.approx(0.5)
    assert float(parts["a"] + parts["b"]) == pytest.approx(0.5)
    with torch.no_grad():
        net.first.weight.zero_()
    with pytest.raises(ValueError, match="nothing flows"):
        operation_flow(net, {"a": net.a}, batch(3))


def test_frozen_networks_and_networks_without_parameters() -> None:
    torch.manual_seed(10)
    net = get_space("nb201").network(get_space("nb201").sample(torch.Generator().manual_seed(1)), 4, 1)
    expected = get_score("synflow")(net, batch(8))
    for p in list(net.parameters())[::2]:
        p.requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    torch.testing.assert_close(get_score("synflow")(net, batch(8)), expected)
    assert [p.requires_grad for p in net.parameters()] == before
    with pytest.raises(ValueError, match="network has no parameters"):
        get_score("synflow")(nn.ReLU(), batch(8))
