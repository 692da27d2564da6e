"""Tables of alphas and scores: what spaces do alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def draw(
    shapes: Mapping[str, tuple[int, int]],
    generator: torch.Generator | None,
    scale: float,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Returns a table of normal numbers of standard deviation ``scale`` for each shape; they require grad.

    They are drawn on the generator's device (the CPU where there is none) and then moved, so that a seed gives the same
    alphas on every device.
    """
    drawn_on = "cpu" if generator is None else generator.device
    return {
        name: (scale * torch.randn(shape, generator=generator, device=drawn_on))
        .to(drawn_on if device is None else device)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def checked(
    scores: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, int],
    rows: Sequence[object],
    *,
    row: str = "edge",
    column: str = "primitive",
) -> list[list[float]]:
    """Returns ``scores[name]`` as rows of numbers.

    Args:
        scores: the tables.
        name: the table's key.
        shape: what it must have.
        rows: how its rows are called in messages.
        row: what a row is.
        column: what a column is.

    Raises:
        ValueError: where the table is missing, has another shape, or has NaN.
    """
    if name not in scores or tuple(scores[name].shape) != shape:
        got = tuple(scores[name].shape) if name in scores else "nothing"
        raise ValueError(f"scores[{name!r}] must have shape {shape}, {row} x {column}, got {got}")
    table = scores[name].detach().to("cpu", torch.float64)
    if table.isnan().any():
        where = rows[int(table.isnan().any(dim=1).nonzero()[0])]
        raise ValueError(f"scores[{name!r}] has NaN on {row} {where}: the search diverged, nothing can be derived")
    numbers: list[list[float]] = table.tolist()
    return numbers


def one_hot(choices: Sequence[int | None], columns: int) -> Tensor:
    """Returns (rows, columns), with 1 in each row's chosen column and 0 elsewhere."""
    table = torch.zeros(len(choices), columns)
    for row, column in enumerate(choices):
        if column is not None:
            table[row, column] = 1.0
    return table


def choose(n: int, generator: torch.Generator | None) -> int:
    """Returns a random whole number below ``n``."""
    on = "cpu" if generator is None else generator.device
    return int(torch.randint(n, (), generator=generator, device=on))


def only_all_channels(space: str, k: int) -> None:
    """Checks that no partial channels are asked for.

    Raises:
        ValueError: where they are.
    """
    if k != 1:
        raise ValueError(f"k={k}: the space {space!r} has no partial channels, set k to 1")
