"""CUDA graphs: a step is recorded once, and from then on launched as a whole instead of kernel by kernel.

The rules are torch's (the notes on CUDA graphs, and the docstrings of ``torch.cuda.graph``): a recorded step

* has the same shapes each time, and finds and leaves everything in the same tensors;
* reads nothing back to the host: whatever Python decided or computed while it was recorded stays as it was;
* has run a few times before, on the stream that records it, so that nothing is set up for the first time inside;
* draws random numbers only from the device's default generator and from those that are registered with the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastnas._files import first_line

WARM_UP = 3
"""Ordinary runs of a step before it is recorded, as many as torch's own helper makes."""


class Recorder(Protocol):
    """Records work on tensors."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Runs ``work`` under the conditions of a recording."""

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Returns a function that repeats what ``work`` did to its tensors; recording itself does not count as a run.

        Args:
            work: called once, here.
            generators: what it draws random numbers from, besides the device's default generator.
        """


class CudaRecorder:
    """Records CUDA graphs, all on one stream and in one memory pool.

    Graphs may share a pool where each leaves what outlasts it in tensors of older origin, and one runs at a time.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Runs ``work`` on the stream that records, between what the current stream does before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Returns the launch of the graph of ``work``, on the current stream at the time."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class GraphedStep:
    """A step that is recorded after its first calls, which train as all the others do, and then replayed.

    Inputs are copied into the tensors that the recorded step reads. Inputs of other shapes than the first call's, such
    as a smaller last batch, run the step as it is. Where a tensor that the step works on is replaced by another, the
    step must be wrapped anew.

    Args:
        step: Works on device tensors. It returns nothing: what it leaves behind is in tensors that live on.
        recorder: Records it.
        generators: What the step draws random numbers from, besides the device's default generator.
    """

    def __init__(
        self, step: Callable[..., None], recorder: Recorder, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self._step = step
        self._recorder = recorder
        self._generators = generators
        self._warm_ups = 0
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        """Runs the step on ``inputs``.

        Raises:
            ValueError: where the step breaks a rule of CUDA graphs.
        """
        if not self._inputs:
            self._inputs = [torch.empty_like(x) for x in inputs]  # strides included
        if [_facts(x) for x in inputs] != [_facts(x) for x in self._inputs]:
            self._step(*inputs)
            return
        if self._warm_ups < WARM_UP:
            self._warm_ups += 1
            self._recorder.warm_up(partial(self._step, *inputs))
            return
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x, non_blocking=True)
        if self._replay is None:
            self._replay = self._record()
        self._replay()

    def _record(self) -> Callable[[], None]:
        try:
            return self._recorder.record(partial(self._step, *self._inputs), self._generators)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"cuda_graphs=True: the step cannot be recorded ({first_line(error)}); search without cuda_graphs"
            ) from error


def _facts(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.dtype, x.device
