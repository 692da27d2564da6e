import gzip
import zlib

import numpy as np
import pytest

from fastnas.genotype import NASBench201Genotype
from fastnas.tabular import Table

CELL = NASBench201Genotype(("skip_connect",))
TEXT = 'arch,valid,test,note,"a, b"\n|skip_connect~0|,90.5,,x,1\n|none~0|,10,9e0,,2\n'


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(TEXT)
    return path


def test_load(path):
    table = Table.load(path)
    assert len(table) == 2
    assert table.rows == ("|skip_connect~0|", "|none~0|")
    assert table.columns == ("valid", "test", "a, b")  # a column of text is no column of numbers
    assert table.column("valid").tolist() == [90.5, 10.0]
    np.testing.assert_array_equal(table.column("test"), [np.nan, 9.0])
    with pytest.raises(ValueError, match="read-only"):
        table.column("valid")[0] = 0.0


def test_find(path):
    table = Table.load(path)
    assert table.find("|none~0|") == {"valid": 10.0, "test": 9.0, "a, b": 2.0}
    row = table.find(CELL)
    assert row["valid"] == 90.5
    assert np.isnan(row["test"])
    assert CELL in table
    assert "|none~0|" in table
    other = NASBench201Genotype(("avg_pool_3x3",))
    assert other not in table
    with pytest.raises(ValueError, match=r"table\.csv: the architecture \|avg_pool_3x3~0\| is not among its 2 rows"):
        table.find(other)


def test_select(path):
    table = Table.load(path).select({"top": "valid"})
    assert table.columns == ("top",)
    assert table.find(CELL) == {"top": 90.5}
    with pytest.raises(ValueError, match="no column 'valid': those there are top"):
        table.column("valid")
    with pytest.raises(ValueError, match="no column 'x': those there are top"):
        table.select({"y": "x"})


def test_compressed_tables_are_the_same(path):
    packed = path.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert Table.load(packed).find(CELL)["valid"] == 90.5


def test_another_key(path):
    table = Table.load(path, "valid")
    assert table.rows == ("90.5", "10")
    with pytest.raises(
        ValueError, match=r"table\.csv: no column 'cell': those there are arch, valid, test, note, a, b"
    ):
        Table.load(path, "cell")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a line of names and at least one row, got 0 lines"),
        (b"arch,valid\n", "got 1 lines"),
        (b"arch,valid\na,1,2\n", "row 2 has 3 fields, the names are 2"),
        (b"arch,valid\na,1\na,2\n", "the architecture a has two rows"),
        (b"arch,valid\n\xff,1\n", "not a CSV file"),
        (b'arch,valid\n"a,1\n', "not a CSV file"),
    ],
)
def test_broken_files(tmp_path, data, message):
    path = tmp_path / "broken.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"broken\.csv: .*{message}"):
        Table.load(path)


@pytest.mark.parametrize(
    "data",
    [b"no gzip", gzip.compress(TEXT.encode())[:40], gzip.compress(b"")[:10] + zlib.compress(b"x")],
    ids=["not gzip", "cut short", "damaged"],  # the bytes hold the time
)
def test_broken_archives(tmp_path, data):
    path = tmp_path / "broken.csv.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.csv\.gz: not a CSV file"):
        Table.load(path)


def test_columns_of_another_length():
    with pytest.raises(ValueError, match=r"column 'x' has shape \(1,\), expected \(2,\)"):
        Table(["a", "b"], {"x": [1.0]})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Table.load(tmp_path / "nothing.csv")
