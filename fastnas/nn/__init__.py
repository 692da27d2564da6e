"""Modules: candidate operations and their registry, MixedOp, cells and supernets."""

from fastnas.nn.cells import Cell
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.operations import OPS, PRIMITIVES, primitive
from fastnas.nn.supernet import Supernet

__all__ = ["OPS", "PRIMITIVES", "Cell", "MixedOp", "Supernet", "primitive"]
