from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastnas.nn import NASBench201Supernet, Supernet
from fastnas.saliency.linearised import Rescale, linearised


def snapshot(network: nn.Module) -> dict[str, object]:
    """Everything a block may have touched, to the bit."""
    state: dict[str, object] = {
        name: t.detach().clone().view(torch.int32 if t.dtype == torch.float32 else t.dtype)
        for name, t in network.state_dict().items()
    }
    for name, m in network.named_modules():
        state[f"{name} mode"] = m.training
        state[f"{name} eps"] = getattr(m, "eps", None)
    return state


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Supernet(4, 3, in_channels=8), nn.Linear(10, 2)
    )
    with torch.no_grad():
        net[0].weight[0, 0, 0, :2] = torch.tensor([-0.0, 0.0])
        net[0].weight[0, 0, 1, 0] = -math.inf
        net[0].weight[0, 0, 1, 1] = -math.nan
        net[1].weight.uniform_(-1, 1)
        net[1].running_mean.uniform_()
    net[3].eval()
    return net


def test_everything_comes_back(network: nn.Module) -> None:
    before = snapshot(network)
    parameters = dict(network.named_parameters())
    with linearised(network):
        assert not same(before, snapshot(network))
        assert not any(m.training for m in network.modules())
        assert all(bool((p.nan_to_num() >= 0).all()) for p in network.parameters())
    assert same(before, snapshot(network))
    assert all(p is parameters[name] for name, p in network.named_parameters())


def test_everything_comes_back_after_an_exception(network: nn.Module) -> None:
    before = snapshot(network)
    with pytest.raises(RuntimeError, match="in the middle"), linearised(network):
        raise RuntimeError("in the middle")
    assert same(before, snapshot(network))


def test_edge_weights_multiply_what_an_edge_has() -> None:
    torch.manual_seed(2)
    net = NASBench201Supernet(4, 1, 5, 2)
    x, weights, betas = torch.rand(2, 2, 8, 8), torch.rand(6, 5), torch.rand(6)
    with linearised(net), torch.no_grad():
        y = net(x, weights, betas)
        torch.testing.assert_close(y, net(x, weights * betas[:, None]), rtol=1e-5, atol=0)
        assert bool((y < net(x, weights)).all())


def test_what_the_network_computes() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5))
    x = torch.rand(2, 3, 4, 4)
    with linearised(net):
        y = net(x)
    conv = nn.functional.conv2d(x, net[0].weight.detach().abs())
    torch.testing.assert_close(y, conv.flatten(1) @ net[5].weight.detach().abs().T)


def test_relu6_has_no_bound() -> None:
    net = nn.Sequential(nn.ReLU6(), nn.Conv2d(1, 1, 1), nn.ReLU6())
    x = torch.full((1, 1, 1, 1), 1e6, requires_grad=True)
    with linearised(net):
        (gradient,) = torch.autograd.grad(net(x).sum(), x)
        assert torch.equal(net(x), x * net[1].weight.abs())
    assert torch.equal(gradient, net[1].weight.detach().abs())
    assert float(net[0](x.detach())) == 6.0


@pytest.mark.parametrize("top", [3e37, 1.0, 7.5, 2e-30, 0.0])
def test_rescaling_is_exact(top: float) -> None:
    states = (torch.rand(1, 2, 3, 3) * top, torch.rand(1, 2, 3, 3) * top)
    rescale = Rescale()
    scaled = rescale(states)
    assert float(scaled[1].max()) <= 1
    assert top == 0 or float(scaled[1].max()) > 0.49
    factor = 2.0 ** round(float(rescale.log) / math.log(2))
    for s, t in zip(states, scaled, strict=True):
        assert torch.equal(s.double(), t.double() * factor)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(3), nn.InstanceNorm2d(4)])
def test_other_norms_are_refused(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=f"network has a {type(norm).__name__}"), linearised(net):
        pass
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
