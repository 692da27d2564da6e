import colorsys

import pytest
import torch

from fastnas.data import Augment, augment, color_jitter
from fastnas.data.jitter import _shift_hue

IMAGES = torch.rand(5, 3, 7, 3, generator=torch.Generator().manual_seed(0))


def jitter(*strengths, images=IMAGES):
    return color_jitter(images, strengths, torch.Generator().manual_seed(1))


def test_hue_turns_the_circle():
    shifts = torch.tensor([0.0, 0.13, -0.4, 0.5, 0.9])
    shifted = _shift_hue(IMAGES, shifts.view(-1, 1, 1, 1))
    for n in range(5):
        for pixel, ours in zip(IMAGES[n].flatten(1).T.tolist(), shifted[n].flatten(1).T, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = torch.tensor(colorsys.hsv_to_rgb((hue + shifts[n].item()) % 1, saturation, value))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    gray = torch.full((1, 3, 2, 2), 0.25)
    assert torch.equal(_shift_hue(gray, torch.tensor(0.3)), gray)


def test_brightness_contrast_and_saturation():
    gray = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), IMAGES, ([0], [1]))[:, None]
    mean = gray.mean((1, 2, 3), keepdim=True).expand_as(IMAGES)
    for which, base in enumerate((torch.zeros_like(IMAGES), mean, gray.expand_as(IMAGES))):
        strengths = [0.0] * 4
        strengths[which] = 0.2
        ours = jitter(*strengths, images=IMAGES * 0.5 + 0.25)
        scaled = base if which == 0 else base * 0.5 + 0.25
        inside = (ours > 0) & (ours < 1)
        factors = (ours - scaled) / (IMAGES * 0.5 + 0.25 - scaled)
        for n in range(5):
            usable = factors[n][inside[n] & ((IMAGES * 0.5 + 0.25 - scaled).abs()[n] > 0.05)]
            assert usable.max() - usable.min() < 1e-3  # one factor an image
            assert 0.8 <= usable.mean() <= 1.2
        assert len({round(factors[n].median().item(), 4) for n in range(5)}) == 5  # and another for each


def test_range_and_errors():
    wild = jitter(3.0, 3.0, 3.0, 0.5)
    assert 0 <= wild.min() <= wild.max() <= 1
    with pytest.raises(ValueError, match="wants 3 channels, these images have 1"):
        jitter(0.1, 0.1, 0.1, 0.1, images=IMAGES[:, :1])


def test_off_is_what_it_was():
    images = (IMAGES * 255).to(torch.uint8)
    arguments = (images, Augment(pad=1, flip=True, cutout=2), (0.5,) * 3, (0.2,) * 3)
    plain = augment(*arguments, torch.Generator().manual_seed(0))
    assert torch.equal(plain, augment(*arguments, torch.Generator().manual_seed(0), jitter=[0.0] * 4))
    coloured = augment(*arguments, torch.Generator().manual_seed(0), jitter=(0.4, 0.4, 0.4, 0.2))
    assert not torch.equal(plain, coloured)
    assert torch.equal((plain == 0).all(1), (coloured == 0).all(1))  # the squares are where they were
