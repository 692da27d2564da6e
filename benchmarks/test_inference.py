"""Trained networks in evaluation: one forward of a derived network, without a graph.

The baseline is the same modules in plain PyTorch: every operation is called, none is fastnas'.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.measure import errors, in_turn, memory, replay
from fastnas.compat.darts import DARTS_V2
from fastnas.genotype import NASBench201Genotype
from fastnas.nn import NASBench201Network, Network
from fastnas.nn.operations import FactorizedReduce, ReLUConvBN

pytestmark = pytest.mark.benchmark(timer=replay)

NB201 = NASBench201Genotype.from_text(
    "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"
)
# space, C, cells (of a stage in nb201), batch, H = W
SHAPES = [("darts", 36, 20, 1, 32), ("darts", 36, 20, 64, 32), ("nb201", 16, 5, 1, 32), ("nb201", 16, 5, 64, 32)]
QUICK = [("darts", 4, 3, 2, 8), ("nb201", 4, 1, 2, 8)]
Shape = tuple[str, int, int, int, int]
NAMES = {"nb201": "NAS-Bench-201", "darts": "DARTS"}
VARIANTS = ("fastnas", "eager", "eager channels_last")


def title(shape: Shape) -> str:
    space, channels, cells, batch, size = shape
    what = f"3 x {cells} cells" if space == "nb201" else f"{cells} cells"
    return f"evaluation, {NAMES[space]} network, C {channels}, {what}, batch {batch}, {size}x{size}"


def network(shape: Shape) -> nn.Module:
    """Returns a network whose batch norms have statistics and parameters as after training."""
    space, channels, cells, *_ = shape
    torch.manual_seed(0)
    net = Network(DARTS_V2, channels, cells) if space == "darts" else NASBench201Network(NB201, channels, cells)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.weight, 1, 0.2)
            nn.init.normal_(m.bias, 0, 0.2)
    return net.eval()


def plain(net: nn.Module) -> nn.Module:
    """Returns a copy that runs in plain PyTorch."""
    net = copy.deepcopy(net)

    def reduce(m: FactorizedReduce, x: Tensor) -> Tensor:
        x = m.relu(x)
        return m.bn(torch.cat([m.conv_1(x), m.conv_2(x[:, :, 1:, 1:])], dim=1))

    for m in net.modules():
        if hasattr(m, "_folded"):
            m._folded = None
        if isinstance(m, ReLUConvBN):
            m.forward = m.op.forward
        elif isinstance(m, FactorizedReduce):
            m.forward = reduce.__get__(m)
    return net


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, Any]]]:
    return {}


@pytest.mark.parametrize("runner", VARIANTS)
def test_inference(
    shape: Shape,
    runner: str,
    device: str,
    measured: dict[str, dict[str, dict[str, Any]]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    quick = request.config.getoption("--quick")
    group = title(shape)
    if group not in measured:
        rounds = request.config.getoption("--rounds") or (3 if quick else 20)
        measured[group] = measure(shape, device, rounds, warmup=1 if quick else 3)
    result = measured[group][runner]
    benchmark.group = group
    benchmark.extra_info.update(
        {k: v for k, v in result.items() if k != "seconds"},
        variant=runner,
        device=device,
        held_bytes=0,
        saved_bytes=0,
        gradient_error=0.0,
        interleaved=True,
        quick=quick,
    )
    replay.load(result["seconds"])
    benchmark.pedantic(lambda: None, rounds=len(result["seconds"]))


@torch.no_grad()
def measure(shape: Shape, device: str, rounds: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Returns what was measured of each variant, after comparing its logits with float64's."""
    *_, batch, size = shape
    net = network(shape).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    truth = {"output": plain(net).double()(x.double())}
    eager = plain(net)
    last = plain(net).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    steps = {"fastnas": lambda: net(x), "eager": lambda: eager(x), "eager channels_last": lambda: last(x_last)}
    found = {}
    for name, step in steps.items():
        error, _ = errors({"output": step().double()}, truth)
        assert error <= 1e-4, f"{name}: error {error:.1e}"
        found[name] = {"error": error, "peak_bytes": memory(step, device)[0]}
    times = in_turn(list(steps.values()), rounds, warmup, device)
    return {name: {**found[name], "seconds": seconds} for name, seconds in zip(steps, times, strict=True)}
