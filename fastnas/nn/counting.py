"""The size of a network: parameters, multiply-adds, and the operations between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas.nn.hooked import LAYERS, hooked
from fastnas.nn.preserved import preserved

AUXILIARY = "auxiliary_head"
"""The name of the module that only training needs: published sizes leave it out."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh)
_POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)


@dataclass(frozen=True)
class Complexity:
    """The size of a network.

    Attributes:
        parameters: Numbers in its parameters, each counted once; those of an auxiliary head are not.
        multiply_adds: Multiply-adds of its convolutions and linear layers for one image, without their biases.
        elementwise: Operations of norms (one for each element, two where they are affine), activations (one) and pools
            (one for each element that they read) for one image. Some papers print the sum of both.
    """

    parameters: int
    multiply_adds: int
    elementwise: int = 0


def count(model: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> Complexity:
    """Returns the size of a model, from one forward in eval mode.

    Layers that are called several times count several times, those that are not called count as parameters only.

    Args:
        model: what is counted; left as it was.
        image_shape: (C, H, W) of an image.

    Raises:
        ValueError: where ``image_shape`` is not three sizes, or the model has no layer of which anything is counted.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape={tuple(image_shape)} must be (C, H, W) of an image, each at least 1")
    multiply_adds = elementwise = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal multiply_adds, elementwise
        if isinstance(layer, nn.Linear):
            multiply_adds += output.numel() * layer.in_features
        elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
            multiply_adds += inputs[0].numel() * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            multiply_adds += output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, _NORMS):
            elementwise += output.numel() * (1 if layer.weight is None else 2)
        else:
            elementwise += inputs[0].numel()

    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    kinds = (*LAYERS, *_NORMS, *_ACTIVATIONS, *_POOLS)
    with preserved(model, training=False), hooked(model, kinds, add), torch.no_grad():
        model(torch.zeros(1, *image_shape, dtype=first.dtype, device=first.device))
    parameters = sum(p.numel() for name, p in model.named_parameters() if AUXILIARY not in name.split("."))
    return Complexity(parameters, multiply_adds, elementwise)
