"""mixed_cell against its reference: whole cells on every backend."""

from collections import defaultdict
from statistics import median

import pytest
import torch
from op_checks import assert_close_by_norm, distance
from torch.library import opcheck

import fastnas
from fastnas.ops.mixed_cell import CellEdge, fits, mixed_cell
from fastnas.ops.mixed_op import Candidate, mixed_op
from fastnas.ops.partial_channels import partial_channels, partial_channels_split

DARTS = (
    Candidate("none"),
    Candidate("max_pool", norm=True),
    Candidate("avg_pool", norm=True),
    Candidate("skip"),
    Candidate("separable", kernel=3, stages=2),
    Candidate("separable", kernel=5, stages=2),
    Candidate("separable", kernel=3, dilation=2, stages=1),
    Candidate("separable", kernel=5, dilation=2, stages=1),
)
NASBENCH201 = (
    Candidate("none"),
    Candidate("skip"),
    Candidate("conv", kernel=1, stages=1),
    Candidate("conv", kernel=3, stages=1),
    Candidate("avg_pool"),
)
MIXTURE = (
    Candidate("max_pool"),
    Candidate("max_pool", norm=True),
    Candidate("avg_pool"),
    Candidate("conv", kernel=3, stages=2),
    Candidate("separable", kernel=3, stages=2),
    Candidate("skip"),
    Candidate("max_pool", norm=True),
)


def wiring(candidates, inputs, nodes, stride=1):
    """All edges between states, numbered by node; a skip with stride 2 is a map, as FactorizedReduce is."""
    edges = []
    for node in range(inputs, inputs + nodes):
        for source in range(node):
            reduces = stride == 2 and source < inputs
            row = tuple(Candidate("map", norm=True) if reduces and o.kind == "skip" else o for o in candidates)
            edges.append(CellEdge(source, node, stride if reduces else 1, len(edges), row))
    return sorted(edges)


WIRINGS = {
    "darts": wiring(DARTS, 2, 3),
    "darts reduction": wiring(DARTS, 2, 3, 2),
    "nasbench201": wiring(NASBENCH201, 1, 3),
    "mixture": wiring(MIXTURE, 2, 2),
    "mixture reduction": wiring(MIXTURE, 2, 2, 2),
    "sparse": [e for e in wiring(MIXTURE, 3, 2) if e.source != 1],  # no edge leaves an input
}


class Case:
    """Random arguments of one call."""

    def __init__(
        self, name, shape=(2, 6, 8, 6), concat=2, dtype=torch.float64, device="cpu", given=False, seed=0, k=1, beta=None
    ):
        torch.manual_seed(seed)
        self.edges, self.concat, self.k = WIRINGS[name], concat, k
        n, c, h, w = shape
        c //= k  # of the candidates
        stride = self.edges[0].stride

        def draw(*size, scale=1.0):
            return (torch.randn(*size, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()

        count = min(e.node for e in self.edges)
        self.inputs = [draw(*shape) for _ in range(count)]
        if stride == 2 and name == "sparse":
            raise ValueError(name)
        rows = max(e.row for e in self.edges) + 1
        self.weights = torch.rand(rows, len(self.edges[0].candidates), dtype=torch.float64)
        self.weights = self.weights.to(device, dtype).requires_grad_()
        self.edge_weights = draw(rows) if (k > 1 if beta is None else beta) else None
        every = [o for e in self.edges for o in e.candidates]
        self.params = [draw(*s, scale=(s[1] * s[2] * s[3]) ** -0.5) for o in every for s in o.shapes(c)]
        out = (n, c, -(-h // stride), -(-w // stride))
        self.maps = [draw(*out) for o in every if o.kind == "map"]
        self.grad = draw(n, concat * c * k, *out[2:]).detach()
        self.eps = [1e-5 * (1 + i % 3) for i in range(sum(o.norms for o in every))]
        self.statistics = None
        if given:
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            size = (len(self.eps), c)
            self.statistics = (
                torch.randn(size, dtype=compute).to(device),
                torch.rand(size, dtype=compute).to(device) + 1,
            )

    def leaves(self):
        factors = [] if self.edge_weights is None else [self.edge_weights]
        return [*self.inputs, self.weights, *self.params, *self.maps, *factors]

    def call(self, backend):
        return mixed_cell(
            *(self.inputs, self.weights, self.edges, self.params, self.maps),
            **{"concat": self.concat, "eps": self.eps, "statistics": self.statistics, "backend": backend},
            **{"k": self.k, "edge_weights": self.edge_weights},
        )

    def run(self, backend):
        result = self.call(backend)
        grads = torch.autograd.grad(result.y, self.leaves(), self.grad, allow_unused=True, materialize_grads=True)
        return [r.detach() for r in result if r is not None] + list(grads)

    def to(self, dtype):
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        other.weights = self.weights.detach().to(dtype).requires_grad_()
        other.grad = self.grad.to(dtype)
        if self.edge_weights is not None:
            other.edge_weights = self.edge_weights.detach().to(dtype).requires_grad_()
        for name in ("inputs", "params", "maps"):
            setattr(other, name, [t.detach().to(dtype).requires_grad_() for t in getattr(self, name)])
        return other


@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
@pytest.mark.parametrize("concat", [1, 2])
@pytest.mark.parametrize("name", WIRINGS)
def test_equals_the_reference_in_float64(place, name, concat, given):
    backend, device = place
    case = Case(name, concat=concat, device=device, given=given)
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


@pytest.mark.parametrize("beta", [False, True], ids=["", "edge weights"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("concat", [1, 2])
@pytest.mark.parametrize("name", WIRINGS)
def test_partial_channels_equal_the_reference_in_float64(place, name, concat, k, beta):
    backend, device = place
    case = Case(name, (2, 12, 8, 6), concat, device=device, k=k, beta=beta)
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 1, 3), (3, 17, 2, 2), (2, 36, 4, 6), (2, 1, 5, 5), (5, 8, 3, 2)], ids=str)
@pytest.mark.parametrize("name", ["darts reduction", "nasbench201", "mixture"])
def test_odd_shapes(place, name, shape):
    backend, device = place
    n, _, h, w = shape
    stride = WIRINGS[name][0].stride
    if n * -(-h // stride) * -(-w // stride) < 3:
        pytest.skip("two values a channel normalise to +1 and -1: gradients vanish")
    case = Case(name, shape, device=device)
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "k"), [("darts", 1), ("darts reduction", 1), ("nasbench201", 1), ("darts", 2), ("darts reduction", 2)]
)
def test_error_is_at_most_twice_that_of_torch(place, name, k, dtype):
    backend, device = place
    runs = defaultdict(list)
    for seed in range(9):
        case = Case(name, (3, 8 * k, 6, 6), dtype=dtype, device=device, seed=seed, k=k)
        exact = case.to(torch.float64).run("reference")
        for i, (a, b, e) in enumerate(zip(case.run(backend), case.run("reference"), exact, strict=True)):
            runs[i].append((distance(a, e), distance(b, e), float(e.norm())))
    for i, errors in runs.items():
        # Medians: where rounding turns a ReLU or moves a maximum, one seed's error is that of the kink. Some roundings
        # on top, since torch's may be few by luck.
        ours, torchs, norm = (median(column) for column in zip(*errors, strict=True))
        assert ours <= 2 * torchs + (4 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * norm, i


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts(place, layout, k):
    backend, device = place
    case = Case("darts", device=device, k=k)
    wide = torch.randn(2, 9, 8, 12, dtype=torch.float64)
    x = {
        "contiguous": lambda: wide[:, :6, :, :6].contiguous(),
        "channels_last": lambda: wide[:, :6, :, :6].contiguous(memory_format=torch.channels_last),
        "sliced": lambda: wide[:, 1:7, :, ::2],
        "expanded": lambda: wide[:, :1, :, :6].expand(2, 6, 8, 6),
    }[layout]()
    case.inputs[0] = x.to(device).detach().requires_grad_()
    case.grad = torch.randn(2, 1, 1, 6, dtype=torch.float64, device=device).expand(2, 12, 8, 6)
    assert_close_by_norm(case.run(backend), case.run("reference"), 1e-9)


@pytest.mark.parametrize(("name", "k"), [("darts reduction", 1), ("nasbench201", 1), ("darts reduction", 2)])
def test_gradcheck(place, name, k):
    backend, device = place
    case = Case(name, (2, 2 * k, 4, 4), device=device, k=k)

    def run(*leaves):
        leaves = list(leaves)
        case.inputs = [leaves.pop(0) for _ in case.inputs]
        case.weights = leaves.pop(0)
        case.params = [leaves.pop(0) for _ in case.params]
        case.maps = [leaves.pop(0) for _ in case.maps]
        case.edge_weights = leaves.pop() if leaves else None
        return case.call(backend).y

    assert torch.autograd.gradcheck(run, case.leaves(), fast_mode=True)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("wanted", ["inputs", "weights", "edge_weights", "params", "maps"])
def test_each_gradient_alone_equals_that_of_all(place, wanted, k):
    backend, device = place
    case = Case("darts reduction", device=device, k=k, beta=True)
    leaves = {"inputs": case.inputs, "weights": [case.weights], "params": case.params, "maps": case.maps}
    leaves["edge_weights"] = [case.edge_weights]
    expected = torch.autograd.grad(case.call(backend).y, leaves[wanted], case.grad)
    for name, tensors in leaves.items():
        for t in tensors:
            t.requires_grad_(name == wanted)
    got = torch.autograd.grad(case.call(backend).y, leaves[wanted], case.grad)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [1, 3])
def test_opcheck(place, k):
    backend, device = place
    ops = torch.ops.fastnas_emulated if backend == "emulated" else torch.ops.fastnas
    case = Case("mixture", (2, 3, 4, 4), concat=1, device=device, k=k)
    last = {"memory_format": torch.channels_last}
    inputs, params = [i.detach().contiguous(**last) for i in case.inputs], [p.detach() for p in case.params]
    plan = [v for e in case.edges for o in e.candidates for v in o.row]
    edges = [v for e in case.edges for v in e[:4]]
    weights, tests = case.weights.detach(), ("test_schema", "test_autograd_registration", "test_faketensor")
    factors = None if k == 1 else case.edge_weights.detach()
    arguments = (inputs, weights, factors, params, [], plan, edges, 1, k, case.eps, None, None)
    opcheck(ops.mixed_cell.default, arguments, test_utils=tests)
    y, states, outs, mean, invstd, _ = ops.mixed_cell(*arguments)
    grad = case.grad.contiguous(**last)
    rest = (weights, factors, params, [], outs, mean, invstd, plan, edges, 1, k, True, [1, 0], True, True, False)
    opcheck(ops._mixed_cell_backward.default, (grad, inputs, y, states, *rest), test_utils=tests)


def test_graph_kept_and_two_graphs_alive(place):
    backend, device = place
    one, two = (Case("darts", device=device, seed=s) for s in (0, 1))
    y1, y2 = one.call(backend).y, two.call(backend).y
    second = torch.autograd.grad(y2, two.leaves(), two.grad)
    first = torch.autograd.grad(y1, one.leaves(), one.grad, retain_graph=True)
    again = torch.autograd.grad(y1, one.leaves(), one.grad)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert_close_by_norm(first, one.run("reference")[3:], 1e-9)
    assert_close_by_norm(second, two.run("reference")[3:], 1e-9)


@pytest.mark.parametrize("k", [1, 2])
def test_same_bits_for_any_number_of_threads(k):
    case = Case("darts reduction", (6, 8, 16, 16), dtype=torch.float32, k=k)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run("native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives_are_served_by_the_reference():
    case = Case("darts", (2, 3, 4, 4))
    (grad,) = torch.autograd.grad(case.call("native").y, case.weights, case.grad, create_graph=True)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(grad.sum(), case.inputs[0])
    with fastnas.twice_differentiable():
        (grad,) = torch.autograd.grad(case.call(None).y, case.weights, case.grad, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), case.inputs[0])
    assert second.abs().sum() > 0


def test_empty_batches_and_large_cells_run_on_the_reference():
    case = Case("darts", (0, 3, 4, 4), given=True)
    assert case.call("native").y.shape == (0, 6, 4, 4)
    large = wiring(DARTS, 1, 9)
    assert fits(WIRINGS["darts"])
    assert not fits(large)
    torch.manual_seed(0)
    params = [torch.randn(s) for e in large for o in e.candidates for s in o.shapes(2)]
    x, weights = torch.randn(2, 2, 3, 3), torch.rand(len(large), 8)
    with fastnas.use_backend("reference"):
        expected = mixed_cell([x], weights, large, params, concat=1).y
    assert torch.equal(mixed_cell([x], weights, large, params, concat=1).y, expected)


def test_many_partially_connected_edges_run_on_the_reference():
    skip = (Candidate("skip"),)
    many = [CellEdge(source, 9, 1, source, skip) for source in range(9)]
    assert fits(many)
    assert not fits(many, 2)
    states = [torch.randn(2, 4, 3, 3) for _ in range(9)]
    expected = sum(states)[:, [0, 2, 1, 3]]
    torch.testing.assert_close(mixed_cell(states, torch.ones(9, 1), many, concat=1, k=2).y, expected)


def test_partial_channels_are_those_of_edges_one_by_one(place):
    """A node: sum of beta * partial_channels(mixed_op(active), bypass), here with ties and NaN in the pooled bypass."""
    backend, device = place
    case = Case("sparse", (2, 6, 4, 4), device=device, k=3)
    edges = [
        CellEdge(0, 2, 2, 0, (Candidate("avg_pool"),)),
        CellEdge(1, 2, 1, 1, (Candidate("avg_pool"),)),
        CellEdge(1, 3, 1, 2, (Candidate("avg_pool"),)),
    ]
    x = [torch.randint(-1, 2, (2, 6, 8, 8)).double().to(device), case.inputs[0].detach()]
    x[0][0, 3, 2, 1] = float("nan")
    x = [t.requires_grad_() for t in x]
    weights, beta = case.weights[:3, :1].detach(), case.edge_weights[:3].detach()
    y = mixed_cell(x, weights, edges, concat=2, k=3, edge_weights=beta, backend=backend).y
    nodes = []
    for node in (2, 3):
        ends = []
        for e in (e for e in edges if e.node == node):
            active, bypass = partial_channels_split(x[e.source], 3, e.stride, backend="reference")
            mixed = mixed_op(active, weights[e.row], e.candidates, stride=e.stride, backend="reference").y
            ends.append(beta[e.row] * partial_channels(mixed, bypass))
        nodes.append(sum(ends))
    expected = torch.cat(nodes, 1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"inputs": []}, "neither empty"),
        (lambda c: {"inputs": [c.inputs[0], c.inputs[1][:, :3]]}, r"inputs\[1\] has shape \(2, 3, 8, 6\)"),
        (lambda c: {"inputs": [c.inputs[0], c.inputs[1][:, :, :4]]}, r"gives maps of \(4, 6\): expected \(8, 6\)"),
        (lambda c: {"edges": c.edges[::-1]}, "sorted by source"),
        (lambda c: {"edges": [c.edges[0]._replace(stride=2), *c.edges[1:]]}, "stride"),
        (lambda c: {"edges": [c.edges[0]._replace(node=0), *c.edges[1:]]}, "leads from state 0 to 0"),
        (lambda c: {"edges": [e for e in c.edges if e.node != 2]}, "state 2 has no edge in"),
        (lambda c: {"edges": [c.edges[0]._replace(row=1), *c.edges[1:]]}, "different rows"),
        (lambda c: {"edges": [c.edges[0]._replace(row=-1), *c.edges[1:]]}, "different rows"),
        (lambda c: {"inputs": c.inputs[0]}, "inputs must be a sequence"),
        (lambda c: {"concat": 4}, "concat=4: expected 1 to 3"),
        (lambda c: {"weights": c.weights[:3]}, r"weights has shape \(3, 8\): expected at least 9 rows of 8"),
        (lambda c: {"params": c.params[1:]}, "params has shapes"),
        (lambda c: {"maps": [c.inputs[0]]}, "maps has shapes"),
        (lambda c: {"params": [p.float() for p in c.params]}, "params must have the dtype"),
        (lambda c: {"k": 4}, "k=4 does not divide the 6 channels"),
        (lambda c: {"k": 2}, "params has shapes"),
        (
            lambda c: {"edge_weights": torch.ones(8)},
            r"edge_weights has shape \(8,\) on cpu: expected one entry .* 9 rows",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    case = Case("darts")
    arguments = {n: getattr(case, n) for n in ("inputs", "weights", "edges", "params", "maps", "concat", "eps")}
    with pytest.raises(ValueError, match=message):
        mixed_cell(**{**arguments, **change(case)})


def test_odd_sizes_cannot_be_halved_with_partial_channels():
    case = Case("darts reduction", (2, 6, 8, 5))
    with pytest.raises(ValueError, match=r"inputs\[0\] is 8x5: with k > 1 and stride 2"):
        mixed_cell(case.inputs, case.weights, case.edges, concat=1, k=2)


@pytest.mark.parametrize(
    ("name", "value"), [("weights", [[1.0]]), ("params", [1]), ("maps", ["x"]), ("edge_weights", [1.0])]
)
def test_other_types_name_the_argument(name, value):
    case = Case("darts")
    arguments = {n: getattr(case, n) for n in ("inputs", "weights", "edges", "params", "maps", "concat", "eps")}
    with pytest.raises(TypeError, match=name):
        mixed_cell(**{**arguments, name: value})
