"""Several architectures a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.search import Search, SearchConfig

CONFIG = {"space": "nb201", "method": "random-ws", "channels": 4, "layers": 1, "batch_size": 16, "candidates": 1}
CONFIG |= {"device": "cpu", "discrete": False, "epochs": 1, "clip": 0.0, "momentum": 0.0, "weight_decay": 0.0}
CONFIG |= {"nesterov": False}


def one_step(**options: object) -> tuple[list[dict[str, list[int]]], dict[str, Tensor], dict[str, Tensor]]:
    """Returns the paths of one step, and the parameters before and after it."""
    search = Search(SearchConfig(**{**CONFIG, **options}))
    paths: list[dict[str, list[int]]] = []
    search.supernet.register_forward_pre_hook(lambda m, a, k: paths.append(k["path"]), with_kwargs=True)
    before = {k: v.detach().clone() for k, v in search.supernet.named_parameters()}
    found: list[dict[str, Tensor]] = []

    def look(s: Search) -> None:
        found.append({k: v.detach().clone() for k, v in s.supernet.named_parameters()})
        s.stop()

    search.run(on_step=look)
    return paths, before, found[0]


def test_gradients_of_paths_are_averaged() -> None:
    paths, before, after = one_step(paths=3)
    assert len(paths) == 3
    search = Search(SearchConfig(**CONFIG))
    assert all(torch.equal(v, before[k]) for k, v in search.supernet.named_parameters())
    sums = {k: torch.zeros_like(v) for k, v in before.items()}
    images, labels = search._augmented(next(iter(search._train_batches)))
    search.supernet.train()
    for path in paths:
        search.supernet.zero_grad()
        weights = {"cell": torch.nn.functional.one_hot(torch.tensor(path["cell"]), 5).float()}
        torch.nn.functional.cross_entropy(search.supernet(images, weights, path=path), labels).backward()
        for k, v in search.supernet.named_parameters():
            sums[k] += 0 if v.grad is None else v.grad
    for k, v in before.items():
        torch.testing.assert_close(after[k], v - search.config.lr * sums[k] / 3, rtol=1e-4, atol=1e-6)


def test_fair_paths_have_every_candidate_once() -> None:
    paths, _, _ = one_step(fair=True)
    assert len(paths) == 5
    edges = torch.tensor([path["cell"] for path in paths])
    assert edges.sort(dim=0).values.tolist() == [[o] * 6 for o in range(5)]
    assert len({tuple(path["cell"]) for path in paths}) == 5


@pytest.mark.parametrize("space", ["darts", "nb1shot1-s1"])
def test_spaces_that_cannot_be_fair(space: str) -> None:
    with pytest.raises(ValueError, match="fair=True with space="):
        Search(SearchConfig(space=space, method="random-ws", channels=4, layers=3, fair=True, device="cpu"))


def test_paths_and_the_second_order() -> None:
    with pytest.raises(ValueError, match="paths with order=2"):
        SearchConfig(order=2, paths=2)
