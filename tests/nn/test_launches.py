"""How many kernels a step of the supernet launches, beside plain PyTorch: on a GPU, launches bound a search's speed."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnas
from fastnas.nn import Supernet

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks import plain

LAUNCHES, BYTES = 1 / 10, 1 / 3
"""The most launches that a step may need, and bytes that it may move, as shares of plain PyTorch's."""

ALLOCATIONS = ("empty", "new_empty")


class Launches(TorchDispatchMode):
    """Counts the ATen ops that launch a kernel: all but views and allocations, each as one launch.

    That is a lower bound, since many launch several (a convolution's backward, a batch norm), but for ops on lists of
    tensors (``_foreach_*``), of which those here launch one or two. Bytes are those of the tensors that an op is
    given and returns, each once.
    """

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        allocates = name.removeprefix("aten::").startswith(ALLOCATIONS)
        result = func(*args, **(kwargs or {}))
        if name.startswith("aten::") and not func.is_view and not allocates:
            self.count += 1
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def step(net):
    """Runs forward and backward on one batch; returns the launches of ATen's kernels and the bytes that they move."""
    torch.manual_seed(0)
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 1])
    images = images.contiguous(memory_format=torch.channels_last)
    alphas = {name: torch.zeros(14, 8, requires_grad=True) for name in ("normal", "reduce")}
    with Launches() as launches:
        loss = F.cross_entropy(net(images, {name: a.softmax(-1) for name, a in alphas.items()}), labels)
        gradients = torch.autograd.grad(loss, [*alphas.values(), *net.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    return launches.count, launches.bytes


def test_what_counts_as_a_launch():
    x = torch.ones(4, 4, requires_grad=True)
    with Launches() as launches:
        y = x[1:].unsqueeze(0).detach().view(-1).expand(2, 12)
        torch.empty_like(y)
    assert launches.count == launches.bytes == 0
    with Launches() as launches:
        (x.exp() * 2).sum()
    assert launches.count == 3
    assert launches.bytes == 4 * (16 + 16 + 16 + 16 + 16 + 1)
    with Launches() as launches:
        torch.autograd.grad(x.exp(), x, torch.ones(4, 4))
    assert launches.count == 3  # exp, ones, and the gradient's multiplication


@pytest.mark.slow
def test_a_supernet_launches_a_share_of_what_eager_does(emulated):
    """fastnas' launches are those of its own kernels, as the emulator counts them, and ATen's ops around them."""
    ours = Supernet(8, 3).to(memory_format=torch.channels_last)
    theirs = plain.Supernet(8, 3).to(memory_format=torch.channels_last)
    eager, eager_bytes = step(theirs)
    with fastnas.use_backend("emulated"):
        step(ours)  # plans are made once
        emulated.reset_counters()
        around, around_bytes = step(ours)
        counters = emulated.counters()
    kernels, moved = (sum(column) for column in zip(*counters.values(), strict=True))
    print(f"{kernels} kernels that move {moved:,} bytes, {around} ops around them that move {around_bytes:,}")
    print(f"plain PyTorch: {eager} ops that move {eager_bytes:,} bytes")
    for name, (launches, size) in sorted(counters.items(), key=lambda item: -item[1][0]):
        print(f"  {launches:5} {size / 2**20:9.2f} MiB  {name}")
    assert kernels >= 3 * 14
    assert kernels + around <= LAUNCHES * eager
    assert moved + around_bytes <= BYTES * eager_bytes
