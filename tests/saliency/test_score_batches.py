from __future__ import annotations

import pytest
import torch

from fastnas.data import load, normalize
from fastnas.saliency.batches import BatchSource


@pytest.mark.parametrize("data", ["noise", "digits"])
@pytest.mark.parametrize("per_class", [False, True])
def test_a_seed_fixes_the_batch(data: str, per_class: bool) -> None:
    source = BatchSource.open(data, size=40, per_class=per_class, image_size=8)
    a, b, other = source.draw(3), source.draw(3), source.draw(4)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, other.images)
    assert a.images.shape == (40, *source.shape)
    assert a.labels.dtype == torch.int64
    counts = torch.bincount(a.labels, minlength=source.classes)
    assert (counts.unique().tolist() == [4]) is per_class


def test_images_are_those_of_the_data_set() -> None:
    data = load("digits")
    batch = BatchSource.open("digits", size=20).draw(0)
    every = normalize(data.images, data.mean, data.std).flatten(1)
    for image, label in zip(batch.images.flatten(1), batch.labels, strict=True):
        found = (every == image).all(1).nonzero().flatten()
        assert label in data.labels[found]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data": "mnist"}, "data='mnist': expected one of noise, digits"),
        ({"size": 0}, "batch_size=0"),
        ({"data": "digits", "size": 5000}, "at most 1797"),
        ({"size": 64, "per_class": True}, "multiple of the 10 classes"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BatchSource.open(**options)


def test_a_class_may_have_too_few_images() -> None:
    with pytest.raises(ValueError, match=r"has 17\d images, not 1"):
        BatchSource.open("digits", size=1790, per_class=True).draw(0)
