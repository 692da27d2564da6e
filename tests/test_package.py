"""What is installed: metadata, build facts, and the contents of the sdist and of the wheel that is built from it."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastnas
from fastnas import _C

ROOT = Path(__file__).resolve().parents[1]


def test_version_is_in_the_changelog() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert fastnas.__version__ in versions


def _examples(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_examples_run(name: str) -> None:
    examples = "\n".join(_examples(name))
    assert examples
    command = [sys.executable, "-W", "error", "-c", examples]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    assert sorted(set(fastnas.__all__)) == sorted(fastnas.__all__)
    assert all(hasattr(fastnas, name) for name in fastnas.__all__)


def test_build_info() -> None:
    info = _C.build_info()
    assert set(info) == {"compiler", "cxx_standard", "cuda", "cuda_archs", "cpu_isa", "cpu_isas"}
    assert info["cxx_standard"] >= 202002
    assert info["cpu_isa"] in info["cpu_isas"]
    assert "plain" in info["cpu_isas"]
    assert (info["cuda"] is None) == (info["cuda_archs"] is None)
    if info["cuda"] is not None:
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert re.fullmatch(r"\d+\.\d+a?(\+PTX)?(;\d+\.\d+a?(\+PTX)?)*|[A-Za-z+;]+", info["cuda_archs"])


def _setup(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built."""
    target = tmp_path_factory.mktemp("source") / "fastnas"
    target.mkdir()
    for name in ("csrc", "fastnas"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.mark.slow
def test_impossible_wishes_are_refused(source: Path) -> None:
    done = _setup(source, FASTNAS_CUDA="yes")
    assert done.returncode != 0
    assert "FASTNAS_CUDA='yes': expected 0 or 1" in done.stderr
    done = _setup(source, FASTNAS_CUDA="0")
    assert done.returncode == 0
    assert "CPU only (FASTNAS_CUDA=0)" in done.stdout
    done = _setup(source, FASTNAS_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert re.search(r"FASTNAS_CUDA=1 needs (a CUDA build of torch|the CUDA toolkit \(nvcc\))", done.stderr)


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    target = tmp_path_factory.mktemp("sdist")
    with tarfile.open(source / "dist" / f"fastnas-{fastnas.__version__}.tar.gz") as archive:
        for member in archive.getmembers():  # our own archive; extractall's filter= is not in every Python 3.10
            archive.extract(member, target)
    return target / f"fastnas-{fastnas.__version__}"


@pytest.mark.slow
def test_sdist_holds_all_sources(sdist: Path) -> None:
    for folder, patterns in {"csrc": ["*"], "fastnas": ["*.py", "*.pyi", "*.yaml", "py.typed"]}.items():
        wanted = {p.relative_to(ROOT) for x in patterns for p in (ROOT / folder).rglob(x) if p.is_file()}
        assert {p for p in wanted if not (sdist / p).is_file()} == set()
    assert all((sdist / name).is_file() for name in ("LICENSE", "README.md", "CHANGELOG.md", "setup.py"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, without the optimisation that takes most of the time."""
    target = tmp_path_factory.mktemp("wheel")
    compiler = target / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(target)!r}))"
    env = {**os.environ, "CXX": str(compiler)}
    subprocess.run([sys.executable, "-c", code], cwd=sdist, env=env, check=True, capture_output=True)
    (path,) = target.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"fastnas-{fastnas.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    wanted = {
        p.relative_to(ROOT).as_posix()
        for x in ("*.py", "*.pyi", "*.yaml", "py.typed")
        for p in (ROOT / "fastnas").rglob(x)
    }
    assert wanted <= set(names)
    assert len([n for n in names if re.fullmatch(r"fastnas/_C\..*(so|pyd)", n)]) == 1
    assert {n.partition("/")[0] for n in names} == {"fastnas", info}
    assert metadata["Name"] == "fastnas"
    assert metadata["Version"] == fastnas.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist")
    assert "fastnas = fastnas.cli:main" in entry_points
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import torch, fastnas; xs = [torch.full((2, 3), float(i)) for i in range(3)]; "
        "print(fastnas.__file__, fastnas.mixed_sum(xs, torch.tensor([1.0, 10.0, 100.0])).unique().item())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "fastnas" / "__init__.py"), "210.0"]
