import os
import pickle
import zipfile

import pytest
import torch

from fastnas.search import checkpoint
from fastnas.search.checkpoint import CheckpointError


def test_round_trip(tmp_path):
    state = {"a": torch.arange(3), "b": {"c": [1, 2.5, None, "x"]}}
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["b"] == state["b"]
    assert os.listdir(tmp_path) == ["c.pt"]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x04garbage", b"PK\x03\x04rest"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt is damaged or is not a checkpoint"):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_foreign_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a fastnas search"):
        checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "version": 99, "state": {}}, path)
    with pytest.raises(CheckpointError, match="version 99, this fastnas reads 2"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match="damaged or is not"):
        checkpoint.load(path)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))], ids=["torch", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"format": checkpoint.FORMAT, "version": 2, "state": _Evil()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="damaged or is not"):
        checkpoint.load(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()
