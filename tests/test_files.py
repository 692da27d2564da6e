from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastnas._files import HALF_WRITTEN, write_atomic, write_text


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "α\n")
    assert (tmp_path / "a").read_bytes() == "α\n".encode()
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_leaves_is_known(tmp_path: Path) -> None:
    write_text(tmp_path / "b.tmp", "another's")
    half: list[str] = []
    write_atomic(tmp_path / "a.pt", lambda file: half.extend(p.name for p in tmp_path.glob(HALF_WRITTEN)))
    assert half == [f".a.pt.{os.getpid()}.tmp"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
