"""What the fused ops take over of batch norms without parameters: who may be folded, and how its statistics move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastnas import _library
from fastnas.ops.mixed_op import Candidate, MixedOpResult, mixed_op


def hooks_of(m: nn.Module) -> tuple[dict[int, Callable[..., object]], ...]:
    """Returns the module's hooks by kind; the dicts live as long as the module."""
    d = m.__dict__
    return d["_forward_hooks"], d["_forward_pre_hooks"], d["_backward_hooks"], d["_backward_pre_hooks"]


def special(m: nn.Module) -> bool:
    """Tells whether calling the module does more than its class says: it has hooks, or a forward of its own."""
    return any(hooks_of(m)) or "forward" in m.__dict__


def foldable(norm: nn.Module, training: bool, affine: bool = False) -> bool:
    """Tells whether it is a plain batch norm without parameters that takes the statistics a fused op will give it.

    Args:
        norm: any module.
        training: whether the op takes the batch's statistics.
        affine: ask for one that has parameters instead.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and (norm.weight is not None) == affine
        and (norm.bias is not None) == affine
        and norm.training == training
        and (training or norm.running_mean is not None)
    )


def tracks(norm: nn.BatchNorm2d) -> bool:
    """Tells whether a call of the norm updates its running statistics."""
    return norm.training and norm.track_running_stats and norm.running_mean is not None


def update_statistics(norms: Sequence[nn.BatchNorm2d], means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """Updates the running statistics of norms as torch.nn.BatchNorm2d does.

    Args:
        norms: norms that :func:`tracks` holds for.
        means: of each norm the batch's, (C,).
        variances: of each norm the batch's, unbiased, (C,).
    """
    counts = [n.num_batches_tracked for n in norms if n.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    for momentum in {n.momentum for n in norms}:
        chosen = [entry for entry in zip(norms, means, variances, strict=True) if entry[0].momentum == momentum]
        for old, new in (
            ([n.running_mean for n, _, _ in chosen], [mean for _, mean, _ in chosen]),
            ([n.running_var for n, _, _ in chosen], [variance for _, _, variance in chosen]),
        ):
            buffers = [b for b in old if b is not None]
            new = [v.to(b.dtype) for v, b in zip(new, buffers, strict=True)]
            if momentum is not None:
                torch._foreach_lerp_(buffers, new, momentum)
                continue
            for (norm, *_), buffer, value in zip(chosen, buffers, new, strict=True):  # cumulative average
                if norm.num_batches_tracked is not None:
                    buffer.lerp_(value, 1.0 / norm.num_batches_tracked.to(buffer.dtype))


def update_tracked(norms: Sequence[nn.BatchNorm2d], result: MixedOpResult) -> None:
    """Updates the running statistics of those norms that keep them from a fused op's result, one row a norm."""
    rows = [i for i, n in enumerate(norms) if tracks(n)]
    if not rows:
        return
    assert result.mean is not None
    assert result.variance is not None
    means, variances = result.mean.unbind(0), result.variance.unbind(0)
    update_statistics([norms[i] for i in rows], [means[i] for i in rows], [variances[i] for i in rows])


def given_statistics(norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    """Returns the running means and variances of norms that keep them, one row a norm."""
    means = [n.running_mean for n in norms if n.running_mean is not None]
    variances = [n.running_var for n in norms if n.running_var is not None]
    return torch.stack(means), torch.stack(variances)


def folded_statistics(norms: Sequence[nn.BatchNorm2d], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (m, s), one row a norm, such that an affine norm with running statistics gives ``(z - m) * s``.

    ``s = weight / sqrt(variance + eps)`` and ``m = mean - bias / s``.

    Args:
        norms: affine ones that keep statistics.
        like: their dtype and device.
    """
    if not norms:
        return like.new_empty(0, like.shape[1]), like.new_empty(0, like.shape[1])
    mean, variance = given_statistics(norms)
    weight, bias = torch.stack([n.weight for n in norms]), torch.stack([n.bias for n in norms])
    eps = torch.tensor([[n.eps] for n in norms], dtype=variance.dtype, device=variance.device)
    scale = weight * torch.rsqrt(variance + eps)
    # a weight of 0 leaves the bias alone, which so small a scale gives as well
    scale = torch.where(scale.abs() < _TINY, _TINY, scale)
    return (mean - bias / scale).to(like.dtype), scale.to(like.dtype)


_TINY = 1e-20


def normalise(norm: nn.Module, z: Tensor) -> Tensor:
    """Returns ``norm(z)``, from the native op where the norm is a plain one without parameters."""
    plain = not special(norm) and foldable(norm, norm.training) and norm.num_features == z.shape[1]
    if not plain or z.dim() != 4 or z.numel() == 0 or _library.namespace(None, z) is None:
        return norm(z)  # type: ignore[no-any-return]
    assert isinstance(norm, nn.BatchNorm2d)
    result = mixed_op(
        *(z.detach(), z.new_ones(1), (Candidate("map", norm=True),)),
        maps=[z],
        eps=norm.eps,
        statistics=None if norm.training else given_statistics([norm]),
    )
    update_tracked([norm], result)
    return result.y
