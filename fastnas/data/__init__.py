"""Data sets in standard formats, augmentation on whole batches on the device, and resumable batches."""

from .augment import Augment, augment, default_augment, normalize
from .batches import Batches, split, to_device
from .images import DATASETS, ImageData, channel_statistics, load
from .jitter import color_jitter

__all__ = [
    "DATASETS",
    "Augment",
    "Batches",
    "ImageData",
    "augment",
    "channel_statistics",
    "color_jitter",
    "default_augment",
    "load",
    "normalize",
    "split",
    "to_device",
]
