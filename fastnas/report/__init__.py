"""Pictures of cells and of the architecture parameters, and a page a run, drawn with matplotlib."""

from .alphas import alphas_figure, plot_alphas
from .cell import cell_figure, draw_cell, draw_genotype
from .page import write_page
from .scatter import plot_scatter, scatter_figure
from .scores import plot_scores, scores_figure
from .style import op_color

__all__ = [
    "alphas_figure",
    "cell_figure",
    "draw_cell",
    "draw_genotype",
    "op_color",
    "plot_alphas",
    "plot_scatter",
    "plot_scores",
    "scatter_figure",
    "scores_figure",
    "write_page",
]
