"""The DARTS definition in plain PyTorch, to test against: functions of a state dict, without a line of fastnas.

Written from arXiv:1806.09055 and arXiv:1907.05737. ``state`` maps the published parameter and buffer names to tensors;
in training mode the running statistics in it are updated in place. Nothing is fused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


def state_of(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns copies of a module's parameters, as leaves that require grad, and of its buffers, in ``dtype``."""
    state = {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in module.named_parameters()}
    for name, buffer in module.named_buffers():
        state[name] = buffer.to(dtype, copy=True) if buffer.is_floating_point() else buffer.clone()
    return state


@dataclass
class Reference:
    state: Mapping[str, Tensor]
    training: bool = True
    k: int = 1
    primitives: Sequence[str] = PRIMITIVES
    memory_format: torch.memory_format = torch.contiguous_format

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        s = self.state
        if self.training:
            s[f"{name}.num_batches_tracked"].add_(1)
        return F.batch_norm(
            x,
            s[f"{name}.running_mean"],
            s[f"{name}.running_var"],
            s.get(f"{name}.weight"),
            s.get(f"{name}.bias"),
            training=self.training,
        )

    def relu_conv_bn(self, name: str, x: Tensor) -> Tensor:
        return self.batch_norm(f"{name}.op.2", F.conv2d(x.relu(), self.state[f"{name}.op.1.weight"]))

    def factorized_reduce(self, name: str, x: Tensor) -> Tensor:
        x = x.relu()
        even = F.conv2d(x, self.state[f"{name}.conv_1.weight"], stride=2)
        odd = F.conv2d(x[:, :, 1:, 1:], self.state[f"{name}.conv_2.weight"], stride=2)
        return self.batch_norm(f"{name}.bn", torch.cat([even, odd], dim=1))

    def depthwise_pointwise(self, name: str, index: int, x: Tensor, stride: int, dilation: int) -> Tensor:
        """ReLU at ``op.<index>``, depthwise and pointwise convolution and batch norm at the next three."""
        depthwise, pointwise = (self.state[f"{name}.op.{index + n}.weight"] for n in (1, 2))
        padding = dilation * (depthwise.shape[-1] // 2)
        x = F.conv2d(x.relu(), depthwise, None, stride, padding, dilation, groups=x.shape[1])
        return self.batch_norm(f"{name}.op.{index + 3}", F.conv2d(x, pointwise))

    def candidate(self, primitive: str, name: str, x: Tensor, stride: int) -> Tensor:
        if primitive == "none":
            return 0 * x[:, :, ::stride, ::stride]
        if primitive == "max_pool_3x3":
            return self.batch_norm(f"{name}.1", F.max_pool2d(x, 3, stride, 1))
        if primitive == "avg_pool_3x3":
            return self.batch_norm(f"{name}.1", F.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
        if primitive == "skip_connect":
            return x if stride == 1 else self.factorized_reduce(name, x)
        if primitive.startswith("dil_conv"):
            return self.depthwise_pointwise(name, 0, x, stride, 2)
        if primitive.startswith("sep_conv"):
            return self.depthwise_pointwise(name, 4, self.depthwise_pointwise(name, 0, x, stride, 1), 1, 1)
        raise AssertionError(primitive)

    def mixed_op(self, name: str, x: Tensor, weights: Tensor, stride: int) -> Tensor:
        """Σ_o w_o o(x) on the first C/k channels; the others pass by, and the two parts are interleaved."""
        C = x.shape[1]
        part, rest = x[:, : C // self.k], x[:, C // self.k :]
        y = sum(
            weights[o] * self.candidate(primitive, f"{name}._ops.{o}", part, stride)
            for o, primitive in enumerate(self.primitives)
        )
        if self.k == 1:
            return y
        if stride == 2:
            rest = F.max_pool2d(rest, 2, 2)
        y = torch.cat([y, rest], dim=1)
        N, _, H, W = y.shape
        y = y.reshape(N, self.k, C // self.k, H, W).transpose(1, 2).reshape(N, C, H, W)
        return y.contiguous(memory_format=self.memory_format)

    def cell(
        self,
        name: str,
        s0: Tensor,
        s1: Tensor,
        weights: Tensor,
        edge_weights: Tensor | None,
        reduction: bool,
        reduction_prev: bool,
        steps: int,
        multiplier: int,
    ) -> Tensor:
        first = self.factorized_reduce if reduction_prev else self.relu_conv_bn
        states = [first(f"{name}.preprocess0", s0), self.relu_conv_bn(f"{name}.preprocess1", s1)]
        edge = 0
        for i in range(2, steps + 2):
            inputs = []
            for j in range(i):
                stride = 2 if reduction and j < 2 else 1
                y = self.mixed_op(f"{name}._ops.{edge}", states[j], weights[edge], stride)
                inputs.append(y if edge_weights is None else edge_weights[edge] * y)
                edge += 1
            states.append(sum(inputs))
        return torch.cat(states[-multiplier:], dim=1)

    def network(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        layers: int,
        edge_weights: Mapping[str, Tensor] | None = None,
        steps: int = 4,
        multiplier: int = 4,
    ) -> Tensor:
        """Logits from images and the weights ``"normal"`` and ``"reduce"``, (edges, primitives) each."""
        x = x.contiguous(memory_format=self.memory_format)
        s0 = s1 = self.batch_norm("stem.1", F.conv2d(x, self.state["stem.0.weight"], padding=1))
        reduction_prev = False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            kind = "reduce" if reduction else "normal"
            edges = None if edge_weights is None else edge_weights[kind]
            y = self.cell(f"cells.{layer}", s0, s1, weights[kind], edges, reduction, reduction_prev, steps, multiplier)
            s0, s1, reduction_prev = s1, y, reduction
        return F.linear(s1.mean(dim=(2, 3)), self.state["classifier.weight"], self.state["classifier.bias"])
