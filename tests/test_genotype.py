import itertools
import json
import os
import pickle
import random
from collections import namedtuple

import numpy as np
import pytest

from fastnas.genotype import (
    ChainGenotype,
    Genotype,
    NASBench201Genotype,
    OneShotGenotype,
    load_genotype,
    parse_genotype,
)

EDGES = [
    ("sep_conv_3x3", 1),
    ("sep_conv_3x3", 0),
    ("skip_connect", 0),
    ("sep_conv_3x3", 1),
    ("skip_connect", 0),
    ("sep_conv_3x3", 1),
    ("sep_conv_3x3", 0),
    ("skip_connect", 2),
]
REDUCE = [("max_pool_3x3", n % 2) for n in range(8)]
GENOTYPE = Genotype(normal=EDGES, normal_concat=range(2, 6), reduce=REDUCE, reduce_concat=[3, 4, 5])
TEXT = (
    "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
    "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=range(2, 6), "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('max_pool_3x3', 1)], reduce_concat=range(3, 6))"
)


def changed(**fields):
    return GENOTYPE._replace(**fields)


def test_equality_looks_at_contents():
    same = Genotype([list(edge) for edge in EDGES], [2, 3, 4, 5], tuple(REDUCE), (3, 4, np.int64(5)))
    assert same == GENOTYPE
    assert (same != GENOTYPE) is False
    assert hash(same) == hash(GENOTYPE)
    assert len({same, GENOTYPE}) == 1
    # a script's own namedtuple of the same fields
    other = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")
    assert GENOTYPE == other(EDGES, [2, 3, 4, 5], REDUCE, range(3, 6))  # noqa: SIM300


@pytest.mark.parametrize(
    "other",
    [
        changed(normal_concat=range(2, 5)),
        changed(reduce_concat=[3, 5, 4]),
        changed(normal=[("skip_connect", 1), *EDGES[1:]]),
        changed(normal=[("sep_conv_3x3", 0), *EDGES[1:]]),
        changed(normal=EDGES[:6]),
        changed(normal=None),
        "genotype",
        None,
    ],
)
def test_inequality(other):
    assert other != GENOTYPE
    assert (other == GENOTYPE) is False


def test_text_is_darts_notation():
    assert GENOTYPE.to_text() == TEXT
    # the text is Python that builds the genotype again
    assert eval(TEXT, {"Genotype": Genotype, "range": range}) == GENOTYPE


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"DARTS_V2 = {TEXT}\n",
        f"11/22 05:13:01 AM genotype = {TEXT}",
        TEXT.replace("range(2, 6)", "[2, 3, 4, 5]").replace("range(3, 6)", "(3, 4, 5)"),
        TEXT.replace("range(2, 6)", "list(range(2, 6))"),
        TEXT.replace("range(2, 6)", "range(2, 6, 1)"),
        TEXT.replace("(", "(\n  ").replace(",", ",\n"),
        TEXT.replace("normal=", "").replace("normal_concat=", "").replace("reduce=", "").replace("reduce_concat=", ""),
    ],
)
def test_reads_darts_notation(text):
    assert Genotype.from_text(text) == GENOTYPE


def test_json():
    text = GENOTYPE.to_json()
    assert json.loads(text) == {
        "normal": [list(edge) for edge in EDGES],
        "normal_concat": [2, 3, 4, 5],
        "reduce": [list(edge) for edge in REDUCE],
        "reduce_concat": [3, 4, 5],
    }
    read = Genotype.from_json(text)
    assert read == GENOTYPE
    assert isinstance(read.normal[0], tuple)


def test_unequal_cells_and_gaps():
    genotype = Genotype(EDGES, [2, 5], REDUCE[:2], [2])
    assert Genotype.from_json(genotype.to_json()) == Genotype.from_text(genotype.to_text()) == genotype
    assert "normal_concat=[2, 5]" in genotype.to_text()
    assert "reduce_concat=range(2, 3)" in genotype.to_text()


def test_numpy_integers_are_written():
    genotype = changed(normal=[(op, np.int64(i)) for op, i in EDGES], normal_concat=np.arange(2, 6).tolist())
    assert genotype.to_text() == TEXT
    assert Genotype.from_json(genotype.to_json()) == GENOTYPE


@pytest.mark.parametrize("name", ["genotype.json", "genotype.txt", "genotype"])
def test_files(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    GENOTYPE.save(path)
    assert Genotype.load(path) == GENOTYPE
    assert Genotype.load(str(path)) == GENOTYPE
    assert os.listdir(tmp_path) == [name]
    assert path.read_text().startswith("Genotype(" if name.endswith("txt") else "{")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "genotype.json"
    GENOTYPE.save(path)
    with pytest.raises(ValueError, match="normal_concat"):
        changed(normal_concat=[9]).save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        changed(normal_concat=[2]).save(path)
    assert os.listdir(tmp_path) == ["genotype.json"]
    assert Genotype.load(path) == GENOTYPE


def test_load_names_the_file(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"normal": []')
    with pytest.raises(ValueError, match=r"broken\.json: genotype: not valid JSON"):
        Genotype.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.json: "):
        Genotype.load(path)


def test_pickle():
    assert pickle.loads(pickle.dumps(GENOTYPE)) == GENOTYPE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normal": []}, "normal must be a list of .* pairs, two a node"),
        ({"normal": EDGES[:3]}, "normal must be a list of .* pairs, two a node"),
        ({"normal": "sep_conv_3x3"}, "normal must be a list"),
        ({"reduce": [*REDUCE[:7], ("skip_connect",)]}, r"reduce\[7\] must be a pair"),
        ({"reduce": [(1, 1), *REDUCE[1:]]}, r"reduce\[0\] must be a pair"),
        ({"normal": [("skip_connect", 2), *EDGES[1:]]}, r"normal\[0\] has input 2, but node 0 can read states 0 to 1"),
        ({"normal": [("skip_connect", -1), *EDGES[1:]]}, r"normal\[0\] has input -1"),
        ({"normal": [("skip_connect", 0.0), *EDGES[1:]]}, r"the input of normal\[0\] must be an integer, got 0\.0"),
        ({"normal": [("skip_connect", True), *EDGES[1:]]}, "must be an integer, got True"),
        ({"normal_concat": []}, "normal_concat must be a list or a range"),
        ({"normal_concat": 4}, "normal_concat must be a list or a range"),
        ({"normal_concat": [2, 2]}, "normal_concat must hold different states from 2 to 5"),
        ({"reduce_concat": range(2, 7)}, "reduce_concat must hold different states from 2 to 5"),
        ({"reduce_concat": [1, 2]}, "reduce_concat must hold different states from 2 to 5"),
        ({"reduce_concat": ["a"]}, r"reduce_concat\[0\] must be an integer"),
    ],
)
def test_validation(fields, message):
    broken = changed(**fields)
    for write in (broken.validate, broken.to_json, broken.to_text):
        with pytest.raises(ValueError, match=message):
            write()


def test_validation_of_primitives():
    assert GENOTYPE.validate(["sep_conv_3x3", "skip_connect", "max_pool_3x3"]) == GENOTYPE
    with pytest.raises(
        ValueError, match=r"normal\[2\] has the unknown op 'skip_connect': expected one of sep_conv_3x3"
    ):
        GENOTYPE.validate(["sep_conv_3x3", "max_pool_3x3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected Genotype"),
        ("Genotype(", "not a Genotype"),
        ("Genotype()", "normal is missing, normal_concat is missing"),
        (TEXT + ".normal", "expected one Genotype"),
        (TEXT.replace("normal_concat", "concat"), "normal_concat is missing, 'concat' is unknown"),
        (TEXT.replace("normal=", "reduce=", 1), "reduce"),
        (TEXT.replace("range(2, 6)", "range(10**9)"), "normal_concat must be a literal|range that is no list"),
        (TEXT.replace("range(2, 6)", "range(0, 1000000000)"), "range that is no list of states"),
        (TEXT.replace("range(2, 6)", "range(2, 6, 0)"), "range that is no list of states"),
        (TEXT.replace("range(2, 6)", "open('/etc/passwd')"), "normal_concat must be a literal list"),
        (TEXT.replace("range(2, 6)", "__import__('os').getcwd()"), "normal_concat must be a literal list"),
        ("Genotype(" + "[" * 5000 + "]" * 5000 + ")", "genotype: "),
        ("Genotype(**{})", "unknown"),
        ("Genotype(1, 2, 3, 4, 5)", "expected one Genotype"),
        ("Genotype([], normal=[])", "normal is given twice"),
    ],
)
def test_text_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Genotype.from_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"normal": []}', "normal_concat is missing"),
        (GENOTYPE.to_json().replace('"normal"', '"extra": 1, "normal"'), "'extra' is unknown"),
    ],
)
def test_json_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(text)


CELL_TEXT = "|nor_conv_3x3~0|+|nor_conv_1x1~0|none~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_3x3~2|"
CELL = NASBench201Genotype(
    ("nor_conv_3x3", "nor_conv_1x1", "none", "skip_connect", "avg_pool_3x3", "nor_conv_3x3")
)  # an op an edge: (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)


def test_nasbench201_notations():
    assert CELL.to_text() == CELL_TEXT
    assert NASBench201Genotype.from_text(f" {CELL_TEXT}\n") == CELL
    # a node's inputs may come in any order
    swapped = CELL_TEXT.replace("nor_conv_1x1~0|none~1", "none~1|nor_conv_1x1~0")
    assert NASBench201Genotype.from_text(swapped) == CELL
    assert json.loads(CELL.to_json()) == {"ops": list(CELL.ops)}
    assert NASBench201Genotype.from_json(CELL.to_json()) == CELL
    assert NASBench201Genotype(list(CELL.ops)) == CELL
    assert len({CELL, NASBench201Genotype(CELL.ops), pickle.loads(pickle.dumps(CELL))}) == 1
    assert CELL.edges == ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    assert NASBench201Genotype(["none"]).to_text() == "|none~0|"
    assert len(NASBench201Genotype(("none",) * 10).edges) == 10


@pytest.mark.parametrize(
    ("open_edges", "expected"),
    [
        ([(3, 0)], True),
        ([(1, 0), (3, 1)], True),
        ([(1, 0), (2, 1), (3, 2)], True),
        ([(2, 0), (3, 2)], True),
        ([], False),
        ([(1, 0), (3, 2)], False),
        ([(2, 1), (3, 1), (3, 2)], False),
        ([(1, 0), (2, 0), (2, 1)], False),
    ],
)
def test_has_path(open_edges, expected):
    genotype = NASBench201Genotype(tuple("avg_pool_3x3" if edge in open_edges else "none" for edge in CELL.edges))
    assert genotype.has_path() is expected


def test_nasbench201_validation_of_primitives():
    assert CELL.validate() is CELL
    assert CELL.validate(set(CELL.ops)) is CELL
    with pytest.raises(ValueError, match=r"ops\[2\] is the unknown op 'none': expected one of nor_conv_3x3"):
        CELL.validate([op for op in CELL.ops if op != "none"])


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ((), "ops must be a list of operations"),
        ("none", "ops must be a list of operations"),
        (None, "ops must be a list of operations"),
        (("none",) * 4, "4 operations are no cell"),
        (("none", 1, "none"), r"ops\[1\] must be the name of an operation, got 1"),
        (("none", "a|b", "none"), r"ops\[1\] must be the name"),
        (("none", "", "none"), r"ops\[1\] must be the name"),
    ],
)
def test_nasbench201_errors(ops, message):
    with pytest.raises(ValueError, match=message):
        NASBench201Genotype(ops)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected \|op~0\|"),
        ("none~0", r"expected \|op~0\|"),
        ("|none|", r"expected \|op~0\|"),
        ("||", r"expected \|op~0\|"),
        ("|none~a|", r"expected \|op~0\|"),
        ("|none~1|", "node 1 must have each input from 0 to 0 once"),
        ("|none~0|+|none~0|", "node 2 must have each input from 0 to 1 once"),
        ("|none~0|+|none~0|none~0|none~1|", "node 2 must have each input from 0 to 1 once"),
        ("|none~0|+|none~0|none~2|", "node 2 must have each input"),
    ],
)
def test_nasbench201_text_errors(text, message):
    with pytest.raises(ValueError, match=message):
        NASBench201Genotype.from_text(text)


def test_nasbench201_json_errors():
    with pytest.raises(ValueError, match="ops is missing, 'op' is unknown"):
        NASBench201Genotype.from_json('{"op": []}')
    with pytest.raises(ValueError, match="expected a JSON object with ops"):
        NASBench201Genotype.from_json('["none"]')


GRAPH = OneShotGenotype(
    ("conv3x3-bn-relu", "maxpool3x3", "conv1x1-bn-relu"), ((0,), (0, 1), (1,), (0, 2))
)  # node 3 is a loose end


def test_one_shot_notations():
    text = "conv3x3-bn-relu(0)+maxpool3x3(0,1)+conv1x1-bn-relu(1)+output(0,2)"
    assert GRAPH.to_text() == text
    assert OneShotGenotype.from_text(f" {text.replace('+', ' + ').replace(',', ', ')} ") == GRAPH
    assert OneShotGenotype(list(GRAPH.ops), [[0], [1, 0], [1], [2, 0]]) == GRAPH
    assert OneShotGenotype.from_json(GRAPH.to_json()) == GRAPH
    assert len({GRAPH, pickle.loads(pickle.dumps(GRAPH))}) == 1
    assert OneShotGenotype((), ((0,),)).to_text() == "output(0)"


def test_one_shot_tables():
    labels, matrix = GRAPH.to_table()
    assert labels == ("input", *GRAPH.ops, "conv1x1-bn-relu", "conv1x1-bn-relu", "output")
    assert ["".join(map(str, row)) for row in matrix] == [
        *["0110001", "0011000", "0000001", "0000000", "0000000", "0000000", "0000000"]
    ]
    assert OneShotGenotype.from_table(labels, matrix) == GRAPH
    assert OneShotGenotype.from_table(*GRAPH.to_table(5)) == GRAPH
    with pytest.raises(ValueError, match="nodes=4: the cell has 5, input and output included"):
        GRAPH.to_table(4)


@pytest.mark.parametrize(
    ("labels", "matrix", "message"),
    [
        (["input"], [[0]], "labels must begin with input and end with output"),
        (["output", "input"], [[0, 1], [0, 0]], "labels must begin with input"),
        (["input", "output"], [[0, 1]], "must be 2 x 2"),
        (["input", "output"], [[0, 1], [0]], "must be 2 x 2"),
        (["input", "output"], [[0, 1], [1, 0]], "0 and 1 above its diagonal, and 0 elsewhere"),
        (["input", "output"], [[0, 2], [0, 0]], "0 and 1 above its diagonal"),
        (["input", "output"], [[0, 0], [0, 0]], r"inputs\[0\] must hold one or more different nodes"),
        (["input", "a", "output"], [[0, 0, 1], [0, 0, 1], [0, 0, 0]], r"inputs\[0\] must hold one or more"),
    ],
)
def test_one_shot_table_errors(labels, matrix, message):
    with pytest.raises(ValueError, match=message):
        OneShotGenotype.from_table(labels, matrix)


def test_pruned():
    assert GRAPH.pruned() == OneShotGenotype(GRAPH.ops[:2], ((0,), (0, 1), (0, 2)))
    assert GRAPH.pruned().pruned() == GRAPH.pruned()
    # a chain of loose ends, before and between what is kept
    cell = OneShotGenotype(("a", "b", "c", "d"), ((0,), (0,), (1,), (2,), (4,)))
    assert cell.pruned() == OneShotGenotype(("b", "d"), ((0,), (1,), (2,)))


def test_canonical_is_isomorphism():
    """Genotypes have the same canonical form exactly where networkx finds their graphs isomorphic."""
    networkx = pytest.importorskip("networkx")
    generator = random.Random(0)

    def draw():
        nodes = generator.randint(2, 5)
        inputs = [generator.sample(range(i), generator.randint(1, min(i, 2))) for i in range(1, nodes + 2)]
        return OneShotGenotype([generator.choice("aab") for _ in range(nodes)], inputs)

    def graph(genotype):
        pruned = genotype.pruned()
        g = networkx.DiGraph()
        for n, label in enumerate(["input", *pruned.ops, "output"]):
            g.add_node(n, label=label)
        g.add_edges_from((j, i) for i, nodes in enumerate(pruned.inputs, start=1) for j in nodes)
        return g

    def same(a, b):
        return networkx.is_isomorphic(graph(a), graph(b), node_match=lambda x, y: x["label"] == y["label"])

    cells = [draw() for _ in range(80)]
    for (a, x), (b, y) in itertools.combinations([(cell, cell.canonical()) for cell in cells], 2):
        assert (x == y) is same(a, b)
    renumbered = 0
    for a in cells:
        nodes = len(a.ops)
        for order in itertools.permutations(range(1, nodes + 1)):
            place = {0: 0, **{node: n for n, node in enumerate(order, start=1)}}
            inputs = [[place[j] for j in a.inputs[node - 1]] for node in (*order, nodes + 1)]
            if all(j <= n for n, read in enumerate(inputs) for j in read):
                b = OneShotGenotype([a.ops[node - 1] for node in order], inputs)
                assert b.canonical() == a.canonical()
                renumbered += a.pruned() != b.pruned()
    assert renumbered > 20


@pytest.mark.parametrize(
    ("ops", "inputs", "message"),
    [
        ("ab", ((0,), (1,), (2,)), "ops must be a list"),
        (("a(",), ((0,), (1,)), r"ops\[0\] must be the name"),
        (("output",), ((0,), (1,)), r"ops\[0\] must be the name"),
        (("a",), ((0,),), "inputs must be 2 lists of nodes"),
        (("a",), "01", "inputs must be 2 lists of nodes"),
        (("a",), ((0,), "1"), r"inputs\[1\] must be a list of nodes"),
        (("a",), ((0,), ()), r"inputs\[1\] must hold one or more different nodes from 0 to 1"),
        (("a",), ((1,), (1,)), r"inputs\[0\] must hold one or more different nodes from 0 to 0"),
        (("a",), ((0,), (1, 1)), r"inputs\[1\] must hold"),
        (("a",), ((0,), (0.0,)), r"inputs\[1\]\[0\] must be an integer"),
    ],
)
def test_one_shot_errors(ops, inputs, message):
    with pytest.raises(ValueError, match=message):
        OneShotGenotype(ops, inputs)


@pytest.mark.parametrize(
    "text", ["", "output", "a(0)", "a(0)+b(1)", "a(0)output(1)", "a(x)+output(1)", "output(0)+a(0)"]
)
def test_one_shot_text_errors(text):
    with pytest.raises(ValueError, match=r"expected op\(0\)\+op\(0,1\)"):
        OneShotGenotype.from_text(text)


def test_one_shot_validation_of_primitives():
    assert GRAPH.validate(GRAPH.ops) is GRAPH
    with pytest.raises(ValueError, match=r"ops\[1\] is the unknown op 'maxpool3x3'"):
        GRAPH.validate(["conv3x3-bn-relu"])


MACRO = ChainGenotype.from_text("22212202")
CHAIN = ChainGenotype(("mbconv3_3x3", "skip_connect", "mbconv6_7x7"))


def test_chain_notations():
    assert MACRO.ops == tuple(("skip_connect", "mb3_3x3", "mb6_5x5")[int(digit)] for digit in "22212202")
    assert MACRO.to_text() == "22212202"
    assert CHAIN.to_text() == "mbconv3_3x3>skip_connect>mbconv6_7x7"
    assert ChainGenotype.from_text(" mbconv3_3x3 > skip_connect > mbconv6_7x7 ") == CHAIN
    assert json.loads(CHAIN.to_json()) == {"chain": list(CHAIN.ops)}
    assert len({CHAIN, ChainGenotype(list(CHAIN.ops)), pickle.loads(pickle.dumps(CHAIN))}) == 1
    alone = ChainGenotype(("mbconv3_3x3",))
    assert alone.to_text() == "mbconv3_3x3>"
    assert parse_genotype(alone.to_text()) == alone
    assert parse_genotype("0\n").ops == ("skip_connect",)
    with pytest.raises(ValueError, match=r"ops\[1\] is the unknown op 'skip_connect'"):
        CHAIN.validate(["mbconv3_3x3", "mbconv6_7x7"])


@pytest.mark.parametrize("ops", [(), "abc", ("a", 1), ("a", "b>c"), ("a", ""), ("a b",), None])
def test_chain_errors(ops):
    with pytest.raises(ValueError, match="genotype: ops"):
        ChainGenotype(ops)


@pytest.mark.parametrize("text", ["", "013", "mbconv3_3x3", ">", "a>>b", "a>b(c)", "|none~0|"])
def test_chain_text_errors(text):
    with pytest.raises(ValueError, match="genotype: "):
        ChainGenotype.from_text(text)


@pytest.mark.parametrize(
    "genotype", [GENOTYPE, CELL, GRAPH, MACRO, CHAIN], ids=["darts", "nasbench201", "one-shot", "macro", "chain"]
)
@pytest.mark.parametrize("name", ["genotype.json", "genotype.txt"])
def test_every_notation_is_recognised(tmp_path, genotype, name):
    assert parse_genotype(genotype.to_text()) == parse_genotype(genotype.to_json()) == genotype
    path = tmp_path / name
    genotype.save(path)
    loaded = load_genotype(path)
    assert type(loaded) is type(genotype)
    assert loaded == genotype == type(genotype).load(path)
    assert os.listdir(tmp_path) == [name]
    path.write_text("nothing")
    with pytest.raises(ValueError, match=f"{name}: genotype: expected"):
        load_genotype(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=f"{name}: genotype: "):
        load_genotype(path)
