"""Size as a score: parameters and multiply-adds, the baselines that a score has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas.nn.preserved import preserved
from fastnas.saliency._registry import Batch, score
from fastnas.saliency._visit import LAYERS, check_images, hooked


@dataclass(frozen=True)
class Complexity:
    """The size of a network.

    Attributes:
        parameters: Numbers in its parameters, each counted once.
        multiply_adds: Multiply-adds of its convolutions and linear layers for one image, without their biases.
    """

    parameters: int
    multiply_adds: int


def count(network: nn.Module, input_shape: Sequence[int]) -> Complexity:
    """Returns the network's parameters and multiply-adds, from one forward in eval mode.

    Args:
        network: what is counted; left as it was.
        input_shape: (C, H, W) of an image.

    Raises:
        ValueError: where ``input_shape`` is not three sizes, or the network has no such layer.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape={tuple(input_shape)} must be (C, H, W) of an image, each at least 1")
    multiply_adds = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal multiply_adds
        if isinstance(layer, nn.Linear):
            multiply_adds += output.numel() * layer.in_features
        elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
            multiply_adds += inputs[0].numel() * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            multiply_adds += output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    first = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    with preserved(network, training=False), hooked(network, LAYERS, add), torch.no_grad():
        network(torch.zeros(1, *input_shape, dtype=first.dtype, device=first.device))
    return Complexity(sum(p.numel() for p in network.parameters()), multiply_adds)


@score("params")
def params(network: nn.Module, batch: Batch) -> Tensor:
    """Returns the number of the network's parameters, float64. The batch is not looked at."""
    return torch.tensor(float(sum(p.numel() for p in network.parameters())), dtype=torch.float64)


@score("flops")
def flops(network: nn.Module, batch: Batch) -> Tensor:
    """Returns the multiply-adds of convolutions and linear layers for one image of the batch's shape, float64.

    Raises:
        ValueError: for an empty batch.
    """
    check_images(batch)
    return torch.tensor(float(count(network, batch.images.shape[1:]).multiply_adds), dtype=torch.float64)
