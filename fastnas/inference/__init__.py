"""Trained networks: their files, their predictions, and their export to other formats."""

from fastnas.inference.export import export_onnx, export_program
from fastnas.inference.images import image_files, read_image
from fastnas.inference.model_file import TrainedModel, build_network, load_model, model_path, save_model

__all__ = [
    "TrainedModel",
    "build_network",
    "export_onnx",
    "export_program",
    "image_files",
    "load_model",
    "model_path",
    "read_image",
    "save_model",
]
