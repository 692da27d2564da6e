import gzip
from pathlib import Path

import pytest
import torch

from fastnas.genotype import OneShotGenotype
from fastnas.spaces import get_space
from fastnas.tabular import nasbench1shot1
from fastnas.tabular.table import read_csv

DATA = Path(__file__).parents[3] / "shared" / "data" / "nb101" / "nb1shot1_space2.csv.gz"
HEADER = "nodes,adjacency7x7,mean_val_err,mean_test_err\n"
CHAIN = "input|maxpool3x3|conv1x1-bn-relu|output,0100001000010000,"


def published():
    if not DATA.exists():
        pytest.skip("the table of NAS-Bench-1Shot1 is not on this machine")
    return nasbench1shot1.load(DATA)


def test_the_benchmark():
    table = published()
    assert len(table) == 3258  # of 3,609 rows; the others are the same graphs, numbered in another way
    assert table.columns == ("valid", "test")
    assert 0.05 < table.column("test").min() < 0.062
    space = get_space("nb1shot1-s2")
    generator = torch.Generator().manual_seed(0)
    found = [genotype in table for genotype in (space.sample(generator) for _ in range(200))]
    assert 60 < sum(found) < 110  # it holds less than half of the space


@pytest.mark.slow
def test_every_row_is_of_the_space():
    table = published()
    inside = {genotype.canonical().to_text() for genotype in get_space("nb1shot1-s2").all()}
    assert set(table.rows) <= inside
    assert len(inside) == 7773


def test_rows_of_the_same_graph_agree():
    """What the graphs say are the same cells were trained once: their numbers are equal."""
    table = published()
    _, texts = read_csv(DATA)
    values = zip(texts["nodes"], texts["adjacency7x7"], texts["mean_test_err"], strict=True)
    for nodes, bits, error in list(values)[::7]:
        matrix = [[int(bit) for bit in bits[7 * j : 7 * j + 7]] for j in range(7)]
        assert table.find(OneShotGenotype.from_table(nodes.split("|"), matrix))["test"] == float(error)


def test_cells_are_found_by_their_graph(tmp_path):
    path = tmp_path / "cells.csv.gz"
    path.write_bytes(gzip.compress(f"{HEADER}{CHAIN}0.1,0.2\n".encode()))
    table = nasbench1shot1.load(path)
    chain = OneShotGenotype(("maxpool3x3", "conv1x1-bn-relu"), ((0,), (1,), (2,)))
    loose = OneShotGenotype(("conv3x3-bn-relu", "maxpool3x3", "conv1x1-bn-relu"), ((0,), (0,), (2,), (3,)))
    assert table.find(chain) == table.find(loose) == {"valid": 0.1, "test": 0.2}
    assert OneShotGenotype(("conv1x1-bn-relu", "maxpool3x3"), ((0,), (1,), (2,))) not in table
    with pytest.raises(ValueError, match=r"the architecture maxpool3x3.* is not among its 1 rows"):
        table.find(OneShotGenotype(("maxpool3x3",), ((0,), (1,))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + CHAIN.replace("0100", "010") + "0.1,0.2\n", "row 2: 'adjacency7x7' must be 16 times 0 or 1"),
        (HEADER + CHAIN.replace("0100", "0102", 1) + "0.1,0.2\n", "row 2: 'adjacency7x7' must be 16 times 0 or 1"),
        (HEADER + CHAIN.replace("input", "in") + "0.1,0.2\n", "row 2: genotype: labels must begin with input"),
        (HEADER + CHAIN + "0.1,bad\n", "column 'mean_test_err' holds no numbers"),
        ("nodes,adjacency7x7,error\na,b,1\n", "no column 'mean_val_err': those there are nodes, adjacency7x7, error"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.csv: {message}"):
        nasbench1shot1.load(path)
