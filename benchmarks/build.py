"""Makes a variant of a module: which side, which memory format, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.measure import Variant


def layout(name: str) -> torch.memory_format:
    """Returns the memory format that a variant's activations have at its input."""
    return torch.contiguous_format if name == "eager" else torch.channels_last


def random(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Returns normal numbers that depend on the shape and ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)


def leaf(t: Tensor, name: str) -> Tensor:
    """Returns ``t`` in the layout of the variant, as a leaf that requires a gradient."""
    if t.dim() == 4:
        t = t.contiguous(memory_format=layout(name))
    return t.detach().requires_grad_()


def variant(
    module: nn.Module,
    state: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype,
    device: str,
    *,
    arguments: tuple[object, ...],
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    grad: Tensor,
    compile_parts: Callable[[nn.Module], list[nn.Module]] = lambda module: [module],
    mode: str | None = None,
) -> Variant:
    """Returns the variant that runs ``module(*arguments)`` with the parameters and buffers of ``state``.

    ``inputs`` and ``parameters`` are those of the arguments that get gradients; the module's parameters come on top.
    ``compile_parts(module)`` are compiled each on its own; those of the same class and shapes share one graph. ``mode``
    is torch.compile's.
    """
    module.load_state_dict(state, strict=True)
    module = module.to(device, dtype).train()
    if layout(name) == torch.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if name.startswith("compiled"):
        torch._dynamo.config.recompile_limit = 64  # one graph for each differently shaped part
        for part in compile_parts(module):
            part.compile(dynamic=False, mode=mode)  # or shapes that differ from the first would get slower graphs
    if grad.dim() == 4:
        grad = grad.contiguous(memory_format=layout(name))
    parameters = {**parameters, **dict(module.named_parameters())}
    return Variant(lambda: module(*arguments), inputs, parameters, grad, dict(module.named_buffers()))
