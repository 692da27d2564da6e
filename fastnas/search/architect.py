"""The architecture step: where the gradient of the alphas comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and their labels (N,)."""


class Copies:
    """Room for copies of tensors, which is kept from one use to the next."""

    def __init__(self) -> None:
        self._room: list[Tensor] = []

    @contextmanager
    def restored(self, tensors: list[Tensor]) -> Iterator[list[Tensor]]:
        """Runs the block with copies of ``tensors``, to which it may write; they are put back bit for bit after it."""
        if [_layout(t) for t in self._room] != [_layout(t) for t in tensors]:
            self._room = [torch.empty_like(t, requires_grad=False) for t in tensors]
        _copy(self._room, tensors)
        try:
            yield self._room
        finally:
            _copy(tensors, self._room)


@dataclass(frozen=True)
class Bilevel:
    """The two levels of a search (arXiv:1806.09055, Eq. 3-4), as an architecture step sees them.

    Attributes:
        supernet: The network whose parameters are the lower level.
        optimizer: Trains those parameters; its state is what an unrolled step needs.
        alphas: The upper level: name -> (edges, primitives), leaves that require gradients.
        loss: Returns the mean loss and the logits of a batch at the current alphas and parameters.
        rewind: Called at the start of a step that takes several passes, it returns a function that puts all chance back
            to where it was then; it is called before every further pass, so that all share one draw. None where
            nothing is random. :func:`rewinding` makes one from generators.
        copies: Where a step keeps the parameters while it tries others.
    """

    supernet: nn.Module
    optimizer: torch.optim.Optimizer
    alphas: Mapping[str, Tensor]
    loss: Callable[[Batch], tuple[Tensor, Tensor]]
    rewind: Callable[[], Callable[[], None]] | None = None
    copies: Copies = field(default_factory=Copies, repr=False, compare=False)

    @property
    def parameters(self) -> list[Tensor]:
        """The lower level's tensors, as the optimizer has them: walking the modules takes longer than the update."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


Architect = Callable[[Bilevel, Batch, Batch], tuple[Tensor, Tensor]]
"""``architect(bilevel, train, valid)`` sets the alphas' ``grad`` and returns the loss and logits on ``valid``."""


def rewinding(generators: Iterable[torch.Generator]) -> Callable[[], Callable[[], None]]:
    """Returns what :class:`Bilevel` calls ``rewind``, for chance that comes from these generators."""
    sources = list(generators)

    def rewind() -> Callable[[], None]:
        states = [g.get_state() for g in sources]

        def back() -> None:
            for generator, state in zip(sources, states, strict=True):
                generator.set_state(state)

        return back

    return rewind


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Runs the block with none of ``parameters`` requiring gradients, and restores each one's flag after it."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def first_order(bilevel: Bilevel, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
    """Returns the loss and logits on ``valid``, whose gradient the alphas get (arXiv:1806.09055, Eq. 7 with xi = 0).

    The parameters are taken as they are, so ``train`` has no part in it, and their gradients are neither computed nor
    stored.
    """
    with frozen(bilevel.parameters):
        loss, logits = bilevel.loss(valid)
        alphas = list(bilevel.alphas.values())
        for alpha, gradient in zip(alphas, _gradients(loss, alphas), strict=True):
            alpha.grad = gradient
    return loss.detach(), logits.detach()


def second_order(bilevel: Bilevel, train: Batch, valid: Batch, *, radius: float = 0.01) -> tuple[Tensor, Tensor]:
    """Returns the loss and logits on ``valid`` after one step of the weights; the alphas get its gradient, through it.

    With w' = w − η (μ buffer + ∇w L_train(w) + λ w), the step that the optimizer would take next (learning rate η,
    momentum μ, weight decay λ, all its own; Nesterov's step where it takes that), the gradient is

        ∇α L_valid(w') − η [∇α L_train(w + R v) − ∇α L_train(w − R v)] / 2R,  v = ∇w' L_valid(w'),  R = radius / ‖v‖

    (arXiv:1806.09055, Eq. 6-8). Where groups of parameters have learning rates of their own, v holds them. A parameter
    that ``train`` does not reach stays where it is, as the optimizer leaves it.

    The four passes share one draw of all that ``bilevel.rewind`` puts back. Parameters and buffers, running statistics
    included, are afterwards as they were, bit for bit, whatever happens. Nothing is read back from the device.

    Args:
        bilevel: The search.
        train: What the weights would be trained on next.
        valid: What the alphas are trained on.
        radius: The length of R v; the error of the product grows with its square, that of rounding with its inverse.

    Raises:
        ValueError: where the optimizer is not SGD, or SGD with dampening or ``maximize``.
    """
    _check_unrolls(bilevel.optimizer)
    alphas = list(bilevel.alphas.values())
    parameters = [p for p in bilevel.parameters if p.requires_grad]
    again = _nothing if bilevel.rewind is None else bilevel.rewind()
    with bilevel.copies.restored([*parameters, *bilevel.supernet.buffers()]) as saved:
        original = dict(zip(parameters, saved, strict=False))
        with frozen(alphas):
            loss = bilevel.loss(train)[0]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        reached = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        _descend(bilevel.optimizer, reached)

        again()
        loss, logits = bilevel.loss(valid)
        parts = _gradients(loss, [*alphas, *reached])
        direct = parts[: len(alphas)]
        moved, directions = _directions(bilevel.optimizer, dict(zip(reached, parts[len(alphas) :], strict=True)))
        del gradients, parts, reached  # as large as the parameters each
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(directions)))
        # where v is 0, so is what it is divided by: the two sides are then equal, and no value need be read
        torch._foreach_mul_(directions, radius / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                _copy(moved, [original[p] for p in moved])
                torch._foreach_add_(moved, directions, alpha=sign)
            again()
            with frozen(parameters):
                sides.append(_gradients(bilevel.loss(train)[0], alphas))
    for alpha, gradient, plus, minus in zip(alphas, direct, *sides, strict=True):
        alpha.grad = gradient - (plus - minus) * (norm / (2 * radius))
    return loss.detach(), logits.detach()


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns d loss / d input for each input, zeros where the loss does not depend on it."""
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def _check_unrolls(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}: second order unrolls a step of torch.optim.SGD; use that or "
            "first order"
        )
    for group in optimizer.param_groups:
        for option in ("dampening", "maximize"):
            if group[option]:
                raise ValueError(f"optimizer has {option}={group[option]}: second order unrolls SGD without it")


@torch.no_grad()
def _descend(optimizer: torch.optim.Optimizer, gradients: Mapping[Tensor, Tensor]) -> None:
    """Moves parameters as the optimizer's step would, but leaves gradients and the optimizer's state as they are."""
    for group in optimizer.param_groups:
        chosen = [p for p in group["params"] if p in gradients]
        if not chosen:
            continue
        momentum, nesterov = group["momentum"], group["nesterov"]
        steps = torch._foreach_add([gradients[p] for p in chosen], chosen, alpha=group["weight_decay"])
        if nesterov:
            torch._foreach_mul_(steps, 1 + momentum)
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in chosen]
        pairs = [(step, buffer) for step, buffer in zip(steps, buffers, strict=True) if buffer is not None]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=momentum**2 if nesterov else momentum)
        torch._foreach_mul_(steps, _rate(group["lr"], chosen[0]))
        torch._foreach_sub_(chosen, steps)


def _directions(optimizer: torch.optim.Optimizer, v: Mapping[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns parameters and −(d w' / d ∇w L_train) v of each: v times what a step multiplies the gradient with."""
    moved: list[Tensor] = []
    directions: list[Tensor] = []
    for group in optimizer.param_groups:
        chosen = [p for p in group["params"] if p in v]
        if chosen:
            scaled = torch._foreach_mul([v[p] for p in chosen], _rate(group["lr"], chosen[0]))
            if group["nesterov"]:
                torch._foreach_mul_(scaled, 1 + group["momentum"])
            moved += chosen
            directions += scaled
    return moved, directions


def _rate(lr: float | Tensor, like: Tensor) -> float | Tensor:
    return lr.to(like.device, like.dtype, non_blocking=True).reshape(()) if isinstance(lr, Tensor) else lr


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.stride(), t.dtype, t.device


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _nothing() -> None:
    pass
