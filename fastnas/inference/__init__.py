"""Trained networks: their files, their predictions, and their export to other formats."""

from fastnas.inference.export import export_onnx, export_program
from fastnas.inference.images import image_files, read_image
from fastnas.inference.model_file import TrainedModel, load_model, model_path, save_model
from fastnas.inference.networks import NETWORKS, build_network, space_of

__all__ = [
    "NETWORKS",
    "TrainedModel",
    "build_network",
    "export_onnx",
    "export_program",
    "image_files",
    "load_model",
    "model_path",
    "read_image",
    "save_model",
    "space_of",
]
