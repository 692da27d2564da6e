"""The cells, the supernet and the final network of NAS-Bench-201 (arXiv:2001.00326, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastnas.genotype import NASBench201Genotype
from fastnas.nn._common import Between, check_primitives, check_sizes
from fastnas.nn.checkpointing import run_cell
from fastnas.nn.folded_cell import FoldedCell
from fastnas.nn.fused_cell import FusedCell
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import OPS, ReLUConvBN

NASBENCH201_PRIMITIVES: tuple[str, ...] = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The five candidates of NAS-Bench-201, in the published order (the columns of ``alphas``)."""

_Rows = TypeVar("_Rows", Tensor, Sequence[int])


class NASBench201Cell(nn.Module):
    """A cell of densely connected nodes, whose every edge is a MixedOp of stride 1.

    Node 0 is the input; node i = Σ_j MixedOp_(i, j)(node j) over all j < i; the last node is the output. Edges are
    ordered by (node, input). The average pool has no batch norm here, unlike that of DARTS.

    Args:
        C: channels of every node.
        nodes: number of nodes, the input included.
        primitives: the candidates of an edge.
        k: partial channels: the candidates see 1/k of the channels.

    Raises:
        ValueError: where there is no edge, a primitive is not known, or k does not divide the channels.
    """

    def __init__(
        self, C: int, nodes: int = 4, *, primitives: Sequence[str] = NASBENCH201_PRIMITIVES, k: int = 1
    ) -> None:
        super().__init__()
        if nodes < 2:
            raise ValueError(f"nodes={nodes} must be at least 2: the input and the output")
        check_primitives(primitives)
        self._ops = nn.ModuleList(
            MixedOp(C, primitives=primitives, k=k, pool_norm=False) for i in range(1, nodes) for _ in range(i)
        )
        self._fused = FusedCell([(j, i) for i in range(1, nodes) for j in range(i)], 1, 1)

    def forward(
        self,
        x: Tensor,
        weights: Tensor | Sequence[Tensor],
        edge_weights: Tensor | Sequence[Tensor] | None = None,
        path: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns the last node, shaped as ``x``.

        Args:
            x: (N, C, H, W).
            weights: (E, O), or E rows of O.
            edge_weights: E factors of the edges' outputs (PC-DARTS' edge normalisation); all 1 where None.
            path: E indices of candidates: of each edge only that one is computed, times its weight.

        Raises:
            TypeError, ValueError: where the path does not fit the edges.
        """
        return self._fused.run(self._ops, [x], weights, edge_weights, path)


class ResidualReduction(nn.Module):
    """Halves height and width: two 3x3 convolutions, beside a 2x2 average pool and a 1x1 convolution."""

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, 1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, 1)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / 2, W / 2) from (N, C_in, H, W), H and W even."""
        y: Tensor = self.downsample(x) + self.conv_b(self.conv_a(x))
        return y


class NASBench201InferCell(nn.Module):
    """A cell of one operation an edge; ``none`` is not computed, and ``skip_connect`` costs nothing.

    Operations are named ``layers.<edge>`` as in the published code, so its checkpoints load with ``strict=True``.

    Args:
        genotype: the operations.
        C: channels of every node.

    Raises:
        ValueError: where an operation is not known.
    """

    _folded: FoldedCell | None = None  # of cells that were pickled whole before there was one

    def __init__(self, genotype: NASBench201Genotype, C: int) -> None:
        super().__init__()
        genotype.validate(OPS)
        self.genotype = genotype
        self.layers = nn.ModuleList(OPS[op](C, 1, True) for op in genotype.ops)
        self._kept = [e for e, op in enumerate(genotype.ops) if op != "none"]
        wiring = [(j, i, 1) for i, j in (genotype.edges[e] for e in self._kept)]
        self._folded = FoldedCell(wiring, 1, [genotype.nodes - 1])

    def forward(self, x: Tensor) -> Tensor:
        """Returns the last node, shaped as ``x``."""
        if self._folded is not None and not self.training:
            folded = self._folded.run([self.layers[e] for e in self._kept], [x])
            if folded is not None:
                return folded
        states: list[Tensor | None] = [x, *[None] * (self.genotype.nodes - 1)]
        for (i, j), op, layer in zip(self.genotype.edges, self.genotype.ops, self.layers, strict=True):
            if op == "none":
                continue
            # a node without inputs is zero, and what leaves it is computed: after training, a norm's bias is not zero
            source = states[j]
            y = layer(torch.zeros_like(x) if source is None else source)
            node = states[i]
            states[i] = y if node is None else node + y
        output = states[-1]
        return torch.zeros_like(x) if output is None else output


class _Skeleton(nn.Module):
    """Stem, three stages of cells, batch norm, ReLU, global average pooling and a linear classifier."""

    def __init__(
        self, channels: int, cells: int, num_classes: int, in_channels: int, cell: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, cells=cells, num_classes=num_classes, in_channels=in_channels)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        for stage in range(3):
            C = channels * 2**stage
            if stage:
                self.cells.append(ResidualReduction(C // 2, C))
            self.cells.extend(cell(C) for _ in range(cells))
        self.lastact = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C, num_classes)

    def _logits(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], between: Between | None) -> Tensor:
        """Returns the logits; ``run`` is given each of ``cells`` and what it reads."""
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(
                f"x has height {x.shape[2]} and width {x.shape[3]}, both must be multiples of 4: pad or resize images"
            )
        x = self.stem(x)
        for cell in self.cells:
            x = run(cell, x)
            x = x if between is None else between((x,))[0]
        logits: Tensor = self.classifier(self.global_pooling(self.lastact(x)).flatten(1))
        return logits


class NASBench201Network(_Skeleton):
    """The network that a genotype stands for, with affine batch norms: the one that the benchmark trained.

    Its sizes, its modules' names and their number are those of the published network, so its parameters are as many as
    the benchmark says.

    Args:
        genotype: the cell.
        channels: channels of the stem and of the first stage.
        cells: cells of a stage (N in the paper).
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: where a size is below 1, or an operation is not known.
    """

    def __init__(
        self,
        genotype: NASBench201Genotype,
        channels: int = 16,
        cells: int = 5,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__(channels, cells, num_classes, in_channels, lambda C: NASBench201InferCell(genotype, C))
        self.genotype = genotype

    def forward(self, x: Tensor, *, between: Between | None = None) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images; H and W are multiples of 4.
            between: as that of :class:`NASBench201Supernet`.

        Raises:
            ValueError: where the images cannot be halved twice.
        """
        return self._logits(x, lambda cell, state: cell(state), between)


class NASBench201Supernet(_Skeleton):
    """Stem, three stages of search cells, batch norm, ReLU, global average pooling and a linear classifier.

    The stages have ``channels``, twice and four times as many channels; between them a residual block halves height and
    width. All cells share one table of weights, which is no part of the module: ``forward`` is given it.

    Args:
        channels: channels of the stem and of the first stage.
        cells: cells of a stage (N in the paper).
        num_classes: number of logits.
        in_channels: channels of the images.
        nodes: nodes of a cell, its input included.
        primitives: the candidates of an edge.
        k: partial channels: the candidates see 1/k of the channels (PC-DARTS, arXiv:1907.05737); 1 is all of them.
        checkpoint_cells: keep for the backward only what cells read, and run each once more there: less memory, more
            time. May be set at any time.

    Raises:
        ValueError: where a size is below 1, a primitive is not known, or k does not divide the channels.
    """

    checkpoint_cells: bool = False  # of networks that were pickled whole before there was such a choice

    def __init__(
        self,
        channels: int = 16,
        cells: int = 5,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        nodes: int = 4,
        primitives: Sequence[str] = NASBENCH201_PRIMITIVES,
        k: int = 1,
        checkpoint_cells: bool = False,
    ) -> None:
        super().__init__(
            *(channels, cells, num_classes, in_channels),
            lambda C: NASBench201Cell(C, nodes, primitives=primitives, k=k),
        )
        self._edges = nodes * (nodes - 1) // 2
        self.checkpoint_cells = checkpoint_cells

    def forward(
        self,
        x: Tensor,
        weights: Tensor | Mapping[str, Tensor],
        edge_weights: Tensor | Mapping[str, Tensor] | None = None,
        *,
        path: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images; H and W are multiples of 4.
            weights: what a relaxation makes of the alphas, (E, O), or a mapping with that table as ``"cell"``.
            edge_weights: factors of the edges' outputs, (E,), or a mapping with them as ``"cell"``; all 1 where None.
            path: indices of candidates, or a mapping with them as ``"cell"``: of each edge only that one is computed,
                times its weight, the only one that gets a gradient. All are computed where None.
            between: called after every cell and every residual block with ``(x,)``, what the next one reads; returns
                what it reads instead.

        Raises:
            TypeError, ValueError: where the weights do not have one row an edge, the path names no candidate of an
                edge, or the images cannot be halved twice.
        """
        table = self._of_cells("weights", weights)
        factors = None if edge_weights is None else self._of_cells("edge_weights", edge_weights)
        choices = None if path is None else self._of_cells("path", path)

        def run(cell: nn.Module, state: Tensor) -> Tensor:
            if isinstance(cell, NASBench201Cell):
                return run_cell(cell, state, table, factors, choices, again=self.checkpoint_cells)
            y: Tensor = cell(state)
            return y

        return self._logits(x, run, between)

    def mixed_ops(self) -> Iterator[tuple[str, int, MixedOp]]:
        """Yields the cell type ``"cell"``, the edge and its module, cell by cell."""
        for cell in self.cells:
            if isinstance(cell, NASBench201Cell):
                for edge, op in enumerate(cell._ops):
                    assert isinstance(op, MixedOp)
                    yield "cell", edge, op

    def _of_cells(self, name: str, value: _Rows | Mapping[str, _Rows]) -> _Rows:
        """Returns what an argument says of the cells, one row an edge."""
        if isinstance(value, Mapping):
            if "cell" not in value:
                raise ValueError(f"{name} has no 'cell', only {', '.join(map(repr, value)) or 'nothing'}")
            value = value["cell"]
        if len(value) != self._edges:
            raise ValueError(f"{name} must have one row for each of {self._edges} edges, got {len(value)} rows")
        return value
