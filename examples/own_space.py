"""A search space of one's own: own operations, cell, stem and head, for images of one channel, searched by fastnas.

docs/own_space.md walks through this file.

    python examples/own_space.py
    python examples/own_space.py --epochs 10 --out runs/strokes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnas.genotype import AnyGenotype, NASBench201Genotype
from fastnas.nn import OPS, MixedOp, primitive
from fastnas.nn.operations import ReLUConvBN
from fastnas.report import write_page
from fastnas.search import Search, SearchConfig, SearchResult
from fastnas.search.run import RunFolder
from fastnas.spaces import register

Between = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


# 1. Operations. Each is made by a function of the channels, the stride, and whether its batch norm learns a scale.


@primitive("conv_3x3")
def conv_3x3(C: int, stride: int, affine: bool) -> nn.Module:
    """Returns a dense convolution; its parts are what the fused op has a kernel for."""
    return ReLUConvBN(C, C, 3, stride, 1, affine)


@primitive("strip_conv_5")
def strip_conv_5(C: int, stride: int, affine: bool) -> nn.Module:
    """Returns a convolution along the rows and one along the columns, as strokes are long and thin."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 5), (1, stride), (0, 2), bias=False),
        nn.Conv2d(C, C, (5, 1), (stride, 1), (2, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),  # the last part: the fused op takes it into its sum
    )


class Gate(nn.Module):
    """Every channel times a factor between 0 and 1, which follows from the means of all channels."""

    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self.factors = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid())
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C, H / stride, W / stride) from (N, C, H, W)."""
        y: Tensor = self.pool(x * self.factors(x))
        return y


@primitive("gate")
def gate(C: int, stride: int, affine: bool) -> nn.Module:
    """Returns a gate and a batch norm."""
    return nn.Sequential(Gate(C, stride), nn.BatchNorm2d(C, affine=affine))


# 2. The networks. Supernet and final network are one skeleton; they differ in what an edge is and how it is called.


@dataclass(frozen=True)
class Mix:
    """How a mixed edge is called: the arguments of the supernet's forward, for the one type of cell."""

    weights: Tensor  # (E, O)
    edge_weights: Tensor | None  # (E,)
    path: Sequence[int] | None  # E candidates

    def __call__(self, e: int, edge: nn.Module, x: Tensor) -> Tensor:
        """Returns what edge e makes of x."""
        y: Tensor = edge(x, self.weights[e]) if self.path is None else edge(x, self.weights[e], self.path[e])
        return y if self.edge_weights is None else self.edge_weights[e] * y


class Cell(nn.Module):
    """Nodes that each add up one edge from every node before, and a way around them.

    Args:
        edges: the modules of the edges (1, 0), (2, 0), (2, 1), (3, 0), ...
    """

    def __init__(self, edges: Sequence[nn.Module]) -> None:
        super().__init__()
        self.edges = nn.ModuleList(edges)

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        """Returns x + the last node, (N, C, H, W) as x."""
        states, e = [x], 0
        while e < len(self.edges):
            ends = []
            for state in states:
                edge = self.edges[e]
                ends.append(edge(state) if mix is None else mix(e, edge, state))
                e += 1
            states.append(torch.stack(ends).sum(0))
        return x + states[-1]


class Skeleton(nn.Module):
    """A stem, two stages of cells with half the size and twice the channels in the second, and a head.

    Args:
        edges: makes the modules of a cell's edges from its channels.
        channels: of the first stage.
        layers: cells, at least 2.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        edges: Callable[[int], Sequence[nn.Module]],
        channels: int,
        layers: int,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"layers={layers} must be at least 2: one cell for each size")
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 5, padding=2, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        C = channels
        for layer in range(layers):
            if layer == layers // 2:
                C *= 2
                halve = (nn.MaxPool2d(2), nn.Conv2d(C // 2, C, 1, bias=False), nn.BatchNorm2d(C))
                self.cells.append(nn.Sequential(*halve))
            self.cells.append(Cell(edges(C)))
        self.norm = nn.BatchNorm2d(C)
        self.classifier = nn.Linear(2 * C, num_classes)

    def logits(self, x: Tensor, mix: Mix | None = None, between: Between | None = None) -> Tensor:
        """Returns (N, num_classes) from (N, in_channels, H, W)."""
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, mix) if isinstance(cell, Cell) else cell(x)
            x = x if between is None else between((x,))[0]
        x = self.norm(x).relu()
        y: Tensor = self.classifier(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        return y


class Supernet(Skeleton):
    """The skeleton with mixed edges."""

    def forward(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        edge_weights: Mapping[str, Tensor] | None = None,
        *,
        path: Mapping[str, Sequence[int]] | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """Returns the logits; the mappings have what Mix has as "cell"."""
        factors = None if edge_weights is None else edge_weights["cell"]
        choices = None if path is None else path["cell"]
        return self.logits(x, Mix(weights["cell"], factors, choices), between)

    def mixed_ops(self) -> Iterator[tuple[str, int, MixedOp]]:
        """Yields cell type, edge and module, for methods that change candidates in the course of a search."""
        for cell in self.cells:
            if isinstance(cell, Cell):
                yield from (("cell", e, edge) for e, edge in enumerate(cell.edges) if isinstance(edge, MixedOp))


class Network(Skeleton):
    """The skeleton with one operation an edge."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return self.logits(x)


# 3. The space: what fastnas.spaces.Space lists.


@dataclass(frozen=True)
class StrokeSpace:
    """One cell, repeated. Every edge has one operation, and every node reads something: not all its edges are none.

    An architecture is written as a cell of NAS-Bench-201, which also has one operation an edge.
    """

    name: str = "strokes"
    primitives: tuple[str, ...] = ("none", "skip_connect", "conv_3x3", "strip_conv_5", "gate")
    nodes: int = 4

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The one key of alphas, weights and scores."""
        return ("cell",)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges (i, j), from node j to node i: the rows of alphas."""
        return tuple((i, j) for i in range(1, self.nodes) for j in range(i))

    def init_alphas(
        self,
        generator: torch.Generator | None = None,
        scale: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Returns normal alphas, (E, O), drawn where the generator is, so that a seed means the same everywhere."""
        drawn_on = "cpu" if generator is None else generator.device
        alphas = scale * torch.randn(len(self.edges), len(self.primitives), generator=generator, device=drawn_on)
        return {"cell": alphas.to(drawn_on if device is None else device).requires_grad_()}

    def supernet(
        self, channels: int = 16, layers: int = 4, num_classes: int = 10, in_channels: int = 1, k: int = 1
    ) -> Supernet:
        """Returns the network that a search trains."""

        def edges(C: int) -> list[nn.Module]:
            return [MixedOp(C, 1, k=k, primitives=self.primitives) for _ in self.edges]

        return Supernet(edges, channels, layers, num_classes, in_channels)

    def derive(self, scores: Mapping[str, Tensor]) -> NASBench201Genotype:
        """Returns the best operation of every edge; a node that would read nothing gets its best other one.

        Raises:
            ValueError: for a table of another shape, or with NaN.
        """
        table = scores["cell"].detach().cpu()
        if table.shape != (len(self.edges), len(self.primitives)) or table.isnan().any():
            raise ValueError(f"scores['cell'] must be numbers, edges x primitives, got {table}")
        best = [max(range(len(row)), key=row.__getitem__) for row in table.tolist()]
        none = self.primitives.index("none")
        for node in range(1, self.nodes):
            rows = [e for e, (i, _) in enumerate(self.edges) if i == node]
            if all(best[e] == none for e in rows):
                others = [(e, o) for e in rows for o in range(len(self.primitives)) if o != none]
                e, o = max(others, key=lambda place: float(table[place]))
                best[e] = o
        return NASBench201Genotype(tuple(self.primitives[o] for o in best))

    def encode(self, genotype: AnyGenotype) -> dict[str, Tensor]:
        """Returns the table of which derive makes the architecture: 1 for what it has, 0 elsewhere."""
        table = torch.zeros(len(self.edges), len(self.primitives))
        for row, op in zip(table, self._checked(genotype).ops, strict=True):
            row[self.primitives.index(op)] = 1
        return {"cell": table}

    def network(
        self,
        genotype: AnyGenotype,
        channels: int = 16,
        layers: int = 4,
        num_classes: int = 10,
        in_channels: int = 1,
    ) -> Network:
        """Returns the network of an architecture, to be trained from scratch."""
        ops = self._checked(genotype).ops
        return Network(lambda C: [OPS[op](C, 1, True) for op in ops], channels, layers, num_classes, in_channels)

    def sample(self, generator: torch.Generator | None = None) -> NASBench201Genotype:
        """Returns a random architecture; all are equally likely: one with a node that reads nothing is drawn anew."""
        while True:
            drawn = torch.randint(len(self.primitives), (len(self.edges),), generator=generator).tolist()
            genotype = NASBench201Genotype(tuple(self.primitives[o] for o in drawn))
            read = {i for (i, _), op in zip(self.edges, genotype.ops, strict=True) if op != "none"}
            if len(read) == self.nodes - 1:
                return genotype

    def _checked(self, genotype: AnyGenotype) -> NASBench201Genotype:
        if not isinstance(genotype, NASBench201Genotype) or len(genotype.ops) != len(self.edges):
            raise ValueError(f"genotype is none of the space {self.name!r}: got {genotype!r}")
        return genotype.validate(self.primitives)


STROKES = register(StrokeSpace())


# 4. The search, on handwritten digits of 8x8 pixels and one channel. `space` is all that fastnas has to be told.


def main(epochs: int, out: Path | None) -> SearchResult:
    """Returns what the search came to."""
    config = SearchConfig(space="strokes", data="digits", channels=8, layers=4, epochs=epochs)
    search = Search(config)
    if out is None:
        result = search.run()
    else:
        with RunFolder(out) as folder:
            folder.start(config)
            result = search.run(on_epoch=folder.record)
            folder.finish(search)
        print(write_page(out))
    for record in result.history:
        print(f"epoch {record.epoch}: loss {record.train_loss:.3f}, validation accuracy {record.valid_accuracy:.1%}")
    network = STROKES.network(result.genotype, channels=8)
    print(f"{result.genotype.to_text()}\n{sum(p.numel() for p in network.parameters()):,} parameters")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for the run, with pictures and a page")
    options = parser.parse_args()
    main(options.epochs, options.out)
