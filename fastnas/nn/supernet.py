"""The supernet of DARTS: a stack of search cells (arXiv:1806.09055, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fastnas.nn.cells import Cell
from fastnas.nn.operations import PRIMITIVES


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
        stem_multiplier: the stem has ``stem_multiplier * channels`` channels.
        k: partial channels: the candidates see 1/k of the channels (PC-DARTS, arXiv:1907.05737); 1 is all of them.
    """

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
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "layers": layers, "num_classes": num_classes, "in_channels": in_channels}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        C_curr = stem_multiplier * channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, C_curr, 3, padding=1, bias=False), nn.BatchNorm2d(C_curr))
        C_prev_prev, C_prev, C_curr = C_curr, C_curr, channels
        self.cells = nn.ModuleList()
        reduction_prev = False
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
        self, x: Tensor, weights: Mapping[str, Tensor], edge_weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Returns the logits, (N, num_classes).

        Args:
            x: (N, in_channels, H, W) images; H and W are multiples of 4.
            weights: ``"normal"`` and ``"reduce"``: what a relaxation makes of the alphas, (E, O) each.
            edge_weights: the same keys: factors of the edges' outputs, (E,) each; all 1 where None.

        Raises:
            ValueError: where a cell type has no weights, or not one row an edge.
        """
        for name, tables in {"weights": weights, "edge_weights": edge_weights}.items():
            for cell_type in ("normal", "reduce"):
                if tables is not None and (cell_type not in tables or len(tables[cell_type]) != self._edges):
                    got = f"{len(tables[cell_type])} rows" if cell_type in tables else "nothing"
                    raise ValueError(
                        f"{name}[{cell_type!r}] must have one row for each of {self._edges} edges, got {got}"
                    )
        factors = {} if edge_weights is None else edge_weights
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            cell_type = "reduce" if cell.reduction else "normal"
            s0, s1 = s1, cell(s0, s1, weights[cell_type], factors.get(cell_type))
        logits: Tensor = self.classifier(self.global_pooling(s1).flatten(1))
        return logits
