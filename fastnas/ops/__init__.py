"""Functions on tensors: each with its plain-PyTorch reference, its fake and its autograd node in one file."""

from fastnas.ops.abs_cell import AbsOp, abs_cell
from fastnas.ops.absolute import absolute_, group_products, restore_
from fastnas.ops.mixed_cell import CellEdge, mixed_cell
from fastnas.ops.mixed_op import Candidate, mixed_op
from fastnas.ops.mixed_sum import mixed_sum
from fastnas.ops.partial_channels import Bypass, partial_channels, partial_channels_split
from fastnas.ops.relu_pointwise import relu_pointwise

__all__ = [
    "AbsOp",
    "Bypass",
    "Candidate",
    "CellEdge",
    "abs_cell",
    "absolute_",
    "group_products",
    "mixed_cell",
    "mixed_op",
    "mixed_sum",
    "partial_channels",
    "partial_channels_split",
    "relu_pointwise",
    "restore_",
]
