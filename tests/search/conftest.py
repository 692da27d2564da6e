import dataclasses

import pytest

from fastnas.data import ImageData, load
from fastnas.search import SearchConfig


@pytest.fixture(scope="session")
def images() -> ImageData:
    """The first 64 digits."""
    digits = load("digits")
    return dataclasses.replace(digits, images=digits.images[:64], labels=digits.labels[:64])


@pytest.fixture
def tiny() -> SearchConfig:
    """A search of two epochs with two steps each on the 64 images: 32 train the weights, 32 the alphas."""
    return SearchConfig(channels=4, layers=3, batch_size=16, epochs=2, device="cpu")
