"""mixed_op against its reference: every kind of candidate, on every backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_checks import assert_close_by_norm, distance
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastnas
from fastnas.ops.mixed_op import Candidate, mixed_op

EVERY = [
    Candidate("none"),
    Candidate("max_pool", norm=True),
    Candidate("avg_pool", norm=True),
    Candidate("separable", kernel=3, stages=2),
    Candidate("separable", kernel=5, stages=2),
    Candidate("separable", kernel=3, dilation=2, stages=1),
    Candidate("separable", kernel=5, dilation=2, stages=1),
    Candidate("separable", kernel=7, stages=3),
    Candidate("max_pool"),
    Candidate("avg_pool"),
    Candidate("map"),
    Candidate("map", norm=True),
]


def darts(stride):
    """The eight candidates of DARTS."""
    skip = Candidate("skip") if stride == 1 else Candidate("map", norm=True)
    return [*EVERY[:3], skip, *EVERY[3:7]]


def every(stride):
    return [*EVERY, Candidate("skip")] if stride == 1 else EVERY


class Case:
    """Random arguments of one call; two cases of one seed are equal."""

    def __init__(self, candidates, shape, stride=1, dtype=torch.float64, device="cpu", given=False, seed=0, offset=0.0):
        torch.manual_seed(seed)
        n, c, h, w = shape
        self.candidates, self.stride, self.eps = candidates, stride, 1e-5

        def draw(*size, scale=1.0):
            value = (torch.randn(*size, dtype=torch.float64) * scale).to(dtype).to(torch.float64)
            return value.to(device=device, dtype=dtype).requires_grad_()

        self.x = draw(*shape)
        if offset:
            self.x = (self.x.detach() + offset).requires_grad_()
        self.weights = torch.rand(len(candidates), dtype=torch.float64).to(device=device, dtype=dtype).requires_grad_()
        self.params = [
            p
            for o in candidates
            for _ in range(o.stages)
            for p in (draw(c, 1, o.kernel, o.kernel, scale=1 / o.kernel), draw(c, c, 1, 1, scale=c**-0.5))
        ]
        out = (n, c, -(-h // stride), -(-w // stride))
        self.maps = [draw(*out) for o in candidates if o.kind == "map"]
        self.grad = draw(*out).detach()
        norms = sum(o.norms for o in candidates)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.statistics = None
        if given:
            draws = torch.randn(norms, c, dtype=compute), torch.rand(norms, c, dtype=compute) + 0.5
            self.statistics = tuple(s.to(device) for s in draws)

    def leaves(self):
        return [self.x, self.weights, *self.params, *self.maps]

    def call(self, backend, x=None):
        return mixed_op(
            self.x if x is None else x,
            *(self.weights, self.candidates, self.params, self.maps),
            stride=self.stride,
            statistics=self.statistics,
            eps=self.eps,
            backend=backend,
        )

    def run(self, backend, x=None):
        """Output, batch statistics and all gradients."""
        result = self.call(backend, x)
        grads = torch.autograd.grad(result.y, self.leaves(), self.grad.expand_as(result.y), materialize_grads=True)
        return [r.detach() for r in result if r is not None] + list(grads)

    def to(self, dtype):
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        for name in ("x", "weights", "grad"):
            setattr(other, name, getattr(self, name).detach().to(dtype).requires_grad_(name != "grad"))
        for name in ("params", "maps"):
            setattr(other, name, [t.detach().to(dtype).requires_grad_() for t in getattr(self, name)])
        return other


SHAPES = [(3, 5, 7, 9), (2, 16, 8, 8), (1, 4, 1, 3), (3, 17, 2, 1), (2, 36, 4, 6), (1, 1, 5, 5)]


@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_in_float64(place, shape, stride, given):
    backend, device = place
    n, _, h, w = shape
    if not given and n * -(-h // stride) * -(-w // stride) < 3:
        pytest.skip("two values a channel normalise to +1 and -1: gradients vanish")
    case = Case(every(stride), shape, stride, device=device, given=given)
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded", "transposed"])
def test_layouts(place, layout):
    backend, device = place
    case = Case(darts(1), (2, 6, 5, 7), device=device)
    with torch.no_grad():
        x = {
            "contiguous": lambda: torch.randn(2, 6, 5, 7, dtype=torch.float64),
            "channels_last": lambda: torch.randn(2, 6, 5, 7, dtype=torch.float64).contiguous(
                memory_format=torch.channels_last
            ),
            "sliced": lambda: torch.randn(4, 9, 5, 15, dtype=torch.float64)[::2, 1:7, :, ::2][..., :7],
            "expanded": lambda: torch.randn(2, 1, 5, 7, dtype=torch.float64).expand(2, 6, 5, 7),
            "transposed": lambda: torch.randn(2, 6, 7, 5, dtype=torch.float64).transpose(2, 3),
        }[layout]()
    case.x = x.to(device).requires_grad_()
    assert layout in ("contiguous", "channels_last") or device != "cpu" or not case.x.is_contiguous()
    case.grad = torch.randn(2, 1, 1, 7, dtype=torch.float64, device=device)  # as after .sum(): strides of 0
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_float32_error_is_at_most_twice_that_of_torch(place, stride):
    backend, device = place
    totals = {}
    for seed in range(3):
        case = Case(darts(stride), (4, 16, 8, 8), stride, torch.float32, device, seed=seed)
        exact = case.to(torch.float64).run("reference")
        for i, (a, b, e) in enumerate(zip(case.run(backend), case.run("reference"), exact, strict=True)):
            ours, torchs, norm = totals.get(i, (0.0, 0.0, 0.0))
            totals[i] = ours + distance(a, e) ** 2, torchs + distance(b, e) ** 2, norm + float(e.norm()) ** 2
    for i, (ours, torchs, norm) in totals.items():
        assert ours**0.5 <= 2 * max(torchs**0.5, torch.finfo(torch.float32).eps * norm**0.5), i
        assert ours**0.5 <= 1e-4 * norm**0.5, i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_error_is_at_most_twice_that_of_torch(place, dtype):
    backend, device = place
    totals = {}
    for seed in range(3):
        case = Case(darts(1), (3, 8, 6, 6), 1, dtype, device, seed=seed)
        exact = case.to(torch.float64).run("reference")
        for i, (a, b, e) in enumerate(zip(case.run(backend), case.run("reference"), exact, strict=True)):
            ours, torchs, norm = totals.get(i, (0.0, 0.0, 0.0))
            totals[i] = ours + distance(a, e) ** 2, torchs + distance(b, e) ** 2, norm + float(e.norm()) ** 2
    for i, (ours, torchs, norm) in totals.items():
        assert ours**0.5 <= 2 * max(torchs**0.5, torch.finfo(dtype).eps * norm**0.5), i


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_mean_far_above_the_deviation(place, offset):
    backend, device = place
    case = Case(darts(1), (4, 8, 8, 8), 1, torch.float32, device, offset=offset)
    exact = case.to(torch.float64).run("reference")
    for a, b, e in zip(case.run(backend), case.run("reference"), exact, strict=True):
        assert torch.isfinite(a).all()
        assert distance(a, e) <= 2 * max(distance(b, e), 1e-5 * float(e.norm()))


def test_constant_channel(place):
    backend, device = place
    case = Case(darts(1), (3, 4, 6, 6), device=device)
    with torch.no_grad():
        case.x[:, 1] = 0.7
        case.x[:, 2] = 0.0
    result = case.call(backend)
    assert (result.variance >= 0).all()
    assert result.variance[0, 1] == 0  # max pool of a constant
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-6)


def test_first_pixel_far_from_all_others(place):
    backend, device = place
    case = Case(darts(1), (2, 4, 6, 6), 1, torch.float32, device)
    with torch.no_grad():
        case.x[0, :, 0, 0] = 1e3
    exact = case.to(torch.float64).run("reference")
    for a, b, e in zip(case.run(backend), case.run("reference"), exact, strict=True):
        assert distance(a, e) <= 2 * max(distance(b, e), 1e-6 * float(e.norm()))


def test_nan_and_infinity_in_a_pooling_window(place):
    backend, device = place
    case = Case([Candidate("max_pool"), Candidate("avg_pool"), Candidate("skip")], (2, 3, 5, 5), device=device)
    with torch.no_grad():
        case.x[0, 0, 2, 2] = float("nan")
        case.x[0, 1, 0, 0] = float("inf")
        case.x[1, 2] = -float("inf")
    got, expected = case.run(backend), case.run("reference")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_ties_of_a_maximum_go_to_the_first(place):
    backend, device = place
    case = Case([Candidate("max_pool")], (2, 3, 6, 6), device=device)
    with torch.no_grad():
        case.x.copy_((torch.rand(2, 3, 6, 6) * 2).round())
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(place, stride):
    backend, device = place
    case = Case(darts(stride), (2, 3, 4, 4), stride, device=device, given=False)

    def run(*leaves):
        case.x, case.weights = leaves[:2]
        case.params = list(leaves[2 : 2 + len(case.params)])
        case.maps = list(leaves[2 + len(case.params) :])
        return case.call(backend).y

    assert torch.autograd.gradcheck(run, case.leaves(), fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "weights", "params", "maps"])
def test_each_gradient_alone_equals_that_of_all(place, wanted):
    backend, device = place
    case = Case(every(1), (2, 5, 4, 4), device=device)
    leaves = {"x": [case.x], "weights": [case.weights], "params": case.params, "maps": case.maps}
    result = case.call(backend)
    expected = torch.autograd.grad(result.y, leaves[wanted], case.grad)
    for name, tensors in leaves.items():
        for t in tensors:
            t.requires_grad_(name == wanted)
    result = case.call(backend)
    assert result.y.requires_grad
    got = torch.autograd.grad(result.y, leaves[wanted], case.grad)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_opcheck(place):
    backend, device = place
    ops = torch.ops.fastnas_emulated if backend == "emulated" else torch.ops.fastnas
    plan = [2, 1, 0, 1, 0, 4, 0, 3, 1, 2, 5, 1, 0, 1, 0]  # max_pool + norm, separable 3x3, map + norm
    case = Case([EVERY[1], EVERY[3], EVERY[11]], (2, 3, 4, 4), device=device)
    last = {"memory_format": torch.channels_last}
    x, grad = (t.detach().contiguous(**last) for t in (case.x, case.grad))
    params, maps = [p.detach() for p in case.params], [m.detach().contiguous(**last) for m in case.maps]
    weights = case.weights.detach()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.mixed_op.default, (x, weights, params, maps, plan, 1, [1e-5] * 4, None, None), test_utils=tests)
    _, outs, mean, invstd, _ = ops.mixed_op(x, weights, params, maps, plan, 1, [1e-5] * 4, None, None)
    rest = (mean, invstd, plan, 1, True, True, True, True)
    opcheck(ops._mixed_op_backward.default, (grad, x, weights, params, maps, outs, *rest), test_utils=tests)


def test_graph_kept_and_two_graphs_alive(place):
    backend, device = place
    one, two = (Case(darts(1), (2, 4, 5, 5), device=device, seed=s) for s in (0, 1))
    y1, y2 = one.call(backend).y, two.call(backend).y
    second = torch.autograd.grad(y2, two.leaves(), two.grad)
    first = torch.autograd.grad(y1, one.leaves(), one.grad, retain_graph=True)
    again = torch.autograd.grad(y1, one.leaves(), one.grad)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert_close_by_norm(first, one.run("reference")[3:], 1e-9)
    assert_close_by_norm(second, two.run("reference")[3:], 1e-9)


def test_checkpointing_and_saved_tensor_hooks(place):
    backend, device = place
    case = Case(darts(1), (2, 4, 5, 5), device=device)
    expected = torch.autograd.grad(case.call(backend).y, case.leaves(), case.grad)
    y = checkpoint(lambda x: case.call(backend, x).y, case.x, use_reentrant=False)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        z = case.call(backend).y
    for got in (torch.autograd.grad(y, case.leaves(), case.grad), torch.autograd.grad(z, case.leaves(), case.grad)):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    assert sum(tuple(s) == tuple(case.x.shape) for s in packed) == 7  # x and six stages: what is saved of an edge


def test_second_derivatives_are_refused_by_name_and_served_by_the_reference(place):
    backend, device = place
    case = Case(darts(1), (2, 3, 4, 4), device=device)
    (grad,) = torch.autograd.grad(case.call(backend).y, case.weights, case.grad, create_graph=True)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(grad.sum(), case.x)
    with fastnas.twice_differentiable():
        (grad,) = torch.autograd.grad(case.call(None).y, case.weights, case.grad, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), case.x)
    assert second.abs().sum() > 0


def test_pools_of_one_kind_with_different_eps(place):
    backend, device = place
    case = Case([EVERY[1], EVERY[2], EVERY[1], EVERY[2]], (2, 4, 5, 5), device=device)
    case.eps = [1e-5, 1e-2, 1.0, 0.5]
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


def test_kept_memory_is_bounded_and_given_back():
    import gc

    from fastnas import _C

    fastnas.release_memory()
    case = Case(darts(1), (4, 16, 16, 16), 1, torch.float32)
    gc.collect()
    lent = _C.arena()["lent"]
    one = case.call("native").y
    two = case.call("native").y
    maps = 6 * case.x.numel() * 4
    assert _C.arena()["lent"] - lent >= 2 * maps  # both graphs are alive
    expected = torch.autograd.grad(one, case.leaves(), case.grad, retain_graph=True)
    assert _C.arena()["lent"] - lent >= 2 * maps  # nothing goes back inside a backward
    del one
    gc.collect()
    assert maps <= _C.arena()["lent"] - lent < 2 * maps
    assert _C.arena()["kept"] >= maps
    for a, b in zip(torch.autograd.grad(two, case.leaves(), case.grad), expected, strict=True):
        assert torch.equal(a, b)
    del two, expected, a, b  # gradients of x are feature maps, too
    gc.collect()
    assert _C.arena()["lent"] == lent
    assert fastnas.release_memory() >= 2 * maps
    assert _C.arena()["kept"] == 0
    limit = _C.arena()["limit"]
    try:
        _C.arena_set_limit(maps // 2)
        case.run("native")
        assert _C.arena()["kept"] <= maps // 2
    finally:
        _C.arena_set_limit(limit)


def test_vmap_and_functional_gradients_use_the_reference():
    case = Case(darts(1), (2, 4, 5, 5))
    weights = torch.stack([case.weights.detach(), case.weights.detach().flip(0)])

    def loss(w):
        return mixed_op(case.x.detach(), w, case.candidates, [p.detach() for p in case.params], ()).y.square().sum()

    for got, w in zip(torch.func.vmap(torch.func.grad(loss))(weights), weights, strict=True):
        w = w.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(loss(w), w)[0])


def test_an_empty_batch(place):
    backend, device = place
    case = Case(darts(1), (0, 4, 5, 5), device=device, given=True)
    result = case.call(backend)
    assert result.y.shape == (0, 4, 5, 5)


def test_bits_do_not_depend_on_threads():
    case = Case(darts(1), (9, 16, 8, 8), 1, torch.float32)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(case.run("native"))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_same_bits_twice(place):
    backend, device = place
    case = Case(every(1), (3, 6, 5, 5), 1, torch.float32, device)
    for a, b in zip(case.run(backend), case.run(backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa):
    from fastnas import _C

    if isa not in _C.build_info()["cpu_isas"]:
        pytest.skip(f"this processor has no {isa}")
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_mixed_op import *
from fastnas import _C
assert _C.build_info()["cpu_isa"] == sys.argv[2]
for stride in (1, 2):
    for shape in [(3, 5, 7, 9), (2, 16, 8, 8), (2, 36, 4, 6)]:
        case = Case(every(stride), shape, stride)
        assert_close_by_norm(case.run("native"), case.run("reference"), 1e-9)
        case = Case(every(stride), shape, stride, torch.float32)
        assert_close_by_norm(case.run("native"), case.to(torch.float64).run("reference"), 1e-4)
"""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "FASTNAS_CPU": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, here, isa], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused():
    code = "import fastnas; print(fastnas._C.build_info())"
    environment = {**os.environ, "FASTNAS_CPU": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected plain, avx2 or avx512" in done.stderr


class TestErrors:
    def arguments(self):
        case = Case(darts(1), (2, 4, 5, 5), dtype=torch.float32)
        return {
            "x": case.x,
            "weights": case.weights,
            "candidates": case.candidates,
            "params": case.params,
            "maps": case.maps,
        }

    @pytest.mark.parametrize("backend", ["native", "reference"])
    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            ({"x": torch.zeros(4, 5, 5)}, ValueError, "x has 3 dimensions"),
            ({"x": torch.zeros(2, 4, 5, 5, dtype=torch.int64)}, TypeError, "floating"),
            ({"x": torch.zeros(2, 4, 5, 5, dtype=torch.float64)}, ValueError, r"params\[0\] has dtype"),
            ({"x": torch.zeros(2, 4, 5, 5, device="meta")}, ValueError, "weights is on cpu"),
            ({"x": torch.zeros(2, 5, 5, 5)}, ValueError, r"params\[0\] has shape"),
            ({"x": torch.zeros(1, 4, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
            ({"weights": torch.zeros(7)}, ValueError, r"weights has shape \(7,\): expected \(8,\)"),
            ({"weights": torch.zeros(8, dtype=torch.int64)}, TypeError, "weights has dtype"),
            ({"weights": [0.1] * 8}, TypeError, "weights is a list"),
            ({"candidates": []}, ValueError, "candidates is empty"),
            ({"params": []}, ValueError, "params has 0 tensors but the candidates need 12"),
            ({"maps": [torch.zeros(2, 4, 5, 5)]}, ValueError, "maps has 1 tensors but the candidates need 0"),
            ({"stride": 3}, ValueError, "stride is 3"),
            ({"stride": 2}, ValueError, "skip"),
            ({"eps": [1e-5]}, ValueError, "eps has 1 entries for 8"),
            ({"statistics": (torch.zeros(3, 4), torch.ones(3, 4))}, ValueError, "statistics must be"),
            ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ],
        ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "",
    )
    def test_each_names_the_argument(self, backend, change, kind, message):
        with pytest.raises(kind, match=message):
            mixed_op(**{**self.arguments(), "backend": backend, **change})

    def test_nan_weights_in_debug_mode(self):
        arguments = self.arguments()
        arguments["weights"] = torch.full((8,), float("nan"))
        mixed_op(**arguments)
        with fastnas.debug(), pytest.raises(ValueError, match="weights holds NaN"):
            mixed_op(**arguments)

    def test_candidates_check_themselves(self):
        with pytest.raises(ValueError, match="no separable candidate with kernel 4"):
            Candidate("separable", kernel=4, stages=1)
        with pytest.raises(ValueError, match="kind is 'dense'"):
            Candidate("dense")
        with pytest.raises(ValueError, match="has no batch norm"):
            Candidate("skip", norm=True)
