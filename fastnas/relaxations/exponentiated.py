"""Softmax whose alphas learn by exponentiated gradients: the relaxation of GAEA (arXiv:2004.07802)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnas.relaxations._registry import relaxation


class _Mirror(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alphas: Tensor) -> Tensor:
        return torch.softmax(alphas, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@relaxation("exponentiated")
def exponentiated(alphas: Tensor) -> Tensor:
    """Returns softmax(alphas), (E, O), whose backward hands the gradient of the weights to the alphas unchanged.

    A step of SGD, alphas − η ∂L/∂weights, thus multiplies the weights by exp(−η ∂L/∂weights) and normalises each row:
    exactly GAEA's exponentiated gradient descent on the simplex. That holds for plain SGD; Adam, momentum or weight
    decay make another update of it. ``alpha.grad`` is not the derivative with respect to alpha.
    """
    weights: Tensor = _Mirror.apply(alphas)  # type: ignore[no-untyped-call]
    return weights
