"""Architectures by name: sizes are the printed ones, and whatever says which architecture is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastnas.cli import main
from fastnas.genotype import Genotype, NASBench201Genotype, OneShotGenotype, parse_genotype
from fastnas.genotypes import GENOTYPES, find_genotype
from fastnas.nn import NASBench201Network, Network
from fastnas.nn.counting import Complexity, count
from fastnas.spaces import get_space

CHAIN = get_space("proxyless").sample(torch.Generator().manual_seed(0))
CELLS = {name: known.genotype for name, known in GENOTYPES.items() if isinstance(known.genotype, Genotype)}
FIVE_NODES = {"NASNet", "AmoebaNet"}


def equals(value: int, printed: str) -> bool:
    """Whether this many are the printed millions, in the digits that are printed."""
    return f"{value / 1e6:.{len(printed.partition('.')[2])}f}" == printed


def imagenet(name: str) -> Complexity:
    network = Network(CELLS[name], GENOTYPES[name].published.imagenet_channels, 14, 1000, stem="imagenet")
    return count(network, (3, 224, 224))


@pytest.mark.parametrize(
    "name",
    [
        "DARTS_V2",
        "PDARTS",
        "PC_DARTS_cifar",
        "PC_DARTS_image",
        "DrNAS_cifar10",
        "DrNAS_imagenet",
        "GDAS_V1",
        "SNAS_moderate",
    ],
)
def test_sizes_are_the_printed_ones(name: str) -> None:
    printed = GENOTYPES[name].published
    if printed.parameters:
        assert equals(sum(p.numel() for p in Network(CELLS[name]).parameters()), printed.parameters)
    size = imagenet(name)
    if printed.imagenet_parameters:
        assert equals(size.parameters, printed.imagenet_parameters)
    if name == "GDAS_V1":
        assert equals(size.multiply_adds, printed.multiply_adds or "")
    elif name == "DARTS_V2":  # of which 574 is printed; issue 46 of its repository has this count
        assert equals(size.multiply_adds + size.elementwise, "544.59")
    elif printed.multiply_adds:
        assert equals(size.multiply_adds + size.elementwise, printed.multiply_adds)


@pytest.mark.parametrize("name", [n for n, known in GENOTYPES.items() if n not in CELLS])
def test_cells_of_nasbench201_are_of_the_space(name: str) -> None:
    space = get_space("nb201")
    genotype = GENOTYPES[name].genotype
    assert space.derive(space.encode(genotype)) == genotype


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_of_the_darts_space_or_refused(name: str) -> None:
    space = get_space("darts")
    genotype = CELLS[name]
    if name in FIVE_NODES:
        with pytest.raises(ValueError, match=r"unknown op|has 5 nodes"):
            space.encode(genotype)
        return
    derived = space.derive(space.encode(genotype))
    assert isinstance(derived, Genotype)
    for cell, other in ((genotype.normal, derived.normal), (genotype.reduce, derived.reduce)):
        assert [set(cell[n : n + 2]) for n in range(0, 8, 2)] == [set(other[n : n + 2]) for n in range(0, 8, 2)]
    assert list(derived.normal_concat) == list(genotype.normal_concat)


@pytest.mark.parametrize("name", sorted(FIVE_NODES))
def test_five_nodes_make_a_network(name: str) -> None:
    network = Network(CELLS[name], 4, 4, 5, auxiliary=True)
    main_, auxiliary = network(torch.randn(2, 3, 32, 32))
    (main_.sum() + auxiliary.sum()).backward()
    assert main_.shape == auxiliary.shape == (2, 5)
    multipliers = [cell.multiplier for cell in network.cells]
    normal, reduce = len(CELLS[name].normal_concat), len(CELLS[name].reduce_concat)
    assert multipliers == [normal, reduce, reduce, normal]
    assert network.classifier.in_features == 16 * normal
    assert all(p.grad is not None for p in network.parameters())


def test_names_do_not_mind_case_and_hyphens() -> None:
    assert find_genotype("pc-darts-CIFAR") == CELLS["PC_DARTS_cifar"]


@pytest.mark.parametrize("name", ["PDARTS", "AmoebaNet", "NB201_ResNet"])
def test_every_notation_written_out_and_in_a_file(name: str, tmp_path: Path) -> None:
    genotype = GENOTYPES[name].genotype
    for n, text in enumerate((genotype.to_text(), genotype.to_json())):
        assert find_genotype(text) == find_genotype(f"  {text}\n") == genotype
        (tmp_path / str(n)).write_text(text)
        assert find_genotype(tmp_path / str(n)) == find_genotype(str(tmp_path / str(n))) == genotype


def test_nasbench1shot1_written_out() -> None:
    text = "conv3x3-bn-relu(0)+output(0,1)"
    assert find_genotype(text) == OneShotGenotype(("conv3x3-bn-relu",), ((0,), (0, 1)))


def test_files_of_several_architectures(tmp_path: Path) -> None:
    file = tmp_path / "genotypes.py"
    file.write_text(
        "from collections import namedtuple\nGenotype = namedtuple('Genotype', 'normal normal_concat')\nraise Exit\n"
        f"A = {CELLS['PDARTS'].to_text()}\n\nB: Genotype = {CELLS['NASNet'].to_text().replace(', ', ',' + chr(10))}\n"
        f"# old\nC = Genotype(normal=[])\nA = {CELLS['DARTS_V1'].to_text()}\nLATEST = B\n"
    )
    assert find_genotype(f"{file}:A") == CELLS["DARTS_V1"], "of several with one name, the last"
    assert find_genotype(f"{file}:B") == CELLS["NASNet"]
    with pytest.raises(
        ValueError, match=r"genotypes\.py holds several architectures: say which, .*; there are A, B, C"
    ):
        find_genotype(file)
    with pytest.raises(ValueError, match=r"genotypes\.py: nothing is assigned to 'LATEST'; there are A, B, C"):
        find_genotype(f"{file}:LATEST")
    with pytest.raises(ValueError, match=r"genotypes\.py: genotype: normal_concat is missing"):
        find_genotype(f"{file}:C")
    file.write_text(f"import x\nONE = {CELLS['PDARTS'].to_text()}\nTWO = ONE\n")
    assert find_genotype(file) == CELLS["PDARTS"]


def test_what_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="DARTS_V3 is neither a file nor the name of an architecture: DARTS_V1, "):
        find_genotype("DARTS_V3")
    with pytest.raises(FileNotFoundError):
        find_genotype("folder/none.json")
    with pytest.raises(FileNotFoundError, match=r"genotype\.json"):
        find_genotype(tmp_path)
    with pytest.raises(ValueError, match="expected Genotype"):
        find_genotype("print(1)")
    monkeypatch.chdir(tmp_path)
    CELLS["PDARTS"].save("DARTS_V1")
    assert find_genotype("./DARTS_V1") == CELLS["PDARTS"] != find_genotype("DARTS_V1")


def test_show_lists_all_and_prints_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["PC_DARTS_cifar"] == ["1907.05737", "2.57", "3.6", "5.3", "586"]
    assert lines.keys() > GENOTYPES.keys()
    assert main(["show", "NASNet", "--draw", str(tmp_path)]) == 0
    assert capsys.readouterr().out == CELLS["NASNet"].to_text() + "\n"
    assert {p.name for p in tmp_path.iterdir()} == {"cell_normal.png", "cell_reduce.png"}
    (tmp_path / "genotype.json").write_text(CELLS["NASNet"].to_json())
    assert main(["show", str(tmp_path), "--to=json"]) == 0
    assert json.loads(capsys.readouterr().out)["reduce_concat"] == [4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "network", "shape"),
    [
        (["DARTS_V1", "--channels=4", "--layers=3"], lambda: Network(CELLS["DARTS_V1"], 4, 3), (3, 32, 32)),
        (
            ["AmoebaNet", "--imagenet", "--channels=6", "--layers=3", "--image-size=64"],
            lambda: Network(CELLS["AmoebaNet"], 6, 3, 1000, stem="imagenet"),
            (3, 64, 64),
        ),
        (
            ["|skip_connect~0|+|nor_conv_1x1~0|none~1|", "--layers=1", "--in-channels=1", "--num-classes=7"],
            lambda: NASBench201Network(NASBench201Genotype(("skip_connect", "nor_conv_1x1", "none")), 16, 1, 7, 1),
            (1, 32, 32),
        ),
        (
            ["01201201", "--channels=4"],
            lambda: get_space("nb-macro").network(parse_genotype("01201201"), 4),
            (3, 32, 32),
        ),
        (
            [CHAIN.to_text(), "--channels=8", "--image-size=32"],
            lambda: get_space("proxyless").network(CHAIN, 8, num_classes=1000),
            (3, 32, 32),
        ),
    ],
    ids=["darts", "imagenet", "nb201", "macro", "proxyless"],
)
def test_count_command(arguments, network, shape, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["count", *arguments]) == 0
    numbers = [int(line.split()[1].replace(",", "")) for line in capsys.readouterr().out.splitlines()[1:]]
    size = count(network(), shape)
    assert numbers == [size.parameters, size.multiply_adds, size.elementwise]
