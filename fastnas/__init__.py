"""Fast differentiable neural architecture search for PyTorch."""

from fastnas._library import debug, release_memory, twice_differentiable, use_backend
from fastnas.nn import MixedOp
from fastnas.ops import mixed_sum

__version__ = "0.3.0"
__all__ = ["MixedOp", "__version__", "debug", "mixed_sum", "release_memory", "twice_differentiable", "use_backend"]
