"""Searches in spaces whose layers do not have all candidates, in one of three layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnas.data import ImageData
from fastnas.nn.chain import Skeleton
from fastnas.report import write_page
from fastnas.search import METHODS, Search, SearchConfig
from fastnas.search.run import RunFolder
from fastnas.spaces import SPACES, ChainSpace, register


@pytest.fixture(autouse=True)
def space() -> Iterator[ChainSpace]:
    skeleton = Skeleton(4, 1, 0, ((4, 2, 2), (8, 1, 1)), 8, nn.ReLU6)
    primitives = ("mbconv3_3x3", "mbconv3_5x5", "mb3_3x3", "skip_connect")
    yield register(ChainSpace("chain-test", primitives, skeleton, projections=False))
    del SPACES["chain-test"]


def config(method: str = "darts", **options: object) -> SearchConfig:
    given = {"k": 1, "edge_normalization": False, "channels": 4, "batch_size": 16, "device": "cpu", "layers": 3}
    if method == "drnas-progressive":
        given = {n: v for n, v in given.items() if n != "k"} | {"stages": [[1, 0, 1, 0], [1, 2, 1, 0]]}
    elif method != "random":
        given |= {"epochs": 1, "alpha_warmup": 0}
    if METHODS[method].values.get("select") == "evaluate":
        given["candidates"] = 2
    return SearchConfig(space="chain-test", method=method, **{**given, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_searches(method: str, images: ImageData, space: ChainSpace) -> None:
    search = Search(config(method), data=images)
    before = [alpha.detach().clone() for alpha in search.alphas.values()]
    result = search.run()
    assert result.finished
    assert space.derive(space.encode(result.genotype)) == result.genotype
    absent = ~space.allowed["chain"]
    assert all(bool((weights["chain"][absent] == 0).all()) for weights in result.weights)
    assert all(float(weights["chain"].sum(1).sub(1).abs().max()) < 1e-5 for weights in result.weights)
    if search.config.order:
        moved = result.alphas["chain"] != before[0]
        assert bool(moved[~absent].any())
    if method == "drnas-progressive":
        assert ((result.weights[-1]["chain"] > 0).sum(1) == 2).all()


@pytest.mark.parametrize("select", ["evaluate", "random"])
def test_uniform_paths_take_what_is_there(select: str, images: ImageData) -> None:
    search = Search(config(relaxation="uniform", order=0, select=select, epochs=2, candidates=2), data=images)
    assert search.run().finished


def test_options_of_other_spaces_are_refused(images: ImageData) -> None:
    with pytest.raises(ValueError, match="k=4: the space 'chain-test' has no partial channels, set k to 1"):
        Search(config("pc-darts", k=4), data=images)
    with pytest.raises(ValueError, match="layers=8: the space 'chain-test' has 3"):
        Search(config(layers=8), data=images)
    with pytest.raises(ValueError, match="stage 2 has 4 operations, some edges 3"):
        Search(config("drnas-progressive", stages=[[1, 0, 1, 0], [1, 4, 1, 0]]), data=images)


def test_measures_of_candidates_that_there_are(images: ImageData) -> None:
    """Curvature, disturbed weights and memory savings see the weights of absent candidates at 0."""
    options = {"hessian": 1, "perturbation": "adversarial", "checkpoint_cells": True, "accumulate": 2}
    search = Search(config(**options), data=images)
    result = search.run()
    assert {"hessian/eigenvalue", "hessian/norm"} <= set(result.history[0].measures)
    assert result.history[0].entropy < (2 * torch.tensor(3.0).log() + torch.tensor(4.0).log()) / 3 + 1e-5


def test_the_run_is_drawn(images: ImageData, tmp_path: Path) -> None:
    settings = config()
    search = Search(settings, data=images)
    with RunFolder(tmp_path / "run") as folder:
        folder.start(settings)
        search.run(on_epoch=folder.record)
        (picture,) = folder.finish(search)
    assert picture.name == "cell.png"
    assert (tmp_path / "run" / "alphas.png").exists()
    assert "layer 2" in write_page(tmp_path / "run").read_text()
