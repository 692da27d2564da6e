"""Modules: candidate operations and their registry, MixedOp, cells, supernets and final networks."""

from fastnas.nn.cells import Cell
from fastnas.nn.chain import ChainNetwork, ChainSupernet
from fastnas.nn.derived import Network
from fastnas.nn.mbconv import BLOCKS, InvertedResidual, block
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.nasbench1shot1 import NASBENCH1SHOT1_PRIMITIVES, NASBench101Network, OneShotSupernet
from fastnas.nn.nasbench201 import NASBENCH201_PRIMITIVES, NASBench201Cell, NASBench201Network, NASBench201Supernet
from fastnas.nn.operations import OPS, PRIMITIVES, primitive
from fastnas.nn.supernet import Supernet

__all__ = [
    "BLOCKS",
    "NASBENCH1SHOT1_PRIMITIVES",
    "NASBENCH201_PRIMITIVES",
    "OPS",
    "PRIMITIVES",
    "Cell",
    "ChainNetwork",
    "ChainSupernet",
    "InvertedResidual",
    "MixedOp",
    "NASBench101Network",
    "NASBench201Cell",
    "NASBench201Network",
    "NASBench201Supernet",
    "Network",
    "OneShotSupernet",
    "Supernet",
    "block",
    "primitive",
]
