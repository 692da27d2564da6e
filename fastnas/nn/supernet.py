"""The supernet of DARTS: a stack of search cells (arXiv:1806.09055, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized

from torch import Tensor, nn

from fastnas.nn._common import Between, check_sizes
from fastnas.nn.cells import Cell
from fastnas.nn.checkpointing import run_cell
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import PRIMITIVES
from fastnas.nn.stems import Stem, check_stem, cifar_stem, imagenet_stems


class Supernet(nn.Module):
    """Stem, ``layers`` search cells, global average pooling and a linear classifier.

    Cells ``layers // 3`` and ``2 * layers // 3`` are reductions: they halve height and width and double the channels.
    Architecture parameters are no part of the module: ``forward`` is given the weights of the candidates.

    Args:
        channels: channels of the first cells' states.
        layers: number of cells.
        num_classes: number of logits.
        in_channels: channels of the images.
        primitives: the candidates of an edge.
        steps: nodes of a cell.
        multiplier: nodes that are concatenated to a cell's output.
        stem_multiplier: the stem of ``cifar`` has ``stem_multiplier * channels`` channels.
        k: partial channels: the candidates see 1/k of the channels (PC-DARTS, arXiv:1907.05737); 1 is all of them.
        stem: ``cifar``, one convolution at full size; or ``imagenet``, three of stride 2, after which the first cell
            reads ``channels`` channels at a quarter and at an eighth of the size.
        checkpoint_cells: keep for the backward only what cells read, and run each once more there: less memory, more
            time. May be set at any time.

    Raises:
        ValueError: where a size is below 1, or the stem is unknown or does not fit the channels.
    """

    # of networks that were pickled whole before there was another
    _stem: Stem = "cifar"
    checkpoint_cells: bool = False

    def __init__(
        self,
        channels: int = 16,
        layers: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        primitives: Sequence[str] = PRIMITIVES,
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        k: int = 1,
        stem: Stem = "cifar",
        checkpoint_cells: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, layers=layers, num_classes=num_classes, in_channels=in_channels)
        check_stem(stem, channels)
        if stem == "cifar":
            C_prev_prev = C_prev = stem_multiplier * channels
            self.stem = cifar_stem(in_channels, C_prev)
        else:
            C_prev_prev = C_prev = channels
            self.stem0, self.stem1 = imagenet_stems(in_channels, channels)
        self._stem = stem
        self.checkpoint_cells = checkpoint_cells
        C_curr, reduction_prev = channels, stem == "imagenet"
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                C_curr *= 2
            self.cells.append(
                Cell(
                    steps,
                    multiplier,
                    C_prev_prev,
                    C_prev,
                    C_curr,
                    reduction,
                    reduction_prev,
                    primitives=primitives,
                    k=k,
                )
            )
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, multiplier * C_curr
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)
        self._edges = steps * (steps + 3) // 2

    def forward(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor],
        edge_weights: Mapping[str, Tensor] | None = None,
        *,
        path: Mapping[str, Sequence[int]] | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images; H and W are multiples of 4, with the stem of ``imagenet`` of 32.
            weights: ``"normal"`` and ``"reduce"``: what a relaxation makes of the alphas, (E, O) each.
            edge_weights: the same keys: factors of the edges' outputs, (E,) each; all 1 where None.
            path: the same keys: indices of candidates, E each: of each edge only that one is computed, times its
                weight, the only one that gets a gradient. All are computed where None.
            between: called after every cell with ``(s0, s1)``, what the next cell reads: the outputs of the cell before
                and of this one; returns what it reads instead.

        Raises:
            TypeError, ValueError: where a cell type has no weights, or not one row an edge, or the path names no
                candidate of an edge.
        """
        given: dict[str, Mapping[str, Sized] | None] = {"weights": weights, "edge_weights": edge_weights, "path": path}
        for name, tables in given.items():
            for cell_type in ("normal", "reduce"):
                if tables is not None and (cell_type not in tables or len(tables[cell_type]) != self._edges):
                    got = f"{len(tables[cell_type])} rows" if cell_type in tables else "nothing"
                    raise ValueError(
                        f"{name}[{cell_type!r}] must have one row for each of {self._edges} edges, got {got}"
                    )
        factors = {} if edge_weights is None else edge_weights
        choices = {} if path is None else path
        if self._stem == "cifar":
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        for cell in self.cells:
            cell_type = "reduce" if cell.reduction else "normal"
            args = (s0, s1, weights[cell_type], factors.get(cell_type), choices.get(cell_type))
            s0, s1 = s1, run_cell(cell, *args, again=self.checkpoint_cells)
            if between is not None:
                s0, s1 = between((s0, s1))
        logits: Tensor = self.classifier(self.global_pooling(s1).flatten(1))
        return logits

    def mixed_ops(self) -> Iterator[tuple[str, int, MixedOp]]:
        """Yields the cell type, ``"normal"`` or ``"reduce"``, the edge and its module, cell by cell."""
        for cell in self.cells:
            assert isinstance(cell, Cell)
            for edge, op in enumerate(cell._ops):
                assert isinstance(op, MixedOp)
                yield "reduce" if cell.reduction else "normal", edge, op
