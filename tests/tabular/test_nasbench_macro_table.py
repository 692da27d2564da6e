from pathlib import Path

import numpy as np
import pytest

from fastnas.genotype import ChainGenotype
from fastnas.tabular import nasbench_macro, open_table

DATA = Path(__file__).parents[3] / "shared" / "data" / "macro" / "nas_bench_macro_cifar10.csv.gz"


def test_the_benchmark():
    if not DATA.exists():
        pytest.skip("the table of NAS-Bench-Macro is not on this machine")
    table = open_table(DATA, "nb-macro")
    assert len(table) == 3**8
    assert table.columns == tuple(nasbench_macro.COLUMNS)
    best = table.rows[int(table.column("cifar10-test").argmax())]
    assert best == "22212202"
    row = table.find(ChainGenotype.from_text(best))
    # what the paper says of it (arXiv:2103.11922)
    assert (round(row["cifar10-test"], 2), row["params"], row["flops"]) == (93.13, 1985514, 85164544)
    runs = np.stack([table.column(f"cifar10-test-run{n}") for n in (1, 2, 3)])
    assert np.allclose(runs.mean(0), table.column("cifar10-test"), atol=1e-6)
    assert np.allclose(runs.std(0), table.column("cifar10-test-std"), atol=1e-6)


def test_columns_of_another_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("arch,mean_acc\n01,50\n12,60\n")
    table = nasbench_macro.load(path, {"cifar10-test": "mean_acc"})
    assert table.find(ChainGenotype(("mb3_3x3", "mb6_5x5"))) == {"cifar10-test": 60.0}
    assert open_table(path, "nb-macro").columns == ("cifar10-test",), "those that it has"
    path.write_text("arch,accuracy\n01,50\n12,60\n")
    with pytest.raises(ValueError, match=r"mine\.csv: no column 'mean_acc': those there are accuracy"):
        open_table(path, "nb-macro")


@pytest.mark.parametrize("row", ["|none~0|", "03", "012", ""])
def test_tables_of_other_architectures_are_refused(tmp_path, row):
    path = tmp_path / "other.csv"
    path.write_text(f"arch,mean_acc\n00,50\n{row},50\n")
    with pytest.raises(ValueError, match=r"other\.csv: column 'arch' has .*: expected 2 digits from 0 to 2"):
        nasbench_macro.load(path, {"cifar10-test": "mean_acc"})
