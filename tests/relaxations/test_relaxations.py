import copy

import pytest
import torch

from fastnas.relaxations import RELAXATIONS, get_relaxation, relaxation, softmax, softmax_per_node


def test_softmax_is_over_the_candidates():
    alphas = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    third = 1 / (1 + torch.e)
    expected = torch.tensor([[0.5, 0.5], [third, 1 - third]], dtype=torch.float64)
    torch.testing.assert_close(softmax(alphas), expected)
    # no overflow, and a constant added to a row changes nothing
    torch.testing.assert_close(softmax(alphas + torch.tensor([[1e4], [-1e4]])), expected)


def test_softmax_gradient():
    assert torch.autograd.gradcheck(softmax, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(softmax_per_node, torch.randn(9, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("fan_in", [[2], [2, 3], [2, 3, 4, 5]])
def test_softmax_per_node(fan_in):
    betas = torch.randn(sum(fan_in), dtype=torch.float64)
    weights = softmax_per_node(betas)
    assert weights.shape == betas.shape
    start = 0
    for n in fan_in:
        expected = betas[start : start + n].exp()
        torch.testing.assert_close(weights[start : start + n], expected / expected.sum())
        start += n


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (13,), (14, 8)])
def test_softmax_per_node_shape(shape):
    with pytest.raises(ValueError, match=r"betas has shape .*: expected one logit an edge"):
        softmax_per_node(torch.zeros(shape))


def test_registry(monkeypatch):
    assert get_relaxation("softmax") is softmax
    with pytest.raises(ValueError, match=r"relaxation 'sofmax' is unknown: expected one of .*softmax"):
        get_relaxation("sofmax")
    monkeypatch.setattr("fastnas.relaxations._registry.RELAXATIONS", copy.copy(RELAXATIONS))

    @relaxation("sigmoid")
    def sigmoid(alphas):
        return alphas.sigmoid()

    assert get_relaxation("sigmoid") is sigmoid
    with pytest.raises(ValueError, match="'sigmoid' is already registered"):
        relaxation("sigmoid")(sigmoid)


@pytest.mark.parametrize("name", RELAXATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("centre", [0.0, -20.0, 20.0, -1e30, 1e30])
def test_every_relaxation_keeps_shape_and_dtype_and_passes_gradients(name, dtype, centre):
    alphas = (centre + torch.randn(14, 8)).to(dtype).requires_grad_()
    relax = get_relaxation(name)
    for weights in (relax(alphas, torch.Generator().manual_seed(0), 0.5), relax.mean(alphas)):
        assert weights.shape == alphas.shape
        assert weights.dtype == dtype
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.double().sum(-1), torch.ones(14).double(), rtol=0, atol=8 * eps(dtype))
        (gradient,) = torch.autograd.grad(weights[:, 0].sum(), alphas)
        assert gradient.isfinite().all()
        if centre == 0 and name != "uniform":
            assert gradient.any()


def eps(dtype):
    return torch.finfo(dtype).eps
