"""The names of PC-DARTS' search code (arXiv:1907.05737): as :mod:`fastnas.compat.darts`, with partial channels.

A quarter of the channels go through the candidates (k = 4), and edge logits ``betas`` weigh a node's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas import nn as _nn
from fastnas.compat.darts import (
    DARTS_V1,
    DARTS_V2,
    OPS,
    PRIMITIVES,
    AmoebaNet,
    Architect,
    DilConv,
    FactorizedReduce,
    Genotype,
    Identity,
    NASNet,
    ReLUConvBN,
    SepConv,
    Zero,
)
from fastnas.compat.darts import Network as _Network
from fastnas.relaxations.softmax import softmax_per_node

__all__ = [
    "DARTS_V1",
    "DARTS_V2",
    "OPS",
    "PCDARTS",
    "PRIMITIVES",
    "AmoebaNet",
    "Architect",
    "Cell",
    "DilConv",
    "FactorizedReduce",
    "Genotype",
    "Identity",
    "MixedOp",
    "NASNet",
    "Network",
    "PC_DARTS_cifar",
    "PC_DARTS_image",
    "ReLUConvBN",
    "SepConv",
    "Zero",
]

K = 4

PC_DARTS_cifar = Genotype.from_text(
    "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1), "
    "('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6), "
    "reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), "
    "('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))"
)
PC_DARTS_image = Genotype.from_text(
    "Genotype(normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0), ('skip_connect', 1), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)], normal_concat=range(2, 6), "
    "reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2), ('max_pool_3x3', 1), "
    "('sep_conv_3x3', 2), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)], reduce_concat=range(2, 6))"
)
PCDARTS = PC_DARTS_cifar


class MixedOp(_nn.MixedOp):
    """A MixedOp whose candidates see the first quarter of the channels."""

    def __init__(self, C: int, stride: int) -> None:
        super().__init__(C, stride, K)


class Cell(_nn.Cell):
    """A search cell of such MixedOps; ``forward(s0, s1, weights, weights2)``."""

    def __init__(
        self,
        steps: int,
        multiplier: int,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__(steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev, k=K)

    def forward(  # type: ignore[override]
        self, s0: Tensor, s1: Tensor, weights: Tensor | Sequence[Tensor], weights2: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Returns the cell's output; ``weights2`` (E,) multiplies the edges' outputs."""
        return super().forward(s0, s1, weights, weights2)


class Network(_Network):
    """The supernet of PC-DARTS together with its architecture parameters, alphas and betas."""

    _k = K

    def _initialize_alphas(self) -> None:
        super()._initialize_alphas()
        edges = len(self.alphas_normal)
        self.betas_normal = (1e-3 * torch.randn(edges)).requires_grad_()
        self.betas_reduce = (1e-3 * torch.randn(edges)).requires_grad_()
        self._arch_parameters += [self.betas_normal, self.betas_reduce]

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the logits, (N, num_classes)."""
        return _nn.Supernet.forward(self, input, self._weights(), self._edge_weights())

    def _edge_weights(self) -> dict[str, Tensor]:
        return {"normal": softmax_per_node(self.betas_normal), "reduce": softmax_per_node(self.betas_reduce)}

    def genotype(self) -> Genotype:
        """Returns the architecture that the products of the alphas' and the betas' softmax stand for now."""
        edges = self._edge_weights()
        return self._space().derive({name: w * edges[name][:, None] for name, w in self._weights().items()})
