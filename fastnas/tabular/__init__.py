"""Tables of trained architectures: read once, asked without training anything. Files are yours; none is shipped."""

from fastnas.tabular.table import Table

__all__ = ["Table"]
