"""Chance in a search: everything random of a forward, seeded, saved and drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor


class Chance:
    """A generator for relaxations, and torch's global ones for modules such as dropout.

    Inside a ``with`` block the global generators of the CPU and of the device are the search's; outside they are as
    they were.

    Args:
        device: Where the search runs.
        seed: Of all of them.

    Attributes:
        generator: On the device, for relaxations.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self._cuda = device if device.type == "cuda" else None
        self._outside: list[Tensor] | None = None
        self._inside = [torch.Generator().manual_seed(seed).get_state()]
        if self._cuda is not None:
            self._inside.append(torch.Generator(device).manual_seed(seed).get_state())

    def __enter__(self) -> Chance:
        self._outside = self._globals()
        self._set_globals(self._inside)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outside is not None
        self._inside = self._globals()
        self._set_globals(self._outside)
        self._outside = None

    def rewind(self) -> Callable[[], None]:
        """Returns a function that puts chance back to where it is now, to draw the same again."""
        own, global_ = self.generator.get_state(), self._globals()

        def back() -> None:
            self.generator.set_state(own)
            self._set_globals(global_)

        return back

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Runs the block, after which chance is where it was."""
        back = self.rewind()
        try:
            yield
        finally:
            back()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns where chance is, as tensors on the CPU."""
        states = self._inside if self._outside is None else self._globals()
        return {"generator": self.generator.get_state(), **dict(zip(("cpu", "cuda"), states, strict=False))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts chance where :meth:`state_dict` was taken.

        Generators of the CPU and of a GPU are not alike: what a state does not have, or has of the other kind, stays as
        it was seeded.
        """
        on_gpu = self._cuda is not None
        if on_gpu == ("cuda" in state):
            self.generator.set_state(state["generator"])
        if on_gpu and "cuda" in state:
            self._inside = [state["cpu"], state["cuda"]]
        else:
            self._inside[0] = state["cpu"]
        if self._outside is not None:
            self._set_globals(self._inside)

    def _globals(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._cuda is not None:
            states.append(torch.cuda.get_rng_state(self._cuda))
        return states

    def _set_globals(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(states[1], self._cuda)
