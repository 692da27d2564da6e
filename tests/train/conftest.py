import dataclasses

import pytest
import torch

from fastnas.data import ImageData, load
from fastnas.train import TrainConfig


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """64 digits to train on, 32 for the test."""
    data = load("digits")
    return dataclasses.replace(
        data,
        images=data.images[:64],
        labels=data.labels[:64],
        test_images=data.images[64:96],
        test_labels=data.labels[64:96],
    )


@pytest.fixture(scope="session")
def noise() -> ImageData:
    """21 images of 32x32 in colour, of three classes, and five for the test."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (26, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (26,), generator=generator)
    return ImageData(
        "npz", images[:21], labels[:21], ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), images[21:], labels[21:]
    )


@pytest.fixture
def tiny() -> TrainConfig:
    """A training of two epochs with four steps each on the 64 digits."""
    return TrainConfig(genotype="DARTS_V2", channels=4, layers=3, batch_size=16, epochs=2, drop_path=0.4, device="cpu")
