"""Derived networks in evaluation: the op gives what the modules do, and is not used where they do something else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastnas
from fastnas.compat.darts import AmoebaNet, NASNet
from fastnas.genotype import Genotype, NASBench201Genotype
from fastnas.nn import NASBench201Network, Network, folded_cell
from fastnas.nn.derived import DerivedCell
from fastnas.nn.folded_cell import FoldedCell
from fastnas.spaces import get_space


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every cell that is one op."""
    found: list[int] = []
    evaluate = folded_cell.evaluate_cell
    monkeypatch.setattr(folded_cell, "evaluate_cell", lambda *args: found.append(1) or evaluate(*args))
    return found


def trained(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.3, 2)
            nn.init.normal_(m.weight, 0.3, 1)  # some are negative
            nn.init.normal_(m.bias, 0, 0.3)
            with torch.no_grad():
                m.weight[0] = 0
    return model.eval()


@torch.no_grad()
def assert_agrees(model: nn.Module, x: Tensor) -> None:
    with fastnas.use_backend("reference"):
        expected = model(x)
    scale = float(expected.abs().max())
    for format in (torch.contiguous_format, torch.channels_last):
        got = model(x.contiguous(memory_format=format))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale)


def darts(seed: int, channels: int = 6, layers: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    genotype = get_space("darts").sample(torch.Generator().manual_seed(seed))
    return trained(Network(genotype, channels, layers, num_classes=5))


def nb201(text: str, channels: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return trained(NASBench201Network(NASBench201Genotype.from_text(text), channels, 1))


FULL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(1, 12, 20), (3, 16, 8)])
def test_random_genotypes(calls: list[int], seed: int, size: tuple[int, int, int]) -> None:
    model = darts(seed, channels=(6, 18)[seed % 2])
    assert_agrees(model, torch.randn(size[0], 3, *size[1:]))
    unwired = sum(not cell._folded._wired for cell in model.cells)
    assert len(calls) == 2 * (3 - unwired)
    assert unwired == 0


@pytest.mark.parametrize(("genotype", "folded"), [(NASNet, 3), (AmoebaNet, 1)])
def test_published_cells_of_other_spaces(calls: list[int], genotype: Genotype, folded: int) -> None:
    torch.manual_seed(0)
    assert_agrees(trained(Network(genotype, 6, 3)), torch.randn(2, 3, 12, 12))
    assert len(calls) == 2 * folded


def test_imagenet_stem(calls: list[int]) -> None:
    genotype = get_space("darts").sample(torch.Generator().manual_seed(1))
    assert_agrees(trained(Network(genotype, 6, 3, stem="imagenet")), torch.randn(2, 3, 64, 32))
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        (FULL, True),
        ("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_3x3~2|", True),
        ("|nor_conv_3x3~0|+|none~0|none~1|+|avg_pool_3x3~0|none~1|nor_conv_3x3~2|", False),  # a node without inputs
        ("|nor_conv_3x3~0|+|none~0|none~1|+|avg_pool_3x3~0|none~1|none~2|", False),  # a node that nothing reads
        ("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|", False),
        ("|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|none~0|none~1|nor_conv_3x3~2|", False),  # mostly dense
    ],
)
def test_cells_of_nas_bench_201(calls: list[int], text: str, folded: bool) -> None:
    assert_agrees(nb201(text), torch.randn(3, 3, 12, 20))
    assert bool(calls) is folded


def test_float64(calls: list[int]) -> None:
    model, x = darts(0).double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        got = model(x)
        with fastnas.use_backend("reference"):
            torch.testing.assert_close(got, model(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


@torch.no_grad()
def test_what_changes_is_seen() -> None:
    model, x = darts(0), torch.randn(2, 3, 12, 12)
    cell = model.cells[0]
    model(x)
    norm = next(m for m in cell._ops.modules() if isinstance(m, nn.BatchNorm2d))
    conv = next(m for m in cell._ops.modules() if isinstance(m, nn.Conv2d))
    for change in (
        lambda: norm.weight.data.mul_(2),  # leaves no trace in a version counter
        lambda: norm.running_var.add_(1),
        lambda: setattr(norm, "eps", 0.5),
        lambda: conv.weight.data.mul_(3),
        lambda: model.load_state_dict(darts(0).state_dict(), assign=True),
        lambda: cell._ops.__setitem__(0, nn.Identity()),
        lambda: (model.train()(x), model.eval()),
        lambda: norm.train(),
    ):
        before = model(x)
        change()
        assert not torch.equal(model(x), before)
        if not norm.training:
            assert_agrees(model, x)


@pytest.mark.parametrize("where", ["edge", "inside"])
def test_hooks_are_called(calls: list[int], where: str) -> None:
    model, x = nb201(FULL), torch.randn(2, 3, 8, 8)
    seen = []
    layer = model.cells[0].layers[0]
    hook = (layer if where == "edge" else layer.op[1]).register_forward_hook(lambda *_: seen.append(1))
    assert_agrees(model, x)
    assert len(seen) == 3
    assert len(calls) == 2 * 2
    hook.remove()
    assert_agrees(model, x)
    assert len(calls) == 2 * 2 + 2 * 3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_modules_run_where_the_op_cannot(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nb201(FULL), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()  # a graph is wanted
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model.train()(x)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        copy.deepcopy(model).bfloat16()(x.bfloat16())
        torch.func.functional_call(model, dict(model.named_parameters()), (x[:0],))
        torch.func.vmap(model)(x[None])
        torch.jit.trace(model, x, check_trace=False)
        torch.export.export(model.cells[0], (torch.randn(2, 5, 8, 8),))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)  # more than twice the images
        model(x)
        assert calls == []
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        model(x)
    assert calls


@torch.no_grad()
def test_copies_stand_alone() -> None:
    model, x = darts(2), torch.randn(2, 3, 12, 12)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p in other.parameters():
            p.mul_(1.5)
        assert_agrees(other, x)
        assert torch.equal(model(x), expected)
    old = copy.deepcopy(model)
    for cell in old.cells:
        assert isinstance(cell, DerivedCell)
        del cell._folded
    torch.testing.assert_close(old(x), expected)


@torch.no_grad()
def test_a_primitive_of_another_shape_is_called(calls: list[int]) -> None:
    class Tall(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1]

    cell = FoldedCell([(0, 1, 1)], 1, [1])
    assert cell.run([Tall().eval()], [torch.randn(1, 4, 3, 3)]) is None
    assert calls == []


def test_inference_mode(calls: list[int]) -> None:
    model = darts(3)
    with torch.inference_mode():
        x = torch.randn(2, 3, 12, 12)
        got = model(x)
    with torch.no_grad(), fastnas.use_backend("reference"):
        torch.testing.assert_close(got, model(x.clone()), rtol=0, atol=1e-5 * float(got.abs().max()))
    assert len(calls) == 3
