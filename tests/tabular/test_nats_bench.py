import sys
import types
from typing import ClassVar

import pytest

from fastnas.spaces import get_space
from fastnas.tabular import nasbench201, nats_bench


class _Api:
    """NATS-Bench's interface, as its documentation has it, with numbers that tell what was asked for."""

    cells: ClassVar = [g.to_text() for _, g in zip(range(7), get_space("nb201").all(), strict=False)]

    def __len__(self):
        return len(self.cells)

    def arch(self, index):
        return self.cells[index]

    def get_more_info(self, index, dataset, iepoch=None, hp="12", is_random=True):
        assert hp == "200"
        assert is_random is False
        base = {"cifar10-valid": 10.0, "cifar10": 20.0, "cifar100": 30.0, "ImageNet16-120": 40.0}[dataset]
        info = {"train-loss": 0.1, "test-accuracy": base + index}
        if dataset != "cifar10":  # trained on all of it
            info["valid-accuracy"] = base + 5 + index
        return info


@pytest.mark.parametrize("name", ["cells.csv", "cells.csv.gz"])
def test_converted_files_are_tables(tmp_path, name, monkeypatch):
    made = []
    library = types.ModuleType("nats_bench")
    library.create = lambda *args, **kwargs: made.append((args, kwargs)) or _Api()
    monkeypatch.setitem(sys.modules, "nats_bench", library)
    nats_bench.main([str(tmp_path), str(tmp_path / name)])
    assert made == [((str(tmp_path), "tss"), {"fast_mode": True, "verbose": False})]
    table = nasbench201.load(tmp_path / name)
    assert len(table) == 7
    assert table.find(_Api.cells[3]) == {
        "cifar10-valid": 18.0,
        "cifar10-test": 23.0,
        "cifar100-valid": 38.0,
        "cifar100-test": 33.0,
        "imagenet16-valid": 48.0,
        "imagenet16-test": 43.0,
    }


def test_without_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(SystemExit):
        nats_bench.main(["files", str(tmp_path / "cells.csv")])
    assert r"pip install fastnas[nats]" in capsys.readouterr().err
