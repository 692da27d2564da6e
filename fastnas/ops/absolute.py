"""Passes over lists of tensors, each in one launch: absolute values in place and back, sums of products by group.

What weight-level saliencies are made of: SynFlow (arXiv:2006.05467) replaces every parameter by its absolute value,
differentiates, and scores each by θ ∂R/∂θ. A network has hundreds of small parameters, so the number of launches is the
cost. Nothing here is differentiable: the passes run under ``torch.no_grad``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas import _library
from fastnas._library import Backend
from fastnas.ops import _common

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_WORD = 32  # signs in a word (csrc/absolute.h)


def _is_dense(t: Tensor) -> bool:
    """Tells whether the elements fill a stretch of memory, each place once, in whatever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _words(n: int) -> int:
    return (n + _WORD - 1) // _WORD


def _bits(t: Tensor) -> Tensor:
    """Returns a dense tensor's elements in the order of their memory, as signed integers in the same memory."""
    return t.as_strided((t.numel(),), (1,)).view(_BITS[t.dtype])


def absolute_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Does what :func:`absolute_` does to dense tensors, in plain PyTorch."""
    powers = torch.tensor([*(1 << i for i in range(31)), -(1 << 31)], dtype=torch.int32, device=tensors[0].device)
    signs = []
    for t in tensors:
        bits = _bits(t)
        negative = torch.nn.functional.pad(bits < 0, (0, -t.numel() % _WORD)).view(-1, _WORD)
        signs.append((negative * powers).sum(1, dtype=torch.int32))
        bits &= torch.iinfo(bits.dtype).max
    return torch.cat(signs)


def restore_reference(tensors: Sequence[Tensor], signs: Tensor) -> None:
    """Does what :func:`restore_` does to dense tensors, in plain PyTorch."""
    places = torch.arange(_WORD, dtype=torch.int32, device=signs.device)
    for t, words in zip(tensors, torch.split(signs, [_words(t.numel()) for t in tensors]), strict=True):
        bits, limits = _bits(t), torch.iinfo(_BITS[t.dtype])
        negative = (words.view(-1, 1) >> places & 1).flatten()[: t.numel()].to(torch.bool)
        bits &= limits.max
        bits |= negative.to(bits.dtype) * limits.min


def group_products_reference(
    thetas: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[int], count: int, absolute: bool
) -> Tensor:
    """Returns what :func:`group_products` does for given gradients, in plain PyTorch."""
    sums = torch.zeros(count, dtype=torch.float64, device=thetas[0].device)
    for theta, grad, group in zip(thetas, grads, groups, strict=True):
        products = theta.double() * grad.double()
        sums[group] += (products.abs() if absolute else products).sum()
    return sums


@torch.no_grad()
def absolute_(tensors: Sequence[Tensor], *, backend: Backend | None = None) -> Tensor:
    """Replaces every tensor by its absolute value, in place; returns the signs, for :func:`restore_`.

    Only the sign bit is cleared, so that -0.0, NaN and infinity come back as they were, bit for bit. A tensor whose
    elements fill a stretch of memory in whatever order (contiguous, channels_last, transposed) is changed there; any
    other (a slice) is copied, changed and copied back. Graphs that saved one of the tensors notice the change, as with
    any other operation in place.

    Args:
        tensors: of any shapes, float16, bfloat16, float32 or float64 in any mixture, on one device; no two of them may
            share memory.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Returns:
        int32, one bit an element: each tensor begins with a word of its own, its elements in the order of its memory
        (of its indices where it is copied).

    Raises:
        TypeError, ValueError: naming the tensor that does not fit.
    """
    _check_list(tensors)
    if not tensors:
        return torch.empty(0, dtype=torch.int32)
    dense = [t if _is_dense(t) else t.contiguous() for t in tensors]
    ops = _library.namespace(backend, *tensors)
    signs: Tensor = absolute_reference(dense) if ops is None else ops.absolute_(dense)
    _write_back(tensors, dense)
    return signs


@torch.no_grad()
def restore_(tensors: Sequence[Tensor], signs: Tensor, *, backend: Backend | None = None) -> None:
    """Gives every element the sign that it had before :func:`absolute_`, in place.

    The sign bit alone is written: values that changed meanwhile keep their magnitude.

    Args:
        tensors: those that ``absolute_`` was given, in the same order and with the same strides.
        signs: what it returned.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Raises:
        TypeError, ValueError: naming the tensor that does not fit, or where the signs are those of other tensors.
    """
    _check_list(tensors)
    words = sum(_words(t.numel()) for t in tensors)
    if not isinstance(signs, Tensor) or signs.dtype != torch.int32 or signs.dim() != 1:
        raise TypeError("signs must be the tensor that absolute_ returned: one dimension, int32")
    if signs.numel() != words:
        raise ValueError(f"signs has {signs.numel()} words but these tensors have {words}: pass those of absolute_")
    if not tensors:
        return
    if signs.device != tensors[0].device:
        raise ValueError(f"signs is on {signs.device} but tensors[0] is on {tensors[0].device}: move it there")
    dense = [t if _is_dense(t) else t.contiguous() for t in tensors]
    ops = _library.namespace(backend, *tensors)
    if ops is None:
        restore_reference(dense, signs)
    else:
        ops.restore_(dense, signs.contiguous())
    _write_back(tensors, dense)


@torch.no_grad()
def group_products(
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    groups: Sequence[int],
    absolute: bool = False,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Returns the sum of θ g over all elements of a group of tensors, for every group.

    Products and sums are taken in float64, where those of float32 neither round nor overflow.

    Args:
        thetas: of any shapes, float16, bfloat16, float32 or float64 in any mixture, on one device.
        grads: one for each, of its shape and dtype, or None, which counts as zeros.
        groups: the group of each, numbered from 0.
        absolute: whether |θ g| is summed.
        backend: ``"native"`` or ``"reference"``; default: the current one.

    Returns:
        float64, shape (1 + the largest of ``groups``,); 0 for a group without tensors.

    Raises:
        TypeError, ValueError: naming the tensor or the argument that does not fit.
    """
    _check_tensors("thetas", thetas)
    if len(grads) != len(thetas) or len(groups) != len(thetas):
        raise ValueError(
            f"thetas, grads and groups have {len(thetas)}, {len(grads)} and {len(groups)} entries: expected one of "
            "each for every theta (None where there is no gradient)"
        )
    for i, group in enumerate(groups):
        if not isinstance(group, int) or group < 0:
            raise ValueError(f"groups[{i}] is {group!r}: expected a whole number from 0 on")
    present: tuple[list[Tensor], list[Tensor], list[int]] = ([], [], [])
    for i, (theta, grad, group) in enumerate(zip(thetas, grads, groups, strict=True)):
        if grad is None:
            continue
        if not isinstance(grad, Tensor):
            raise TypeError(f"grads[{i}] is a {type(grad).__name__}: expected a tensor or None")
        for what, mine, first in (
            ("shape", tuple(grad.shape), tuple(theta.shape)),
            ("dtype", grad.dtype, theta.dtype),
            ("device", grad.device, theta.device),
        ):
            if mine != first:
                raise ValueError(f"grads[{i}] has {what} {mine} but thetas[{i}] has {first}: they must agree")
        theta = theta if _is_dense(theta) else theta.contiguous()
        present[0].append(theta)
        present[1].append(_common.like(grad, theta))
        present[2].append(group)
    count = max(groups, default=-1) + 1
    if not present[0]:
        return torch.zeros(count, dtype=torch.float64, device=thetas[0].device if thetas else None)
    ops = _library.namespace(backend, *present[0])
    run = group_products_reference if ops is None else ops.group_products
    sums: Tensor = run(*present, count, absolute)
    return sums


def _check_tensors(name: str, tensors: Sequence[Tensor]) -> None:
    if not isinstance(tensors, Sequence):  # a generator would be used up by the checks
        raise TypeError(f"{name} is a {type(tensors).__name__}: pass a list of tensors")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}] is a {type(t).__name__}: expected a tensor")
        if t.dtype not in _BITS:
            raise TypeError(f"{name}[{i}] has dtype {t.dtype}: expected float16, bfloat16, float32 or float64")
        if t.layout != torch.strided:
            raise TypeError(f"{name}[{i}] has layout {t.layout}: expected a dense tensor")
        if t.device != tensors[0].device:
            raise ValueError(f"{name}[{i}] is on {t.device} but {name}[0] is on {tensors[0].device}: pass them apart")


def _check_list(tensors: Sequence[Tensor]) -> None:
    """Checks tensors that are to be written: no place in memory may be there twice."""
    _check_tensors("tensors", tensors)
    ranges = []  # of addresses
    for i, t in enumerate(tensors):
        if t.numel() == 0 or t.device.type == "meta":
            continue
        extent = t.numel()
        if not t.is_contiguous():
            if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
                raise ValueError(f"tensors[{i}] repeats its elements (expanded): pass the tensor that it is made from")
            extent = 1 + sum((size - 1) * stride for stride, size in zip(t.stride(), t.shape, strict=True))
        begin = t.data_ptr()
        ranges.append((begin, begin + extent * t.element_size(), i))
    ranges.sort()
    for (_, end, i), (begin, _, j) in itertools.pairwise(ranges):
        if begin < end:
            raise ValueError(f"tensors[{min(i, j)}] and tensors[{max(i, j)}] share memory: list it once")


def _write_back(tensors: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    """Copies back what was copied, and lets autograd know what was changed in place."""
    for t, d in zip(tensors, dense, strict=True):
        if d is not t:
            t.copy_(d)
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _fake_absolute(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(sum(_words(t.numel()) for t in tensors), dtype=torch.int32)


def _fake_restore(tensors: list[Tensor], signs: Tensor) -> None:
    return None


def _fake_products(thetas: list[Tensor], grads: list[Tensor], groups: list[int], count: int, absolute: bool) -> Tensor:
    return thetas[0].new_empty(count, dtype=torch.float64)


_common.register_fakes({"absolute_": _fake_absolute, "restore_": _fake_restore, "group_products": _fake_products})
