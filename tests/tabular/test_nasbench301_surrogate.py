import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.genotype import Genotype
from fastnas.spaces import get_space
from fastnas.tabular import nasbench301
from fastnas.tabular.nasbench301 import PRIMITIVES, Surrogate, features, kendall

DATA = Path(__file__).parents[3] / "shared" / "data" / "darts" / "nb301_surrogate_725.csv.gz"
GENERATOR = torch.Generator().manual_seed(0)
CELLS = [get_space("darts").sample(GENERATOR) for _ in range(120)]


def convolutions(genotype):
    """An accuracy to learn: separable convolutions help, and more so in the normal cell."""
    return sum("sep" in op for op, _ in genotype.normal) + 0.5 * sum("sep" in op for op, _ in genotype.reduce)


def test_features_by_hand():
    cell = [
        *[("sep_conv_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 0), ("sep_conv_3x3", 2)],
        *[("dil_conv_5x5", 2), ("dil_conv_5x5", 3), ("skip_connect", 0), ("skip_connect", 1)],
    ]
    (row,) = features([Genotype(cell, range(2, 6), cell, range(2, 6))])
    assert row.shape == (88,)
    np.testing.assert_array_equal(row[:44], row[44:])
    used, read, depth, first, mean, total, ways = np.split(row[:44], [7, 13, 15, 29, 36, 43])

    def by_name(numbers):
        return {op: n for op, n in zip(PRIMITIVES, numbers, strict=True) if n}

    assert by_name(used) == {"max_pool_3x3": 1, "skip_connect": 3, "sep_conv_3x3": 2, "dil_conv_5x5": 2}
    assert read.tolist() == [3, 2, 2, 1, 0, 0]
    assert depth.tolist() == [3, 1 + 2 + 3 + 1]
    assert by_name(first[:7]) == {"max_pool_3x3": 1, "skip_connect": 1, "sep_conv_3x3": 1}
    assert by_name(first[7:]) == {"skip_connect": 2}
    # ways to the nodes: 2, 1 + 2, 2 + 3, 2
    assert ways.tolist() == [12]
    # to node 0: sep, skip; to 1: pool, sep sep, skip sep; to 2: those of 0 and 1 and dil each; to 3: skip, skip
    assert by_name(total) == {
        "max_pool_3x3": 0 + 1 + 1 + 0,
        "skip_connect": 1 + 1 + (1 + 1) + 2,
        "sep_conv_3x3": 1 + 3 + (1 + 3) + 0,
        "dil_conv_5x5": 5,
    }
    np.testing.assert_allclose(mean, total / 12)


def test_learns_and_repeats():
    y = [convolutions(cell) for cell in CELLS]
    surrogate = Surrogate(CELLS[:100], y[:100])
    predicted = surrogate.predict(CELLS[100:])
    assert predicted.shape == (20,)
    assert kendall(predicted, y[100:]) > 0.6
    assert np.array_equal(Surrogate(CELLS[:100], y[:100]).predict(CELLS[100:]), predicted)
    assert surrogate.predict([]).shape == (0,)


def test_cross_validation_sees_no_cell_twice():
    rng = np.random.default_rng(0)
    learnable = Surrogate(CELLS, [convolutions(cell) for cell in CELLS])
    agreement = learnable.cross_validation()
    assert agreement.r2 > 0.7
    assert agreement.kendall > 0.6
    assert learnable.cross_validation() == agreement
    # what cannot be known is not predicted, however well the cells themselves are fitted
    noise = Surrogate(CELLS, rng.normal(size=len(CELLS))).cross_validation(5)
    assert noise.r2 < 0.1
    assert abs(noise.kendall) < 0.2


def test_kendall():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 50), rng.normal(size=50)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert kendall([1, 2, 3], [5, 6, 9]) == 1.0


def test_nasbench301():
    if not DATA.exists():
        pytest.skip("the accuracies of NAS-Bench-301 are not on this machine")
    surrogate = Surrogate.fit(DATA)
    assert len(surrogate) == 725
    agreement = surrogate.cross_validation()
    assert agreement.r2 > 0.89
    assert agreement.kendall > 0.79
    # cells of its table are not given back, only approached; random ones stay within its range
    assert 90 < surrogate.predict(CELLS).min() < surrogate.predict(CELLS).max() < 96


def table(tmp_path, rows, header="genotype,surrogate_val_acc"):
    path = tmp_path / "table.csv"
    lines = [header, *(f'"{text.replace(chr(34), chr(34) * 2)}",{value}' for text, value in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def cell_json(genotype):
    return json.dumps({"normal": genotype.normal, "reduce": genotype.reduce})


def test_fit_reads_tables(tmp_path):
    rows = [(cell_json(cell), convolutions(cell)) for cell in CELLS[:40]]
    surrogate = Surrogate.fit(table(tmp_path, rows))
    direct = Surrogate(CELLS[:40], [convolutions(cell) for cell in CELLS[:40]])
    assert np.array_equal(surrogate.predict(CELLS[40:50]), direct.predict(CELLS[40:50]))
    whole = [(cell.to_json().replace("\n", " "), convolutions(cell)) for cell in CELLS[:40]]
    assert np.array_equal(
        Surrogate.fit(table(tmp_path, whole, "cell,accuracy"), "accuracy", "cell").predict(CELLS[40:50]),
        direct.predict(CELLS[40:50]),
    )


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("{}", 1)], "arch,surrogate_val_acc", "no column 'genotype': those there are arch, surrogate_val_acc"),
        ([("{}", 1)], "genotype,surrogate_val_acc", "row 2: genotype: normal is missing"),
        ([("[", 1)], "genotype,surrogate_val_acc", "row 2: "),
        ([("[]", 1)], "genotype,surrogate_val_acc", "row 2: genotype: expected a JSON object"),
        ([(cell_json(CELLS[0]), "high")], "genotype,surrogate_val_acc", "column 'surrogate_val_acc' holds no numbers"),
        (
            [(cell_json(CELLS[0]), 1)],
            "genotype,surrogate_val_acc",
            r"accuracies has shape \(1,\): expected one .* two or more",
        ),
        ([(cell_json(c), "") for c in CELLS[:2]], "genotype,surrogate_val_acc", "accuracies must be finite numbers"),
    ],
)
def test_broken_tables(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=rf"table\.csv: {message}"):
        Surrogate.fit(table(tmp_path, rows, header))


def test_errors():
    short = Genotype(CELLS[0].normal[:4], [2, 3], CELLS[0].reduce[:4], [2, 3])
    other = CELLS[0]._replace(normal=[("none", 0), *CELLS[0].normal[1:]])
    surrogate = Surrogate(CELLS[:3], [1, 2, 3])
    with pytest.raises(ValueError, match="normal has 2 nodes, cells of NAS-Bench-301 have 4"):
        surrogate.predict([short])
    with pytest.raises(ValueError, match="unknown op 'none'"):
        surrogate.predict([other])
    with pytest.raises(ValueError, match="expected one for each of 3 genotypes"):
        Surrogate(CELLS[:3], [1, 2])
    for folds in (1, 4):
        with pytest.raises(ValueError, match=f"folds={folds} must be from 2 to the 3 cells"):
            surrogate.cross_validation(folds)
    assert surrogate.cross_validation(3).kendall <= 1
    assert tuple(p for p in get_space("darts").primitives if p != "none") == nasbench301.PRIMITIVES
