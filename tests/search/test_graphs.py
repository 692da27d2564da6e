"""Recorded steps, with a recorder that works on the CPU as CUDA graphs do on a GPU."""

import copy
import dataclasses
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnas.search import Search, first_order, loop
from fastnas.search.graphs import WARM_UP, CudaRecorder, GraphedStep


class Tape(TorchDispatchMode):
    """Writes down every op with the very tensors that it reads and writes, and runs them again from there.

    As in a CUDA graph, no Python runs again, and what Python had read from a tensor stays as it was.
    """

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def play(self):
        for func, args, kwargs, out in self.ops:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


class TapeRecorder:
    """Has the interface of CudaRecorder."""

    made: ClassVar[list] = []

    def __init__(self, device=None):
        self.warm_ups, self.replays, self.generators = 0, 0, []
        self.made.append(self)

    def warm_up(self, work):
        self.warm_ups += 1
        work()

    def record(self, work, generators):
        self.generators.append(list(generators))
        tape = Tape()
        with tape:
            work()
        runs = 0

        def replay():
            nonlocal runs
            runs += 1
            self.replays += 1
            if runs > 1:  # to record runs the work, which a CUDA graph does not: that was the first time
                tape.play()

        return replay


class Sum:
    """A step: adds its input to a total, and counts in Python how often that ran."""

    def __init__(self):
        self.total, self.calls, self.shapes = torch.zeros(2, 2), 0, []

    def __call__(self, x, y):
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        self.total += x.sum() * y


def test_a_step_is_warmed_up_recorded_and_replayed():
    plain, inner, recorder = Sum(), Sum(), TapeRecorder()
    step = GraphedStep(inner, recorder)
    for i in range(WARM_UP + 4):
        x, y = torch.full((3,), float(i + 1)), torch.arange(4.0).view(2, 2)
        plain(x, y)
        step(x, y)
        assert torch.equal(inner.total, plain.total), i
    assert (recorder.warm_ups, recorder.replays) == (WARM_UP, 4)
    assert inner.calls == WARM_UP + 1, "no Python runs when a step is replayed"


@pytest.mark.parametrize("first", [0, 1, WARM_UP + 2], ids=["in the warm-up", "second", "after the recording"])
def test_other_shapes_run_the_step_itself(first):
    plain, inner, recorder = Sum(), Sum(), TapeRecorder()
    step = GraphedStep(inner, recorder)
    y = torch.ones(2, 2)
    step(torch.ones(3), y)
    plain(torch.ones(3), y)
    for i in range(WARM_UP + 4):
        x = torch.full((2 if i == first else 3,), float(i))
        plain(x, y)
        step(x, y)
        assert torch.equal(inner.total, plain.total)
    assert inner.shapes.count((2,)) == 1
    assert recorder.warm_ups == WARM_UP
    assert recorder.replays == 4


def test_inputs_are_copied_to_where_they_were_recorded():
    seen = []
    step = GraphedStep(lambda x: seen.append(x), TapeRecorder())
    given = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(WARM_UP + 2)]
    for x in given:
        step(x)
    own = seen[-1]
    assert own is not given[-1]
    assert torch.equal(own, given[-1])
    assert own.stride() == given[-1].stride()


def test_generators_are_registered():
    recorder, generator = TapeRecorder(), torch.Generator()
    step = GraphedStep(lambda x: None, recorder, [generator])
    for _ in range(WARM_UP + 1):
        step(torch.ones(1))
    assert recorder.generators == [[generator]]


def test_a_step_that_cannot_be_recorded():
    class Refuses(TapeRecorder):
        def record(self, work, generators):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    step = GraphedStep(lambda x: None, Refuses())
    for _ in range(WARM_UP):
        step(torch.ones(1))
    with pytest.raises(ValueError, match=r"cuda_graphs=True: .*\(operation not permitted when stream is capturing\)"):
        step(torch.ones(1))


@pytest.fixture
def graphed(images, monkeypatch):
    """Makes searches whose steps are recorded on tapes, or the same without recording."""
    monkeypatch.setattr(loop, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(TapeRecorder, "made", [])

    def make(config, graphs=True):
        config = dataclasses.replace(config)
        object.__setattr__(config, "cuda_graphs", graphs)  # the option itself wants a GPU
        search = Search(config, data=images)
        # What a GPU has: Adam's update without a step counter in Python.
        for group in search._alpha_optimizer.param_groups:
            group.update(fused=True, foreach=False)
        return search

    return make


def _bits(search):
    state = search.state_dict()
    tensors = tree_leaves([state[k] for k in ("supernet", "alphas", "weights", "totals")])
    optimizers = tree_leaves([state[f"{k}_optimizer"]["state"] for k in ("weight", "alpha")])
    return [t.clone() for t in [*tensors, *optimizers]]


def _same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _numbers(search):
    return [{**dataclasses.asdict(r), "seconds": 0, "peak_memory": 0} for r in search.history]


@pytest.mark.parametrize(
    "options",
    [{}, {"amp": "bf16"}, {"alpha_warmup": 2}, {"k": 2, "clip": 0.0, "momentum": 0.0}, {"cutout": 2, "flip": True}],
    ids=str,
)
def test_a_recorded_search_has_the_same_bits(tiny, graphed, options):
    config = dataclasses.replace(tiny, epochs=5, **options)  # the learning rate is another in each
    plain, recorded = graphed(config, graphs=False), graphed(config)
    plain.run()
    recorded.run()
    assert _same(_bits(plain), _bits(recorded))
    assert repr(_numbers(plain)) == repr(_numbers(recorded))  # NaN is as good as NaN
    (recorder,) = TapeRecorder.made
    alpha_steps = 2 * (config.epochs - config.alpha_warmup)
    assert recorder.warm_ups == 2 * WARM_UP
    assert recorder.replays == 2 * config.epochs + alpha_steps - 2 * WARM_UP


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "recorded"])
def test_a_recorded_search_resumes_exactly(tiny, graphed, graphs):
    config = dataclasses.replace(tiny, epochs=5)
    whole, first, second = graphed(config, graphs=False), graphed(config), graphed(config, graphs)
    whole.run()
    first.run(on_step=lambda s: s.stop() if (s.epoch, s.step) == (2, 1) else None)
    second.load_state_dict(first.state_dict())
    second.run()
    assert _same(_bits(whole), _bits(second))
    assert _numbers(whole) == _numbers(second)


def test_loading_a_state_drops_the_recording(tiny, graphed):
    config = dataclasses.replace(tiny, epochs=5)
    whole, search = graphed(config), graphed(config)
    start = copy.deepcopy(search.state_dict())
    whole.run()
    search.run()
    search.load_state_dict(start)
    assert search.epoch == 0
    search.run()
    assert _same(_bits(whole), _bits(search))
    assert len(TapeRecorder.made) == 3


def test_what_python_reads_in_a_step_would_stay_as_it_was(tiny, graphed, monkeypatch):
    """Why the steps must read nothing back, and that these tests would see it."""

    def reads(bilevel, train, valid):
        loss, logits = first_order(bilevel, train, valid)
        for alpha in bilevel.alphas.values():
            alpha.grad *= loss.item()
        return loss, logits

    monkeypatch.setattr(loop, "first_order", reads)
    config = dataclasses.replace(tiny, epochs=3)
    plain, recorded = graphed(config, graphs=False), graphed(config)
    plain.run()
    recorded.run()
    assert not _same(_bits(plain), _bits(recorded))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", [{}, {"amp": "bf16"}, {"alpha_warmup": 2}, {"k": 2}], ids=str)
def test_cuda_graphs(tiny, images, options):
    config = dataclasses.replace(tiny, epochs=5, device="cuda", **options)
    plain = Search(config, data=images)
    recorded = Search(dataclasses.replace(config, cuda_graphs=True), data=images)
    plain.run()
    recorded.run()
    assert _same(_bits(plain), _bits(recorded))
    assert repr(_numbers(plain)) == repr(_numbers(recorded))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_random_numbers_of_a_graph_go_on():
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    draws = torch.zeros(4, device=device)
    step = GraphedStep(
        lambda x: draws.copy_(torch.rand(4, generator=generator, device=device)), CudaRecorder(device), [generator]
    )
    seen = []
    for _ in range(WARM_UP + 3):
        step(draws)
        seen.append(draws.clone())
    expected = torch.Generator(device).manual_seed(0)
    for draw in seen:
        assert torch.equal(draw, torch.rand(4, generator=expected, device=device))
