"""Builds fastnas._C against the torch of the environment being installed into."""

import os
import platform
import re
import site
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# pip's build isolation hides the target environment; torch must be the one that fastnas will run with.
target = [*site.getsitepackages(), *([site.getusersitepackages()] if sys.prefix == sys.base_prefix else [])]
sys.path += [p for p in target if p not in sys.path]
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError:
    if "egg_info" not in sys.argv:  # not asked for what the build requires, so nobody would fetch torch
        sys.exit("fastnas: no torch in this environment: install it first, or leave out --no-build-isolation")
    print("fastnas: no torch found in this environment; fetching torch==2.13.0 to build against", flush=True)
    setup(setup_requires=["torch==2.13.0"])
    sys.exit()

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"fastnas: needs torch 2.11 or later, found {torch.__version__}: pip install --upgrade torch")
wanted = os.getenv("FASTNAS_CUDA", "")
if wanted not in ("", "0", "1"):
    sys.exit(f"fastnas: FASTNAS_CUDA={wanted!r}: expected 0 or 1")
nvcc = Path(CUDA_HOME, "bin", "nvcc") if torch.version.cuda and CUDA_HOME else None
missing = "a CUDA build of torch" if not torch.version.cuda else "the CUDA toolkit (nvcc)"
found = nvcc is not None and nvcc.exists()
if wanted == "1" and not found:
    sys.exit(f"fastnas: FASTNAS_CUDA=1 needs {missing}; found torch {torch.__version__}, CUDA_HOME={CUDA_HOME}")
cuda = found and wanted != "0"

import pybind11  # noqa: E402  (after the messages about torch, which say more)

defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(["-DFASTNAS_CUDA", "-DUSE_CUDA"] if cuda else [])]
warnings = ["-Wall", "-Wextra", "-Werror=return-type", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-psabi"]
flags = {
    "cxx": ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fopenmp-simd", *warnings],
    "nvcc": [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "--expt-extended-lambda",
        "-Xcompiler=-fvisibility=hidden",
    ],
}
flags = {compiler: [*options, *defines] for compiler, options in flags.items()}
if cuda:
    gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}) or [(8, 0), (9, 0)]
    archs = os.getenv("TORCH_CUDA_ARCH_LIST") or ";".join(f"{major}.{minor}" for major, minor in gpus) + "+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    release = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
    facts = {"VERSION": release[1] if release else torch.version.cuda, "ARCHS": archs.replace(" ", ";")}
    flags["cxx"] += [f"-DFASTNAS_CUDA_{name}={value}" for name, value in facts.items()]
what = f"CPU and CUDA {facts['VERSION']} for {facts['ARCHS']}" if cuda else f"CPU only (CUDA needs {missing})"
if wanted == "0":
    what = "CPU only (FASTNAS_CUDA=0)"
print(f"fastnas: building against torch {torch.__version__}: {what}", flush=True)

x86 = platform.machine().lower() in ("x86_64", "amd64")
skip = set() if x86 else {"avx2", "avx512"}
sources = sorted(
    str(path)
    for pattern in ["*.cpp", "cpu/*.cpp", *(["cuda/*.cu"] if cuda else [])]
    for path in Path("csrc").glob(pattern)
    if path.stem.rsplit("_", 1)[-1] not in skip
)
extension = (CUDAExtension if cuda else CppExtension)(
    "fastnas._C",
    sources,
    include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
    extra_compile_args=flags if cuda else {"cxx": flags["cxx"]},
)
if cuda:
    # The static runtime, and torch's CUDA libraries only through libtorch.so: the result also loads on a CPU torch.
    shared = ("cudart", "c10_cuda", "torch_cuda")
    extension.libraries = [lib for lib in extension.libraries if lib not in shared]
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
    dryrun = subprocess.run([nvcc, "--dryrun", "x.o"], stderr=subprocess.PIPE, text=True, check=True).stderr
    extension.library_dirs += dict.fromkeys(re.findall(r'"-L([^"]+)"', dryrun))  # CUDA_HOME may hold a mere wrapper
    extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]


class Build(BuildExtension):
    """Keeps the objects of every kind of install in one folder, so that each compiles only what changed."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = f"build/temp.{sys.implementation.cache_tag}"


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
