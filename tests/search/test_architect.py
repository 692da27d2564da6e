import pytest
import torch
from torch import nn

from fastnas.search import Bilevel, first_order
from fastnas.search.architect import frozen


def _problem():
    """loss = mean((alpha * w * x)²), one weight and one alpha."""
    net = nn.Linear(1, 1, bias=False).double()
    alphas = {"cell": torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)}

    def loss(batch):
        logits = alphas["cell"] * net(batch[0])
        return logits.square().mean(), logits

    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    batch = torch.tensor([[2.0], [1.0]], dtype=torch.float64), torch.zeros(2)
    return Bilevel(net, optimizer, alphas, loss), batch


def test_first_order_gradient():
    problem, batch = _problem()
    w = problem.supernet.weight.item()
    loss, logits = first_order(problem, batch, batch)
    # d/da mean((a w x)²) = 2 a w² mean(x²)
    torch.testing.assert_close(problem.alphas["cell"].grad, torch.tensor([[2 * 3.0 * w**2 * 2.5]], dtype=torch.float64))
    assert loss.item() == pytest.approx(9 * w**2 * 2.5)
    assert not loss.requires_grad
    assert not logits.requires_grad


def test_first_order_leaves_the_weights_alone():
    problem, batch = _problem()
    weight = problem.supernet.weight
    before = weight.detach().clone()
    first_order(problem, batch, batch)
    assert weight.grad is None
    assert weight.requires_grad
    weight.grad = torch.ones_like(weight)
    first_order(problem, batch, batch)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(weight, before)


def test_weights_are_frozen_while_the_alphas_learn():
    problem, batch = _problem()
    seen = []
    watching = Bilevel(
        problem.supernet,
        problem.optimizer,
        problem.alphas,
        lambda b: (seen.append(problem.supernet.weight.requires_grad), problem.loss(b))[1],
    )
    first_order(watching, batch, batch)
    assert seen == [False]


def test_frozen_restores_flags_after_an_error():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net[0].bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(net.parameters()):
        _ = 1 / sum(p.requires_grad for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]
