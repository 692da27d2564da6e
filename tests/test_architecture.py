"""Imports only point down, and importing fastnas costs nobody the libraries of its command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastnas"

# Each room may import those in later rows, and itself; "" is the package's own __init__. docs/architecture.md says what
# is in them.
LAYERS = [
    {"__main__"},
    {"cli", "compat"},
    {"commands"},
    {"study"},
    {"search", "saliency", "train"},
    {"inference"},
    {"report"},
    {"spaces", "tabular", "runs"},
    {""},
    {"nn"},
    {"ops"},
    {"_library"},
    {"_C", "genotypes"},
]
BASE = {"_device", "_files", "_registry"}  # import nothing of fastnas; every room may import them
LEAVES = {"genotype", "relaxations", "data"}  # import the base alone; every other room may import them
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def room(module: str) -> str:
    """Returns the room of ``fastnas.<room>...``; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Yields every module of fastnas that the file imports, at its top or inside a function."""
    package = ["fastnas", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "fastnas")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "fastnas":  # from fastnas import _C, debug: a room, or a name of the package
                yield from (f"fastnas.{a.name}" if a.name in known_rooms() else "fastnas" for a in node.names)
            elif module.startswith("fastnas."):
                yield module


def known_rooms() -> set[str]:
    return {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} | {"_C"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def forbidden(importer: str, imported: str) -> bool:
    """Whether the room ``importer`` must not import the room ``imported``."""
    if importer == imported or imported in BASE | LEAVES:
        return importer != imported and importer in (BASE if imported in BASE else BASE | LEAVES)
    return importer in BASE | LEAVES or RANK[importer] >= RANK[imported]


def test_every_room_has_its_place() -> None:
    assert known_rooms() - {"__init__"} <= RANK.keys() | BASE | LEAVES, (
        "add the new room to LAYERS or LEAVES, and to the docs"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    importer = "" if parts[0] == "__init__" else parts[0]
    wrong = {module for module in imports(path) if forbidden(importer, room(module))}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(wrong))}, which is not below {importer}"


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("nn", "ops", False),
        ("ops", "nn", True),
        ("nn", "spaces", True),
        ("search", "data", False),
        ("data", "ops", True),
        ("genotype", "spaces", True),
        ("genotype", "data", True),
        ("genotype", "_files", False),
        ("_files", "genotype", True),
        ("_files", "_device", True),
        ("search", "tabular", False),
        ("tabular", "genotype", False),
        ("tabular", "spaces", True),
        ("nn", "nn", False),
        ("nn", "", True),
        ("search", "", False),
        ("", "nn", False),
        ("", "cli", True),
    ],
)
def test_the_rule(importer: str, imported: str, expected: bool) -> None:
    assert forbidden(importer, imported) is expected


def test_every_form_of_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nn").mkdir()
    for name in ("nn/__init__.py", "search.py", "genotype.py"):
        (tmp_path / name).touch()
    source = tmp_path / "nn" / "x.py"
    source.write_text(
        "import torch\nimport fastnas.search\nfrom fastnas import genotype, debug\nfrom fastnas.ops.a import b\n"
        "from .. import search\nfrom ..report import c\nfrom . import cells\n"
        "def f():\n    from fastnas import _C\n    import fastnas.cli as d\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    found = ["search", "genotype", "", "ops", "search", "report", "nn", "_C", "cli"]
    assert sorted(room(m) for m in imports(source)) == sorted(found)


def test_importing_fastnas_is_light() -> None:
    heavy = ["jsonargparse", "rich", "matplotlib", "tensorboard", "sklearn", "PIL", "fastnas.cli", "fastnas.report"]
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fastnas, fastnas.nn, fastnas.spaces, fastnas.tabular, fastnas.compat.darts, fastnas.compat.pc_darts\n"
        "import fastnas.compat.drnas, fastnas.compat.smooth_darts\n"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"
