"""A step reads nothing back from the device: on a GPU the host would wait for it there."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastnas.search import Search

# Their results, or the shapes of their results, are values of tensors.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2", "unique_dim"}


class NoReads(TorchDispatchMode):
    """Fails where something reads the values of a tensor; ``on_host`` lie in the host's memory on any machine."""

    def __init__(self, on_host=()):
        super().__init__()
        self.on_host = {t.data_ptr() for t in on_host}
        self.ops = 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in ("tolist", "numpy", "cpu"):  # which are no ops
            self.patch.setattr(torch.Tensor, name, self._refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    @staticmethod
    def _refuse(*args, **kwargs):
        raise AssertionError("a method reads a tensor back")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        name = func.overloadpacket.__name__
        tensors = [args[0]] if name in READS else []
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            tensors = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if any(t.data_ptr() not in self.on_host for t in tensors):
            raise AssertionError(f"{name} reads a tensor back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.sum().tolist(),
        lambda x: x.cpu(),
        lambda x: x.unique(),
    ],
)
def test_the_check_sees_reads(read):
    with pytest.raises(AssertionError, match="reads a tensor back"), NoReads():
        read(torch.ones(3))


@pytest.fixture
def stepped(tiny, images):
    """A search after its first step, in which optimizers make their state."""

    def make(**options):
        search = Search(dataclasses.replace(tiny, flip=True, cutout=2, **options), data=images)
        search.run(on_step=lambda s: s.stop())
        return search

    return make


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_step_reads_nothing_back(stepped, amp, k):
    search = stepped(amp=amp, k=k)
    # Adam counts its steps on the host where it is not fused, and the CPU's fused SGD reads its learning rate.
    on_host = [state["step"] for state in search._alpha_optimizer.state.values()]
    on_host += [group["lr"] for group in search._weight_optimizer.param_groups]
    before = [alpha.detach().clone() for alpha in search.alphas.values()]
    with NoReads(on_host) as mode:
        search._step(search.parts[0][: search.config.batch_size])
    assert mode.ops > 1000
    assert not any(torch.equal(a, b) for a, b in zip(before, search.alphas.values(), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_step_does_not_wait_for_the_gpu(stepped, amp):
    search = stepped(amp=amp, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        search._step(search.parts[0][: search.config.batch_size])
    finally:
        torch.cuda.set_sync_debug_mode("default")
