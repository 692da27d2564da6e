from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from fastnas.nn import Supernet
from fastnas.saliency import Batch, get_saliency, get_score
from fastnas.spaces import get_space


@pytest.fixture(scope="module")
def case() -> tuple[Supernet, plain.Supernet, dict[str, Tensor], Batch]:
    torch.manual_seed(0)
    net = Supernet(4, 3, num_classes=4).double()
    other = plain.Supernet(4, 3, num_classes=4).double()
    other.load_state_dict(net.state_dict())
    alphas = {t: a.double() for t, a in get_space("darts").init_alphas(scale=0.1).items()}
    batch = Batch(torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0]))
    return net, other, alphas, batch


def loss_of(net: plain.Supernet, batch: Batch, flat: Tensor) -> Tensor:
    normal, reduce = flat.view(2, 14, 8)
    return F.cross_entropy(net(batch.images, {"normal": normal, "reduce": reduce}), batch.labels)


def flat(tables: dict[str, Tensor]) -> Tensor:
    return torch.stack([tables["normal"], tables["reduce"]]).detach().flatten()


def test_snip_is_the_definition(case: tuple[Supernet, plain.Supernet, dict[str, Tensor], Batch]) -> None:
    net, other, alphas, batch = case
    before = copy.deepcopy(net.state_dict())
    got = get_saliency("snip")(net, alphas, batch)
    a = flat(alphas).requires_grad_()
    (g,) = torch.autograd.grad(loss_of(other, batch, a), a)
    torch.testing.assert_close(flat(got), (a.detach() * g).abs(), rtol=1e-8, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_grasp_is_the_definition(case: tuple[Supernet, plain.Supernet, dict[str, Tensor], Batch]) -> None:
    net, other, alphas, batch = case
    got = flat(get_saliency("grasp")(net, alphas, batch))
    a = flat(alphas)
    leaf = a.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(other, batch, leaf), leaf)
    # H g column by column, by central differences of the gradient along g
    h = 1e-5 / float(g.norm())
    ends = []
    for sign in (1, -1):
        moved = (a + sign * h * g).requires_grad_()
        ends.append(torch.autograd.grad(loss_of(other, batch, moved), moved)[0])
    expected = a * (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(flat(get_saliency("grasp-largest")(net, alphas, batch)), -got)


def test_grasp_tells_how_a_cut_changes_the_gradient(
    case: tuple[Supernet, plain.Supernet, dict[str, Tensor], Batch],
) -> None:
    """Shrinking one α by a little: the squared norm of the gradient changes by −2 (H g) α · the part cut."""
    net, other, alphas, batch = case
    got = flat(get_saliency("grasp")(net, alphas, batch))
    a, part = flat(alphas), 1e-6  # small, since ReLU has kinks

    def norm(point: Tensor) -> Tensor:
        leaf = point.clone().requires_grad_()
        return torch.autograd.grad(loss_of(other, batch, leaf), leaf)[0].square().sum()

    for i in got.abs().topk(3).indices.tolist():
        cut = a.clone()
        cut[i] *= 1 - part
        assert float((norm(cut) - norm(a)) / part) == pytest.approx(-2 * float(got[i]), rel=2e-2)


def test_network_snip_and_grasp() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).double()
    batch = Batch(torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1]))
    parameters = list(net.parameters())

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(net(batch.images), batch.labels), parameters))

    g = gradient()
    expected = sum(float((p.detach() * q).abs().sum()) for p, q in zip(parameters, g, strict=True))
    assert float(get_score("snip")(net, batch)) == pytest.approx(expected)

    weights = [net[0].weight, net[4].weight]
    chosen = [q for p, q in zip(parameters, g, strict=True) if any(p is w for w in weights)]
    h, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for w, q in zip(weights, chosen, strict=True):
                w += sign * h * q
        ends.append(torch.autograd.grad(F.cross_entropy(net(batch.images), batch.labels), weights))
        with torch.no_grad():
            for w, q in zip(weights, chosen, strict=True):
                w -= sign * h * q
    expected = -sum(
        float((w.detach() * (p - m)).sum()) / (2 * h) for w, p, m in zip(weights, ends[0], ends[1], strict=True)
    )
    assert float(get_score("grasp")(net, batch)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), "batch.images has shape"),
        (torch.randn(4, 3, 8, 8), torch.full((4,), 2), "all 4 labels are 2"),
        (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 9]), "num_classes=10"),
        (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2]), "batch.labels has shape"),
        (torch.full((4, 3, 8, 8), torch.nan), torch.tensor([0, 1, 2, 3]), "the loss is nan"),
    ],
)
def test_bad_batches(name: str, images: Tensor, labels: Tensor, match: str) -> None:
    net = Supernet(4, 3, num_classes=4)
    with pytest.raises(ValueError, match=match):
        get_saliency(name)(net, get_space("darts").init_alphas(), Batch(images, labels))
    assert net.training


def test_a_shared_weight_counts_once() -> None:
    torch.manual_seed(1)
    first, second = torch.nn.Conv2d(3, 3, 1, bias=False), torch.nn.Conv2d(3, 3, 1, bias=False)
    second.weight = first.weight
    net = torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
    batch = Batch(torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0]))
    weights = [first.weight, net[4].weight]
    gradients = torch.autograd.grad(F.cross_entropy(net(batch.images), batch.labels), weights, create_graph=True)
    assert float(get_score("grad_norm")(net, batch)) == pytest.approx(sum(g.norm().item() for g in gradients))
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), weights)
    expected = -sum((w.detach() * h).sum().item() for w, h in zip(weights, products, strict=True))
    assert float(get_score("grasp")(net, batch)) == pytest.approx(expected)
