"""How scores look into a network while it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fastnas.nn.hooked import hooked
from fastnas.nn.preserved import preserved
from fastnas.saliency._registry import Batch


def check_images(batch: Batch, at_least: int = 1) -> int:
    """Returns the number of images.

    Raises:
        ValueError: where they are not (N, C, H, W) floats, or fewer than ``at_least``.
    """
    images = batch.images
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"batch.images must be floats (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if images.numel() == 0 or len(images) < at_least:
        raise ValueError(f"batch.images has shape {tuple(images.shape)}: this score needs {at_least} or more images")
    return len(images)


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Returns the network's logits, (N, classes).

    Raises:
        ValueError: where the network returns anything else, or a logit is not finite.
    """
    logits = network(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"network must return logits (N, classes), got {got}: wrap it in a module that does")
    if not torch.isfinite(logits).all():
        raise ValueError("network: its logits are NaN or infinite: check the images, scale weights or use float64")
    return logits


def active_units(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns which units are active, bool (N, units), for every call of a ReLU in one forward.

    Batch norms use the batch's statistics. ReLUs that the logits do not depend on are left out. ReLU6 is active above 0
    as well: its upper bound, which normalised maps hardly reach, is not looked at.

    Raises:
        ValueError: where the network has no ``nn.ReLU`` or ``nn.ReLU6`` or calls none, or as :func:`logits_of`.
    """
    found: list[tuple[Node | None, Tensor]] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if len(output) != len(images):
            raise ValueError(f"network: a ReLU sees {len(output)} rows for {len(images)} images")
        # The order of the units does not matter, so take that of the memory, which needs no copy.
        active = output.detach() > 0
        if active.dim() == 4 and active.is_contiguous(memory_format=torch.channels_last):
            active = active.permute(0, 2, 3, 1)
        found.append((output.grad_fn, active.flatten(1)))

    with preserved(network, training=True), hooked(network, (nn.ReLU, nn.ReLU6), hook), torch.enable_grad():
        logits = logits_of(network, images.detach().clone().requires_grad_())
    if not found:
        raise ValueError("network calls none of its ReLU modules, which this score looks at")
    reached = _graph(logits)
    return [active for node, active in found if node in reached]


def _graph(output: Tensor) -> set[Node]:
    """Returns the operations that a tensor was computed by."""
    reached: set[Node] = set()
    ahead = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in reached:
            reached.add(node)
            ahead += [following for following, _ in node.next_functions]
    return reached
