"""Scores of networks against plain computations of their definitions, in float64."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.nn.counting import count
from fastnas.saliency import SCORES, Batch, get_score
from fastnas.saliency.ntk import tangent_kernel
from fastnas.spaces import get_space

NAMES = ["grad_norm", "fisher", "naswot", "jacob_cov", "params", "flops", "ntk", "linear_regions"]
OF_LABELS = ["grad_norm", "fisher"]
OF_PAIRS = ["naswot", "jacob_cov", "ntk"]


class Small(nn.Module):
    """Two convolutions and a linear layer; the ReLU is used twice, the second time in place."""

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.linear(h.mean((2, 3)))

    def steps(self, x: Tensor) -> list[Tensor]:
        """Returns, in plain functions with batch statistics, the outputs of all layers: conv1, conv2, linear."""
        a = F.conv2d(x, self.conv1.weight, padding=1)
        b = F.batch_norm(a, None, None, self.bn1.weight, self.bn1.bias, training=True)
        c = F.conv2d(b.clamp_min(0), self.conv2.weight, self.conv2.bias, stride=2, padding=1, groups=2)
        return [a, c, F.linear(c.clamp_min(0).mean((2, 3)), self.linear.weight, self.linear.bias), b]


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small().double()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(5, 2, 6, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0]))


def close(got: Tensor, expected: float | Tensor) -> None:
    assert got.shape == ()
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def codes(small: Small, batch: Batch) -> list[list[bool]]:
    """Returns each image's on-off pattern."""
    with torch.no_grad():
        _, c, _, b = small.steps(batch.images)
    return [torch.cat([b[i].flatten() > 0, c[i].flatten() > 0]).tolist() for i in range(len(batch.images))]


def test_grad_norm(small: Small, batch: Batch) -> None:
    loss = F.cross_entropy(small.steps(batch.images)[2], batch.labels)
    gradients = torch.autograd.grad(loss, [small.conv1.weight, small.conv2.weight, small.linear.weight])
    close(get_score("grad_norm")(small, batch), sum(float((g**2).sum() ** 0.5) for g in gradients))


def test_fisher(small: Small, batch: Batch) -> None:
    steps = small.steps(batch.images)
    # the sum of the losses, one an image
    loss = sum(F.cross_entropy(steps[2][n : n + 1], batch.labels[n : n + 1]) for n in range(5))
    expected = 0.0
    for a, g in zip(steps[:3], torch.autograd.grad(loss, steps[:3]), strict=True):
        for n, k in itertools.product(range(5), range(a.shape[1])):
            expected += float((a[n, k].detach() * g[n, k]).sum()) ** 2 / (2 * 5)
    close(get_score("fisher")(small, batch), expected)


def test_naswot(small: Small, batch: Batch) -> None:
    patterns = codes(small, batch)
    kernel = [[sum(a == b for a, b in zip(p, q, strict=True)) for q in patterns] for p in patterns]
    assert kernel[0][0] == 4 * 36 + 6 * 9
    close(get_score("naswot")(small, batch), math.log(abs(np.linalg.det(np.array(kernel, dtype=float)))))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_naswot_does_not_depend_on_the_memory_format(
    small: Small, batch: Batch, memory_format: torch.memory_format
) -> None:
    again = Batch(batch.images.contiguous(memory_format=memory_format), batch.labels)
    close(get_score("naswot")(small, again), get_score("naswot")(small, batch))


def test_equal_codes_have_no_determinant(small: Small, batch: Batch) -> None:
    images = batch.images.clone()
    images[3] = images[1]
    assert get_score("naswot")(small, Batch(images, batch.labels)) == -math.inf


def test_linear_regions(small: Small, batch: Batch) -> None:
    images = batch.images[[0, 1, 2, 1, 0, 4]]
    many = Batch(images, torch.zeros(6, dtype=torch.int64))
    patterns = codes(small, many)
    assert len({tuple(p) for p in patterns}) == 4
    close(get_score("linear_regions")(small, many), 4.0)


def test_jacob_cov(small: Small, batch: Batch) -> None:
    images = batch.images.clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(small.steps(images)[2].sum(), images)
    eigenvalues = np.linalg.eigvals(np.corrcoef(jacobian.reshape(5, -1).numpy())).real
    expected = -sum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in eigenvalues)
    close(get_score("jacob_cov")(small, batch), expected)


def explicit_kernel(small: Small, batch: Batch) -> Tensor:
    """Returns the kernel of the Jacobian of all logits, summed over the classes."""
    weights = [p for name, p in small.named_parameters() if "weight" in name]

    def function(*values: Tensor) -> Tensor:
        names = [name for name, _ in small.named_parameters() if "weight" in name]
        twin = copy.deepcopy(small)
        for name, value in zip(names, values, strict=True):
            module, _, attribute = name.rpartition(".")
            delattr(twin.get_submodule(module), attribute)
            setattr(twin.get_submodule(module), attribute, value)
        return twin.steps(batch.images)[2].sum(1)

    parts = torch.autograd.functional.jacobian(function, tuple(weights))
    rows = torch.cat([part.flatten(1) for part in parts], dim=1)
    return rows @ rows.T


def test_ntk(small: Small, batch: Batch) -> None:
    expected = explicit_kernel(small, batch)
    torch.testing.assert_close(tangent_kernel(small, batch), expected)
    eigenvalues = np.linalg.eigvalsh(expected.numpy())
    torch.testing.assert_close(
        get_score("ntk")(small, batch), torch.tensor(-eigenvalues[-1] / eigenvalues[0]), rtol=1e-6, atol=0
    )


def test_a_singular_ntk(small: Small, batch: Batch) -> None:
    images = batch.images.clone()
    images[3] = images[1]
    assert get_score("ntk")(small, Batch(images, batch.labels)) == -math.inf


def test_sizes_as_scores(small: Small, batch: Batch) -> None:
    size = count(small, (2, 6, 6))
    assert size.parameters == 4 * 2 * 9 + 2 * 4 + (6 * 2 * 9 + 6) + (3 * 6 + 3)
    close(get_score("params")(small, batch), float(size.parameters))
    close(get_score("flops")(small, batch), float(size.multiply_adds))


# A network is given back as it came


def state(network: nn.Module) -> tuple[object, ...]:
    return (
        [(name, value.clone()) for name, value in network.state_dict().items()],
        [(id(p), p.requires_grad, p.grad) for p in network.parameters()],
        [(id(m), m.training, len(m._forward_hooks)) for m in network.modules()],
        [id(b) for b in network.buffers()],
    )


def same(before: tuple[object, ...], after: tuple[object, ...]) -> bool:
    tensors = all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(before[0], after[0], strict=True))
    return tensors and before[1:] == after[1:]


class Broken(nn.Module):
    """Fails where it is put."""

    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_given_back_as_it_came(name: str, fail: bool, small: Small, batch: Batch) -> None:
    network = nn.Sequential(small, Broken() if fail else nn.Identity())
    small.conv1.weight.grad = torch.ones_like(small.conv1.weight)
    small.linear.bias.requires_grad_(False)
    small.bn1.eval()
    network.zero_grad = None  # type: ignore[method-assign, assignment]
    before = state(network)
    if fail and name != "params":
        with pytest.raises(ArithmeticError, match="on purpose"):
            get_score(name)(network, batch)
    else:
        with torch.no_grad():  # the caller's mode does not matter either
            get_score(name)(network, batch)
        assert torch.is_grad_enabled()
    assert same(before, state(network))


@pytest.mark.parametrize("name", NAMES)
def test_a_score_repeats_itself(name: str, small: Small, batch: Batch) -> None:
    first = get_score(name)(small, batch)
    assert first.dtype == torch.float64
    assert not first.requires_grad
    assert torch.equal(first, get_score(name)(small, batch))


def test_float32_networks_give_nearly_the_same(small: Small, batch: Batch) -> None:
    for name in NAMES:
        exact = get_score(name)(small, batch)
        single = get_score(name)(copy.deepcopy(small).float(), Batch(batch.images.float(), batch.labels))
        torch.testing.assert_close(single, exact, rtol=1e-2, atol=0, msg=name)


# The networks of a space


@pytest.mark.parametrize("name", sorted(SCORES))
def test_networks_without_a_path(name: str) -> None:
    """All images look alike to a network whose cells let nothing through; what it is worth is a number all the same."""
    from fastnas.genotype import NASBench201Genotype

    torch.manual_seed(0)
    network = get_space("nb201").network(NASBench201Genotype(("nor_conv_3x3", *["none"] * 5)), 4, 1)
    images = torch.randn(6, 3, 8, 8)
    value = get_score(name)(network, Batch(images, torch.tensor([0, 1, 2, 3, 4, 5])))
    assert not math.isnan(value)
    if name in ("naswot", "jacob_cov", "ntk"):
        assert value == -math.inf


# Errors


@pytest.mark.parametrize("name", [n for n in NAMES if n != "params"])
def test_an_empty_batch(name: str, small: Small) -> None:
    with pytest.raises(ValueError, match=r"batch\.images has shape \(0, 2, 6, 6\)"):
        get_score(name)(small, Batch(torch.zeros(0, 2, 6, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_one_image_is_too_few(name: str, small: Small, batch: Batch) -> None:
    with pytest.raises(ValueError, match="needs 2 or more images"):
        get_score(name)(small, Batch(batch.images[:1], batch.labels[:1]))


@pytest.mark.parametrize("name", ["naswot", "jacob_cov", "ntk", "linear_regions", "flops"])
def test_whole_numbers_are_no_images(name: str, small: Small, batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"must be floats \(N, C, H, W\), got torch.int64"):
        get_score(name)(small, Batch(batch.images.long(), batch.labels))


@pytest.mark.parametrize("name", OF_LABELS)
def test_labels(name: str, small: Small, batch: Batch) -> None:
    with pytest.raises(ValueError, match="all 5 labels are 1"):
        get_score(name)(small, Batch(batch.images, torch.ones(5, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"from 0 to 3, but the network has 3 logits"):
        get_score(name)(small, Batch(batch.images, torch.tensor([0, 1, 2, 3, 0])))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("params", "flops")])
def test_outputs_that_are_not_finite(name: str, small: Small, batch: Batch) -> None:
    with torch.no_grad():
        small.linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN|nan"):
        get_score(name)(small, batch)


@pytest.mark.parametrize("name", ["naswot", "linear_regions"])
def test_a_network_without_relu(name: str, batch: Batch) -> None:
    with pytest.raises(ValueError, match="no module of kind ReLU"):
        get_score(name)(Small(relu=False).double(), batch)

    class Unused(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.steps(x)[2]

    with pytest.raises(ValueError, match="calls none of its ReLU modules"):
        get_score(name)(Unused().double(), batch)


def test_networks_that_have_nothing_to_score(batch: Batch) -> None:
    network = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for name, message in [("grad_norm", "no convolution"), ("fisher", "no module"), ("ntk", "no parameter named")]:
        with pytest.raises(ValueError, match=message):
            get_score(name)(network, batch)
    with pytest.raises(ValueError, match=r"must return logits \(N, classes\), got \(5, 2, 6, 6\)"):
        get_score("naswot")(nn.ReLU(), batch)
    with pytest.raises(ValueError, match=r"image_shape=\(3, 8\)"):
        count(network, (3, 8))
