"""Builds fastnas._C against the torch of the environment being installed into."""

import os
import platform
import site
import sys
from pathlib import Path

from setuptools import setup

# pip's build isolation hides the target environment; torch must be the one that fastnas will run with.
sys.path += [p for p in [*site.getsitepackages(), site.getusersitepackages()] if p not in sys.path]
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError:
    print("fastnas: no torch found in this environment; fetching torch==2.13.0 to build against", flush=True)
    setup(setup_requires=["torch==2.13.0"])
    sys.exit()

import pybind11

cuda = CUDA_HOME is not None and os.getenv("FASTNAS_CUDA", "1") == "1"
if os.getenv("FASTNAS_CUDA") == "1" and CUDA_HOME is None:
    sys.exit("FASTNAS_CUDA=1 needs a CUDA build of torch and the CUDA toolkit (nvcc)")
if cuda and not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
print(f"fastnas: building against torch {torch.__version__} ({'CPU and CUDA' if cuda else 'CPU'})", flush=True)

defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(["-DFASTNAS_CUDA", "-DUSE_CUDA"] if cuda else [])]
warnings = ["-Wall", "-Wextra", "-Werror=return-type", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-psabi"]
cxx = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fopenmp-simd", *warnings, *defines]
nvcc = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xcompiler=-fvisibility=hidden", *defines]
x86 = platform.machine().lower() in ("x86_64", "amd64")
skip = set() if x86 else {"avx2", "avx512"}
sources = sorted(
    str(p)
    for pattern in ["*.cpp", "cpu/*.cpp", *(["cuda/*.cu"] if cuda else [])]
    for p in Path("csrc").glob(pattern)
    if p.stem.rsplit("_", 1)[-1] not in skip
)
Extension = CUDAExtension if cuda else CppExtension
setup(
    ext_modules=[
        Extension(
            "fastnas._C",
            sources,
            include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
            extra_compile_args={"cxx": cxx, "nvcc": nvcc} if cuda else {"cxx": cxx},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
