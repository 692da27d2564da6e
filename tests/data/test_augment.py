"""Augmentation: the whole-batch code against one image at a time, and the distributions of its random numbers."""

import dataclasses

import pytest
import torch

from fastnas.data import DATASETS, Augment, augment, default_augment, normalize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_GPU])]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=1):
    return torch.randint(256, shape, generator=generator(seed)).byte()


def one_by_one(images, config, mean, std, gen):
    """The definition, an image and a pixel at a time; random numbers are drawn in the same order."""
    n, channels, height, width = images.shape
    pad, length = config.pad, config.cutout
    offset = torch.randint(2 * pad + 1, (n, 2), generator=gen).tolist() if pad else [[0, 0]] * n
    flip = torch.randint(2, (n,), generator=gen).tolist() if config.flip else [0] * n
    if length:
        centre_y = torch.randint(height, (n,), generator=gen).tolist()
        centre_x = torch.randint(width, (n,), generator=gen).tolist()
    out = torch.zeros(n, channels, height, width)
    for i in range(n):
        for y in range(height):
            for x in range(width):
                from_y = y + offset[i][0] - pad
                from_x = (width - 1 - x if flip[i] else x) + offset[i][1] - pad
                inside = 0 <= from_y < height and 0 <= from_x < width
                for c in range(channels):
                    value = images[i, c, from_y, from_x].float() if inside else torch.tensor(0.0)
                    out[i, c, y, x] = (value / 255 - torch.tensor(mean[c])) / torch.tensor(std[c])
        if length:
            top, left = centre_y[i] - length // 2, centre_x[i] - length // 2
            out[i, :, max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 0
    return out


@pytest.mark.parametrize(
    "config",
    [
        Augment(0, False, 0),
        Augment(2, False, 0),
        Augment(0, True, 0),
        Augment(0, False, 3),
        Augment(0, False, 4),
        Augment(3, True, 5),
        Augment(9, True, 40),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (1, 3, 8, 8), (0, 3, 4, 4)], ids=str)
def test_equals_one_image_at_a_time(config, shape):
    images = random_images(*shape)
    before = images.clone()
    out = augment(images, config, MEAN, STD, generator(5))
    assert torch.equal(out, one_by_one(images, config, MEAN, STD, generator(5)))
    assert torch.equal(images, before)


def test_sliced_expanded_and_channels_last_images():
    wide = random_images(8, 3, 6, 12)
    for images in (
        wide[::2, :, :, ::2],
        wide[:1].expand(5, -1, -1, -1),
        wide.contiguous(memory_format=torch.channels_last),
    ):
        config = Augment(2, True, 3)
        expected = augment(images.contiguous(), config, MEAN, STD, generator())
        assert torch.equal(augment(images, config, MEAN, STD, generator()), expected)


@pytest.mark.parametrize("config", [Augment(0, False, 0), Augment(2, True, 4)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_dtype_and_layout(config, channels):
    images = random_images(4, channels, 8, 6)
    last = augment(images, config, MEAN[:channels], STD[:channels], generator())
    first = augment(images, config, MEAN[:channels], STD[:channels], generator(), memory_format=torch.contiguous_format)
    assert last.dtype == first.dtype == torch.float32
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert torch.equal(last, first)


@pytest.mark.cuda
@NEEDS_GPU
def test_same_images_on_the_gpu():
    images, config = random_images(16, 3, 32, 32), Augment(4, True, 16)
    expected = augment(images, config, MEAN, STD, generator(3))
    out = augment(images.cuda(), config, MEAN, STD, generator(3))
    assert out.device.type == "cuda"
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out.cpu(), expected, rtol=1e-6, atol=1e-6)
    on_device = augment(images.cuda(), config, MEAN, STD, torch.Generator("cuda").manual_seed(3))
    assert on_device.shape == expected.shape


@pytest.mark.parametrize("device", DEVICES)
def test_normalize(device):
    images = random_images(50, 3, 8, 8).to(device)
    scaled = images.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    out = normalize(images, mean.tolist(), std.tolist())
    assert out.device == images.device
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3, device=device), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.ones(3, device=device), atol=1e-5)
    assert torch.equal(out, normalize(images, mean, std))  # tensors do as well


def test_seed_decides():
    images, config = random_images(8, 3, 9, 9), Augment(2, True, 4)
    first = augment(images, config, MEAN, STD, generator(1))
    state = torch.get_rng_state()
    assert torch.equal(first, augment(images, config, MEAN, STD, generator(1)))
    assert not torch.equal(first, augment(images, config, MEAN, STD, generator(2)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    gen = generator(1)
    one = augment(images, config, MEAN, STD, gen)
    assert not torch.equal(one, augment(images, config, MEAN, STD, gen))


def crops(pad, n=4000, size=5):
    """Offsets and flips of n crops, read off the crops of images whose pixels hold their own position."""
    position = torch.arange(1, size * size + 1).view(1, 1, size, size)
    images = position.expand(n, 1, -1, -1).to(torch.uint8)
    out = (augment(images, Augment(pad, True, 0), (0.0,), (1.0,), generator(11)) * 255).round().long()[:, 0]
    centre = out[:, size // 2, size // 2] - 1  # never in the border while pad <= size // 2
    dy, dx = centre // size - size // 2, centre % size - size // 2
    inner_left = out[:, size // 2, size // 2 - 1]
    inner_right = out[:, size // 2, size // 2 + 1]
    flipped = torch.where(inner_left > 0, inner_left > centre + 1, inner_right < centre + 1)
    return dy, dx, flipped


def test_every_offset_occurs_equally_often():
    pad, n = 2, 4000
    dy, dx, _ = crops(pad, n)
    counts = torch.bincount((dy + pad) * 5 + dx + pad, minlength=25).double()
    assert counts.shape == (25,)
    expected = n / 25
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 60  # 24 degrees of freedom: 1e-4 of all seeds exceed it


def test_half_the_images_are_flipped_whatever_their_crop():
    dy, dx, flipped = crops(2)
    rate = flipped.double().mean()
    assert abs(float(rate) - 0.5) < 4 * (0.25 / 4000) ** 0.5
    for other in (dy, dx):
        correlation = torch.corrcoef(torch.stack((flipped.double(), other.double())))[0, 1]
        assert abs(float(correlation)) < 4 / 4000**0.5
    assert abs(float(torch.corrcoef(torch.stack((dy, dx)).double())[0, 1])) < 4 / 4000**0.5


def test_images_are_independent_of_their_neighbours():
    _, dx, flipped = crops(2)
    for draws in (dx.double(), flipped.double()):
        neighbours = torch.corrcoef(torch.stack((draws[:-1], draws[1:])))[0, 1]
        assert abs(float(neighbours)) < 4 / 4000**0.5


def test_cutout_centres_are_uniform_and_clipped():
    n, size, length = 4000, 6, 4
    images = torch.full((n, 1, size, size), 255, dtype=torch.uint8)
    hole = augment(images, Augment(0, False, length), (0.0,), (1.0,), generator(2))[:, 0] == 0
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])  # rectangles
    # DARTS' cut-out covers [centre - length/2, centre + length/2), clipped: 2 to 4 of the 6 positions, by the centre.
    covered = {tuple(c - 2 <= p < c + 2 for p in range(size)): 0 for c in range(size)}
    for line in rows.tolist() + columns.tolist():
        covered[tuple(line)] += 1
    counts = torch.tensor(list(covered.values())).double()
    assert len(counts) == size
    assert float(((counts - 2 * n / size) ** 2 / (2 * n / size)).sum()) < 25  # 5 degrees of freedom


def test_defaults_suit_the_data():
    assert default_augment("cifar10") == default_augment("cifar100") == Augment(pad=4, flip=True, cutout=0) == Augment()
    assert default_augment("digits") == Augment(pad=1, flip=False)
    assert not default_augment("npz").flip
    assert all(isinstance(default_augment(name), Augment) for name in DATASETS)
    with pytest.raises(ValueError, match="name='mnist'"):
        default_augment("mnist")


def test_errors():
    images = random_images(2, 3, 4, 4)
    with pytest.raises(ValueError, match="pad=-1"):
        Augment(pad=-1)
    with pytest.raises(ValueError, match="cutout=-2"):
        Augment(cutout=-2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Augment().pad = 2
    for bad in (images.float(), images[0]):
        with pytest.raises(ValueError, match="images must be uint8"):
            augment(bad, Augment(), MEAN, STD, generator())
    with pytest.raises(ValueError, match="mean needs 3 values"):
        augment(images, Augment(), (0.5,), STD, generator())
    with pytest.raises(ValueError, match="std needs 3 values"):
        normalize(images, MEAN, torch.tensor(1.0))
