"""torch.compile takes modules of fastnas as one graph, and computes what they do without it."""

import copy

import pytest
import torch

from fastnas.nn import MixedOp, Supernet

# torch.compile itself does these
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def _results(call, module, inputs, weights):
    """Outputs, gradients and all state after two forwards and a backward."""
    parameters = dict(module.named_parameters())
    call(*inputs)
    y = call(*inputs)
    wanted = [*weights, *parameters.values()]
    grads = torch.autograd.grad(y.float().square().sum(), wanted, allow_unused=True)
    names = [*(f"weights {i}" for i in range(len(weights))), *parameters]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True)), **{f"after: {k}": v for k, v in _state(module)}}


def _state(module):
    return [(k, v.clone()) for k, v in module.state_dict().items()]


def _check(module, inputs, weights, backend, **tolerance):
    twin = copy.deepcopy(module)
    before = dict(_state(module))
    compiled = _results(torch.compile(module, backend=backend, fullgraph=True), module, inputs, weights)
    plain = _results(twin, twin, inputs, weights)
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        if value is None:
            assert compiled[name] is None, name
        else:
            torch.testing.assert_close(compiled[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    counts = {k: int(v - before[k]) for k, v in _state(module) if k.endswith("num_batches_tracked")}
    assert counts
    assert set(counts.values()) == {2 if module.training else 0}


def _edge(stride, k):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6).requires_grad_()
    weights = torch.softmax(torch.randn(8), 0).requires_grad_()
    return MixedOp(8, stride, k=k), x, weights


@pytest.mark.parametrize(
    ("stride", "k", "training"), [(1, 1, True), (2, 1, True), (1, 2, True), (2, 2, True), (1, 1, False)]
)
def test_mixed_op(stride, k, training):
    module, x, weights = _edge(stride, k)
    _check(module.train(training), (x, weights), (x, weights), "aot_eager", rtol=0, atol=0)


@pytest.mark.slow
def test_mixed_op_under_inductor():
    module, x, weights = _edge(stride=2, k=2)
    _check(module, (x, weights), (x, weights), "inductor", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_supernet(amp):
    torch.manual_seed(0)
    primitives = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")  # fewer, since all is traced
    module = Supernet(4, 3, 10, 1, primitives=primitives, steps=1, multiplier=1).to(memory_format=torch.channels_last)
    weights = [torch.rand(2, 4).requires_grad_() for _ in range(2)]
    inputs = torch.randn(4, 1, 8, 8), dict(zip(("normal", "reduce"), weights, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
        _check(module, inputs, weights, "aot_eager", rtol=0, atol=0)
