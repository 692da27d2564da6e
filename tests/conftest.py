import os
import sys
from pathlib import Path

import pytest
import torch

# oneDNN 3.12, of torch 2.13, writes past the end in the backward of 1x1 convolutions of stride 2 over few channels in
# channels_last, on processors whose best instruction set is AVX2. The reference has such convolutions.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

sys.path.insert(0, str(Path(__file__).parent / "emulator"))


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels on the CPU, as backend "emulated"; its counters() and reset_counters() are its own."""
    import libraries

    return libraries.load()


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Puts what takes minutes first, so that no process is left with it when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
