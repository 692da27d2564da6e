"""Index sets: splits of a data set, batches that a resumed run continues exactly, and their way to a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def split(n: int, portion: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Returns the indices of the first ⌊portion·n⌋ of n examples and those of the rest, `(train, valid)`, int64.

    Args:
        n: number of examples.
        portion: share of the first part, between 0 and 1.
        generator: shuffles the examples first; None keeps their order, as the DARTS code does.

    Raises:
        ValueError: either part would be empty.
    """
    first = math.floor(n * portion) if 0 < portion < 1 else 0
    if not 0 < first < n:
        raise ValueError(f"portion={portion} of n={n} leaves one part empty; choose one well between 0 and 1")
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator, device=generator.device)
    return order[:first], order[first:]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns `x` on `device`, without waiting for a GPU to have done what it was given before.

    Only memory that is pinned is copied to a GPU while the host goes on.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Batches:
    """Random batches of an index set.

    `for batch in batches` goes through one epoch: every index once, in an order that is new each epoch. A loop that was
    left early, or a state that was saved inside one, is taken up where it stopped: the next loop runs over what is left
    of that epoch. `sample()` is independent of the epochs: a batch drawn from the whole set.

    Args:
        indices: int64 (N,), for example from `split`.
        batch_size: indices a batch.
        seed: of the private random generator; the order depends on nothing else.
        drop_last: leave out an epoch's last batch when it is smaller than the others.
    """

    def __init__(self, indices: Tensor | Sequence[int], batch_size: int, *, seed: int, drop_last: bool = False) -> None:
        self.indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        self.batch_size = batch_size
        self.drop_last = drop_last
        if self.indices.ndim != 1 or len(self.indices) == 0:
            raise ValueError(f"indices must be (N,) and not empty, not {tuple(self.indices.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if drop_last and batch_size > len(self.indices):
            raise ValueError(
                f"batch_size={batch_size} is larger than the {len(self.indices)} indices, and drop_last would leave "
                "no batch; choose a smaller batch_size or drop_last=False"
            )
        self._generator = torch.Generator().manual_seed(seed)
        self._order: Tensor | None = None  # of the epoch in hand
        self._done = 0  # batches of that epoch handed out

    def __len__(self) -> int:
        """Returns the number of batches in a whole epoch."""
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the batches that are left of the epoch in hand, or else those of a new epoch; int64 (B,)."""
        if self._order is None:
            self._order = torch.randperm(len(self.indices), generator=self._generator)
            self._done = 0
        while self._order is not None and self._done < len(self):
            start = self._done * self.batch_size
            self._done += 1
            yield self.indices[self._order[start : start + self.batch_size]]
        self._order = None

    def endless(self) -> Iterator[Tensor]:
        """Yields the batches of one epoch after another, without end."""
        while True:
            yield from self

    def sample(self) -> Tensor:
        """Returns a batch drawn from the whole set, int64 (B,): no index twice in it, and no memory of earlier batches.

        This is what `next(iter(valid_queue))` draws in the DARTS code (arXiv 1806.09055).
        """
        order = torch.randperm(len(self.indices), generator=self._generator)
        return self.indices[order[: self.batch_size]]

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs: tensors and integers only."""
        return {
            "generator": self._generator.get_state(),
            "order": None if self._order is None else self._order.clone(),
            "done": self._done,
            "batch_size": self.batch_size,
            "indices": len(self.indices),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where the saved batches stood.

        Raises:
            ValueError: the state is of another batch size or of an index set of another length.
        """
        for argument, own in (("batch_size", self.batch_size), ("indices", len(self.indices))):
            if state[argument] != own:
                raise ValueError(
                    f"state was saved with {argument}={state[argument]} and these batches have {own}; "
                    "resume with the options of the saved run"
                )
        self._generator.set_state(state["generator"].cpu())
        order = state["order"]
        self._order = None if order is None else order.to("cpu", copy=True)
        self._done = state["done"]
