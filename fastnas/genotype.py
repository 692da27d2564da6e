"""Genotypes: discrete architectures, and their written forms.

One class for each family of spaces: :class:`Genotype` (DARTS), :class:`NASBench201Genotype`, :class:`OneShotGenotype`
(NAS-Bench-1Shot1 and NAS-Bench-101, whose operations lie on the nodes), and :class:`ChainGenotype` (NAS-Bench-Macro and
ProxylessNAS, one block after another).
:func:`load_genotype` and :func:`parse_genotype` tell by the notation which one they have.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastnas._files import write_text

_ENDS = ("input", "output")  # the labels of a NAS-Bench-101 cell's first and last node
_MACRO = ("skip_connect", "mb3_3x3", "mb6_5x5")  # what NAS-Bench-Macro writes as 0, 1 and 2
_MAX_NODES = 1000  # a written range() is expanded, so its length is bounded before that


class Genotype(NamedTuple):
    """A normal and a reduction cell.

    ``normal`` and ``reduce`` list the kept edges as ``(op, input)``, two a node: entries 2n and 2n + 1 belong to node
    n, which is state n + 2. Inputs 0 and 1 are the outputs of the two previous cells, 2, 3, ... the nodes before.
    ``normal_concat`` and ``reduce_concat`` are the states that are concatenated to the cell's output.

    Equality looks at the contents alone: lists, tuples and ranges are the same.
    """

    normal: Sequence[tuple[str, int]]
    normal_concat: Sequence[int]
    reduce: Sequence[tuple[str, int]]
    reduce_concat: Sequence[int]

    def __eq__(self, other: object) -> bool:
        """Tells whether ``other`` (any tuple of these four fields) is the same architecture."""
        if not isinstance(other, tuple) or len(other) != 4:
            return NotImplemented
        try:
            return _key(self) == _key(other)
        except (TypeError, ValueError):
            return False

    def __ne__(self, other: object) -> bool:
        """Tells whether ``other`` is another architecture."""
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        """Returns a hash that agrees with equality."""
        return hash(_key(self))

    def validate(self, primitives: Iterable[str] | None = None) -> Genotype:
        """Returns the genotype with plain lists of ``(str, int)`` and of int (a range where concat is one).

        Args:
            primitives: the operations that may occur; any, where None.

        Raises:
            ValueError: where it describes no architecture; the message names the field.
        """
        allowed = None if primitives is None else tuple(primitives)
        return Genotype(
            normal=_edges("normal", self.normal, allowed),
            normal_concat=_concat("normal_concat", self.normal_concat, len(self.normal) // 2),
            reduce=_edges("reduce", self.reduce, allowed),
            reduce_concat=_concat("reduce_concat", self.reduce_concat, len(self.reduce) // 2),
        )

    def to_json(self) -> str:
        """Returns a JSON object of the four fields.

        Raises:
            ValueError: as :meth:`validate`.
        """
        valid = self.validate()
        fields = {name: json.dumps(list(value)) for name, value in zip(self._fields, valid, strict=True)}
        return "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in fields.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Returns the genotype that :meth:`to_json` wrote.

        Raises:
            ValueError: where ``text`` is no JSON object of exactly the four fields, or as :meth:`validate`.
        """
        return cls(**_fields(text, cls._fields)).validate()

    def to_text(self) -> str:
        """Returns DARTS' own notation, ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)``.

        Raises:
            ValueError: as :meth:`validate`.
        """
        return repr(self.validate())

    @classmethod
    def from_text(cls, text: str) -> Genotype:
        """Returns the genotype written in DARTS' notation; nothing in ``text`` is executed.

        What precedes ``Genotype(`` is skipped, so that a line of ``genotypes.py`` (``DARTS_V2 = Genotype(...)``) or of
        a search log will do. Concatenations may be lists, tuples, ``range(a, b)`` or ``list(range(a, b))``.

        Raises:
            ValueError: where ``text`` is not in that notation, or as :meth:`validate`.
        """
        start = text.find("Genotype(")
        if start < 0:
            raise ValueError(f"genotype: expected Genotype(normal=..., normal_concat=..., ...), got {_short(text)}")
        try:
            call = ast.parse(text[start:].strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"genotype: not a Genotype(...) expression: {error}") from None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and len(call.args) <= 4):
            raise ValueError(f"genotype: expected one Genotype(...) call, got {_short(text)}")
        fields = {name: _literal(name, node) for name, node in zip(cls._fields, call.args, strict=False)}
        for keyword in call.keywords:
            name = keyword.arg or "**"
            if name in fields:
                raise ValueError(f"genotype: {name} is given twice")
            fields[name] = _literal(name, keyword.value)
        _check_names(fields, cls._fields)
        return cls(**fields).validate()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the genotype: DARTS' notation where ``path`` ends in ``.txt``, else JSON. The file appears whole.

        Raises:
            ValueError: as :meth:`validate`; nothing is written then.
        """
        _save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Genotype:
        """Returns the genotype in a file, in JSON or in DARTS' notation.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it holds no genotype; the message names the file.
        """
        return _load(Path(path), cls.from_json, cls.from_text)


@dataclass(frozen=True)
class NASBench201Genotype:
    """A cell of NAS-Bench-201 (arXiv:2001.00326): one operation for every edge between densely connected nodes.

    Node 0 is the cell's input and the last node its output. A genotype is checked when it is made, so it always
    describes an architecture.

    Attributes:
        ops: The operations of the edges (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), ...: from node j to node i.

    Raises:
        ValueError: where the number of operations is not that of a cell (1, 3, 6, 10, ...), or one is no name.
    """

    ops: tuple[str, ...]

    def __post_init__(self) -> None:
        ops = self.ops
        if isinstance(ops, str) or not isinstance(ops, Sequence) or not ops:
            raise ValueError(f"genotype: ops must be a list of operations, one an edge, got {_short(ops)}")
        for edge, op in enumerate(ops):
            if not isinstance(op, str) or not op.strip() or any(mark in op for mark in "|~+"):
                raise ValueError(f"genotype: ops[{edge}] must be the name of an operation, got {_short(op)}")
        object.__setattr__(self, "ops", tuple(str(op) for op in ops))
        if self.nodes * (self.nodes - 1) // 2 != len(ops):
            raise ValueError(
                f"genotype: {len(ops)} operations are no cell: with every node fed by all before it, there are 1, 3, "
                "6, 10, ... edges"
            )

    @property
    def nodes(self) -> int:
        """Number of nodes, the cell's input included."""
        return (1 + math.isqrt(1 + 8 * len(self.ops))) // 2

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges ``(i, j)``, from node j to node i, in the order of ``ops``."""
        return tuple((i, j) for i in range(1, self.nodes) for j in range(i))

    def has_path(self) -> bool:
        """Tells whether the output depends on the input: whether a way between them avoids every ``none``."""
        reached = {0}
        for (i, j), op in zip(self.edges, self.ops, strict=True):
            if j in reached and op != "none":
                reached.add(i)
        return self.nodes - 1 in reached

    def validate(self, primitives: Iterable[str] | None = None) -> NASBench201Genotype:
        """Returns the genotype itself.

        Args:
            primitives: the operations that may occur; any, where None.

        Raises:
            ValueError: for another operation; the message names the edge.
        """
        _check_ops(self.ops, primitives)
        return self

    def to_json(self) -> str:
        """Returns a JSON object with the one field ``ops``."""
        return json.dumps({"ops": list(self.ops)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> NASBench201Genotype:
        """Returns the genotype that :meth:`to_json` wrote.

        Raises:
            ValueError: where ``text`` is no JSON object of exactly that field, or its value describes no cell.
        """
        return cls(**_fields(text, ("ops",)))

    def to_text(self) -> str:
        """Returns the notation of the benchmark, ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``: a group a node."""
        groups: list[str] = [""] * (self.nodes - 1)
        for (i, j), op in zip(self.edges, self.ops, strict=True):
            groups[i - 1] += f"|{op}~{j}"
        return "+".join(f"{group}|" for group in groups)

    @classmethod
    def from_text(cls, text: str) -> NASBench201Genotype:
        """Returns the genotype in the benchmark's notation; the order of a node's inputs does not matter.

        Raises:
            ValueError: where ``text`` is not in that notation, or a node lacks an input or has it twice.
        """
        ops: list[str] = []
        for i, group in enumerate(text.strip().split("+"), start=1):
            terms = [term.rpartition("~") for term in group.strip().strip("|").split("|")]
            if not group.strip().startswith("|") or not all(op and j.isdecimal() for op, _, j in terms):
                raise ValueError(f"genotype: expected |op~0|+|op~0|op~1|+..., got {_short(text)}")
            inputs = {int(j): op for op, _, j in terms}
            if sorted(inputs) != list(range(i)) or len(terms) != i:
                raise ValueError(
                    f"genotype: node {i} must have each input from 0 to {i - 1} once, got {_short(group.strip())}"
                )
            ops += [inputs[j] for j in range(i)]
        return cls(tuple(ops))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the genotype: the benchmark's notation where ``path`` ends in ``.txt``, else JSON."""
        _save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NASBench201Genotype:
        """Returns the genotype in a file, in JSON or in the benchmark's notation.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it holds no genotype; the message names the file.
        """
        return _load(Path(path), cls.from_json, cls.from_text)


@dataclass(frozen=True)
class OneShotGenotype:
    """A cell of NAS-Bench-101 (arXiv:1902.09635), as the spaces of NAS-Bench-1Shot1 (arXiv:2001.10422) choose them.

    Node 0 is the cell's input, nodes 1, 2, ... apply an operation to the sum of what they read, and the last node is
    the output. A genotype is checked when it is made, so it always describes an architecture.

    Attributes:
        ops: The operations of the nodes 1, 2, ...
        inputs: The nodes that each of them reads and, last, those that the output reads, in ascending order.

    Raises:
        ValueError: where the two do not describe such a cell; the message names the field.
    """

    ops: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ops, inputs = self.ops, self.inputs
        if isinstance(ops, str) or not isinstance(ops, Sequence):
            raise ValueError(f"genotype: ops must be a list of operations, one a node, got {_short(ops)}")
        for n, op in enumerate(ops):
            if not isinstance(op, str) or not op.strip() or any(mark in op for mark in "|+()") or op in _ENDS:
                raise ValueError(f"genotype: ops[{n}] must be the name of an operation, got {_short(op)}")
        if isinstance(inputs, str) or not isinstance(inputs, Sequence) or len(inputs) != len(ops) + 1:
            raise ValueError(
                f"genotype: inputs must be {len(ops) + 1} lists of nodes, one for each op and one for the output, got "
                f"{_short(inputs)}"
            )
        read = []
        for n, nodes in enumerate(inputs):
            if isinstance(nodes, str) or not isinstance(nodes, Sequence):
                raise ValueError(f"genotype: inputs[{n}] must be a list of nodes, got {_short(nodes)}")
            indices = [_index(f"inputs[{n}][{e}]", node) for e, node in enumerate(nodes)]
            if not indices or len(set(indices)) != len(indices) or not all(0 <= i <= n for i in indices):
                raise ValueError(
                    f"genotype: inputs[{n}] must hold one or more different nodes from 0 to {n}, got {_short(nodes)}"
                )
            read.append(tuple(sorted(indices)))
        object.__setattr__(self, "ops", tuple(str(op) for op in ops))
        object.__setattr__(self, "inputs", tuple(read))

    def validate(self, primitives: Iterable[str] | None = None) -> OneShotGenotype:
        """Returns the genotype itself.

        Args:
            primitives: the operations that may occur; any, where None.

        Raises:
            ValueError: for another operation; the message names the node.
        """
        _check_ops(self.ops, primitives)
        return self

    def pruned(self) -> OneShotGenotype:
        """Returns the architecture without the nodes that the output does not depend on."""
        output = len(self.ops) + 1
        needed = {output}
        for node in range(output, 0, -1):
            if node in needed:
                needed.update(self.inputs[node - 1])
        kept = [0, *(node for node in range(1, output) if node in needed), output]
        return self._renumbered(kept)

    def canonical(self) -> OneShotGenotype:
        """Returns one and the same genotype for all that are the same labelled graph, once :meth:`pruned`."""
        pruned = self.pruned()
        nodes = range(1, len(pruned.ops) + 1)
        best: OneShotGenotype | None = None
        for order in itertools.permutations(nodes):
            place = {0: 0} | {node: n for n, node in enumerate(order, start=1)}
            if any(place[j] > place[node] for node in nodes for j in pruned.inputs[node - 1]):
                continue  # a node would come before one that it reads
            candidate = pruned._renumbered([0, *order, len(nodes) + 1])
            if best is None or (candidate.ops, candidate.inputs) < (best.ops, best.inputs):
                best = candidate
        assert best is not None  # the identity is among the permutations
        return best

    def _renumbered(self, kept: Sequence[int]) -> OneShotGenotype:
        """Returns the cell of these nodes, all that they read among them, in this order."""
        place = {node: n for n, node in enumerate(kept)}
        return OneShotGenotype(
            tuple(self.ops[node - 1] for node in kept[1:-1]),
            tuple(tuple(place[j] for j in self.inputs[node - 1]) for node in kept[1:]),
        )

    def to_table(self, nodes: int = 7) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        """Returns labels and adjacency matrix as NAS-Bench-101 has them: entry (j, i) is 1 where node i reads node j.

        Args:
            nodes: as many as the tables have, input and output included: what is missing are 1x1 convolutions before
                the output that nothing reads and that read nothing.

        Raises:
            ValueError: where the cell has more nodes.
        """
        unused = nodes - len(self.ops) - 2
        if unused < 0:
            raise ValueError(f"nodes={nodes}: the cell has {len(self.ops) + 2}, input and output included")
        labels = (_ENDS[0], *self.ops, *["conv1x1-bn-relu"] * unused, _ENDS[1])
        columns = [(), *self.inputs[:-1], *[()] * unused, self.inputs[-1]]
        return labels, tuple(tuple(int(j in column) for column in columns) for j in range(nodes))

    @classmethod
    def from_table(cls, labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> OneShotGenotype:
        """Returns the cell of labels and an adjacency matrix; nodes without edges are left out.

        Raises:
            ValueError: where the matrix is not square and upper triangular, or the first and last label are not
                ``input`` and ``output``, or a node is read that reads nothing.
        """
        n = len(labels)
        if n < 2 or (labels[0], labels[-1]) != _ENDS:
            raise ValueError(f"genotype: labels must begin with input and end with output, got {_short(list(labels))}")
        if len(matrix) != n or any(len(row) != n for row in matrix):
            raise ValueError(f"genotype: the adjacency matrix must be {n} x {n}, one row and column a label")
        if any(int(matrix[j][i]) not in ((0, 1) if j < i else (0,)) for j in range(n) for i in range(n)):
            raise ValueError("genotype: the adjacency matrix must hold 0 and 1 above its diagonal, and 0 elsewhere")
        read = {i: [j for j in range(i) if matrix[j][i]] for i in range(n)}
        used = [i for i in range(1, n - 1) if read[i] or any(i in nodes for nodes in read.values())]
        place = {node: k for k, node in enumerate([0, *used])}
        return cls(tuple(labels[i] for i in used), tuple(tuple(place[j] for j in read[i]) for i in [*used, n - 1]))

    def to_json(self) -> str:
        """Returns a JSON object of the fields ``ops`` and ``inputs``."""
        return json.dumps({"ops": list(self.ops), "inputs": [list(nodes) for nodes in self.inputs]}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> OneShotGenotype:
        """Returns the genotype that :meth:`to_json` wrote.

        Raises:
            ValueError: where ``text`` is no JSON object of exactly these fields, or they describe no cell.
        """
        return cls(**_fields(text, ("ops", "inputs")))

    def to_text(self) -> str:
        """Returns ``op(0)+op(0,1)+output(1,2)``: the operation of each node with the nodes that it reads."""
        names = (*self.ops, _ENDS[1])
        return "+".join(f"{op}({','.join(map(str, nodes))})" for op, nodes in zip(names, self.inputs, strict=True))

    @classmethod
    def from_text(cls, text: str) -> OneShotGenotype:
        """Returns the genotype that :meth:`to_text` wrote.

        Raises:
            ValueError: where ``text`` is not in that notation, or describes no cell.
        """
        terms = [re.fullmatch(r"\s*([^()|+]+)\(([\d,\s]*)\)\s*", term) for term in text.split("+")]
        found = [(term[1].strip(), term[2]) for term in terms if term]
        if len(found) < len(terms) or found[-1][0] != _ENDS[1]:
            raise ValueError(f"genotype: expected op(0)+op(0,1)+...+output(1,2), got {_short(text)}")
        inputs = [tuple(int(j) for j in nodes.split(",") if j.strip()) for _, nodes in found]
        return cls(tuple(op for op, _ in found[:-1]), tuple(inputs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the genotype: the notation of :meth:`to_text` where ``path`` ends in ``.txt``, else JSON."""
        _save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OneShotGenotype:
        """Returns the genotype in a file, in JSON or in the notation of :meth:`to_text`.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it holds no genotype; the message names the file.
        """
        return _load(Path(path), cls.from_json, cls.from_text)


@dataclass(frozen=True)
class ChainGenotype:
    """A network that is one block after another, each of its own choice: no cell is repeated.

    A genotype is checked when it is made, so it always describes an architecture.

    Attributes:
        ops: The blocks, from the one that reads the stem to the last.

    Raises:
        ValueError: where there is none, or one is no name.
    """

    ops: tuple[str, ...]

    def __post_init__(self) -> None:
        ops = self.ops
        if isinstance(ops, str) or not isinstance(ops, Sequence) or not ops:
            raise ValueError(f"genotype: ops must be a list of operations, one a layer, got {_short(ops)}")
        for layer, op in enumerate(ops):
            if not isinstance(op, str) or not re.fullmatch(r"[^\s>(){}|]+", op):
                raise ValueError(f"genotype: ops[{layer}] must be the name of an operation, got {_short(op)}")
        object.__setattr__(self, "ops", tuple(str(op) for op in ops))

    def validate(self, primitives: Iterable[str] | None = None) -> ChainGenotype:
        """Returns the genotype itself.

        Args:
            primitives: the operations that may occur; any, where None.

        Raises:
            ValueError: for another operation; the message names the layer.
        """
        _check_ops(self.ops, primitives)
        return self

    def to_json(self) -> str:
        """Returns a JSON object with the one field ``chain``."""
        return json.dumps({"chain": list(self.ops)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChainGenotype:
        """Returns the genotype that :meth:`to_json` wrote.

        Raises:
            ValueError: where ``text`` is no JSON object of exactly that field, or its value describes no chain.
        """
        return cls(_fields(text, ("chain",))["chain"])

    def to_text(self) -> str:
        """Returns ``op>op>op``; of the blocks of NAS-Bench-Macro the benchmark's notation, ``22212202``: a digit each.

        A single block of another kind is followed by ``>``.
        """
        if set(self.ops) <= set(_MACRO):
            return "".join(str(_MACRO.index(op)) for op in self.ops)
        return ">".join(self.ops) + ">" * (len(self.ops) == 1)

    @classmethod
    def from_text(cls, text: str) -> ChainGenotype:
        """Returns the genotype that :meth:`to_text` wrote.

        Raises:
            ValueError: where ``text`` is not in that notation.
        """
        text = text.strip()
        if re.fullmatch("[012]+", text):
            return cls(tuple(_MACRO[int(digit)] for digit in text))
        if ">" not in text:
            raise ValueError(f"genotype: expected op>op>... or digits from 0 to 2, got {_short(text)}")
        return cls(tuple(op.strip() for op in text.removesuffix(">").split(">")))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the genotype: the notation of :meth:`to_text` where ``path`` ends in ``.txt``, else JSON."""
        _save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChainGenotype:
        """Returns the genotype in a file, in JSON or in the notation of :meth:`to_text`.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it holds no genotype; the message names the file.
        """
        return _load(Path(path), cls.from_json, cls.from_text)


AnyGenotype = Genotype | NASBench201Genotype | OneShotGenotype | ChainGenotype
"""An architecture of any space."""


def parse_genotype(text: str) -> AnyGenotype:
    """Returns the genotype in ``text``, in any notation that one of the classes writes; nothing in it is executed.

    Raises:
        ValueError: where it is in none of them, or describes no architecture.
    """
    start = text.lstrip()
    if start.startswith("{"):
        if '"chain"' in text:
            return ChainGenotype.from_json(text)
        if '"inputs"' in text:
            return OneShotGenotype.from_json(text)
        return NASBench201Genotype.from_json(text) if '"ops"' in text else Genotype.from_json(text)
    if start.startswith("|"):
        return NASBench201Genotype.from_text(text)
    if "output(" in text and "Genotype(" not in text:
        return OneShotGenotype.from_text(text)
    if re.fullmatch(r"[012]+\s*", start) or (">" in text and "Genotype(" not in text):
        return ChainGenotype.from_text(text)
    return Genotype.from_text(text)


def load_genotype(path: str | os.PathLike[str]) -> AnyGenotype:
    """Returns the genotype in a file, in any notation.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it holds no genotype; the message names the file.
    """
    return _load(Path(path), parse_genotype, parse_genotype)


_G = TypeVar("_G")


def _save(genotype: AnyGenotype, path: Path) -> None:
    text = genotype.to_text() + "\n" if path.suffix == ".txt" else genotype.to_json()
    write_text(path, text)


def _load(path: Path, from_json: Callable[[str], _G], from_text: Callable[[str], _G]) -> _G:
    try:
        text = path.read_text(encoding="utf-8")
        return from_json(text) if text.lstrip().startswith("{") else from_text(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fields(text: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the fields of a JSON object that has exactly these."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"genotype: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"genotype: expected a JSON object with {', '.join(names)}, got {_short(fields)}")
    _check_names(fields, names)
    return fields


def _check_names(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in fields]
    unknown = [name for name in fields if name not in names]
    if missing or unknown:
        problems = [f"{name} is missing" for name in missing] + [f"{name!r} is unknown" for name in unknown]
        raise ValueError(f"genotype: {', '.join(problems)}: expected the fields {', '.join(names)}")


def _check_ops(ops: Sequence[str], primitives: Iterable[str] | None) -> None:
    allowed = None if primitives is None else tuple(primitives)
    for n, op in enumerate(ops):
        if allowed is not None and op not in allowed:
            raise ValueError(f"genotype: ops[{n}] is the unknown op {op!r}: expected one of {', '.join(allowed)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _key(genotype: tuple[Any, ...]) -> tuple[Any, ...]:
    normal, normal_concat, reduce, reduce_concat = genotype
    return (
        tuple((op, int(i)) for op, i in normal),
        tuple(int(i) for i in normal_concat),
        tuple((op, int(i)) for op, i in reduce),
        tuple(int(i) for i in reduce_concat),
    )


def _index(where: str, value: object) -> int:
    # numpy's integers are indices too; bool is an int in Python, but no state
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"genotype: {where} must be an integer, got {_short(value)}")
    return value.__index__()  # type: ignore[no-any-return]


def _edges(name: str, edges: object, allowed: tuple[str, ...] | None) -> list[tuple[str, int]]:
    if not isinstance(edges, (list, tuple)) or not edges or len(edges) % 2:
        raise ValueError(f"genotype: {name} must be a list of (op, input) pairs, two a node, got {_short(edges)}")
    out = []
    for n, edge in enumerate(edges):
        if not isinstance(edge, (list, tuple)) or len(edge) != 2 or not isinstance(edge[0], str):
            raise ValueError(f"genotype: {name}[{n}] must be a pair (op, input), got {_short(edge)}")
        op, i = str(edge[0]), _index(f"the input of {name}[{n}]", edge[1])
        if allowed is not None and op not in allowed:
            raise ValueError(f"genotype: {name}[{n}] has the unknown op {op!r}: expected one of {', '.join(allowed)}")
        if not 0 <= i < n // 2 + 2:
            raise ValueError(
                f"genotype: {name}[{n}] has input {i}, but node {n // 2} can read states 0 to {n // 2 + 1} only"
            )
        out.append((op, i))
    return out


def _concat(name: str, concat: object, nodes: int) -> list[int] | range:
    if not isinstance(concat, (list, tuple, range)) or not concat:
        raise ValueError(f"genotype: {name} must be a list or a range of states, got {_short(concat)}")
    states = [_index(f"{name}[{n}]", value) for n, value in enumerate(concat)]
    if len(set(states)) != len(states) or not all(2 <= i < nodes + 2 for i in states):
        raise ValueError(f"genotype: {name} must hold different states from 2 to {nodes + 1}, got {_short(states)}")
    contiguous = range(states[0], states[0] + len(states))
    return contiguous if states == list(contiguous) else states


def _literal(name: str, node: ast.expr) -> Any:
    """Returns the value of a literal, of ``range(...)`` or of ``list(range(...))``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in ("list", "tuple") and len(node.args) == 1:
            return _literal(name, node.args[0])
        if node.func.id == "range":
            bounds = [_literal(name, argument) for argument in node.args]
            if 1 <= len(bounds) <= 3 and all(type(b) is int and abs(b) <= _MAX_NODES for b in bounds):
                try:
                    return range(*bounds)
                except ValueError:
                    pass  # a step of 0
            raise ValueError(f"genotype: {name} has a range that is no list of states: {ast.unparse(node)[:80]}")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"genotype: {name} must be a literal list, got {ast.unparse(node)[:80]}") from None
