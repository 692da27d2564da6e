from pathlib import Path

import numpy as np
import pytest

from fastnas.genotype import NASBench201Genotype
from fastnas.tabular import nasbench201

DATA = Path(__file__).parents[3] / "shared" / "data" / "nb201" / "nb201_accuracy.csv.gz"


def test_the_benchmark():
    if not DATA.exists():
        pytest.skip("the table of NAS-Bench-201 is not on this machine")
    table = nasbench201.load(DATA)
    assert len(table) == 15625
    assert table.columns == tuple(nasbench201.COLUMNS)
    # the published best of each data set, and the cell that DrNAS reports (arXiv:2006.10355, table 4)
    assert [round(table.column(f"{data}-test").max(), 2) for data in ("cifar10", "cifar100", "imagenet16")] == [
        94.37,
        73.51,
        47.31,
    ]
    drnas = NASBench201Genotype.from_text(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    )
    row = table.find(drnas)
    assert [round(row[f"{data}-test"], 2) for data in ("cifar10", "cifar100", "imagenet16")] == [94.36, 73.51, 46.34]
    # DARTS' collapse to skip_connect alone (arXiv:2001.00326, table 5)
    skips = table.find(NASBench201Genotype(("skip_connect",) * 6))
    assert np.allclose([skips["cifar10-test"], skips["cifar100-test"]], [54.30, 15.61], atol=0.005)


def test_columns_of_another_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("cell,accuracy\n|skip_connect~0|,50\n|none~0|,10\n")
    table = nasbench201.load(path, {"cifar10-test": "accuracy"}, key="cell")
    assert table.columns == ("cifar10-test",)
    assert table.find(NASBench201Genotype(("none",))) == {"cifar10-test": 10.0}
    with pytest.raises(ValueError, match=r"mine\.csv: no column 'c10_valid_e200': those there are accuracy"):
        nasbench201.load(path, key="cell")


def test_tables_of_other_architectures_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("arch,accuracy\n00000001,50\n")
    with pytest.raises(ValueError, match=r"other\.csv: column 'arch': genotype: expected \|op~0\|"):
        nasbench201.load(path, {"cifar10-test": "accuracy"})
    path.write_text("arch,accuracy\n|none~0|+|none~1|none~0|,50\n")
    with pytest.raises(
        ValueError, match=r"has \|none~0\|\+\|none~1\|none~0\|: expected \|none~0\|\+\|none~0\|none~1\|"
    ):
        nasbench201.load(path, {"cifar10-test": "accuracy"})
