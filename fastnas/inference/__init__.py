"""Trained networks: their files and their predictions."""

from fastnas.inference.model_file import TrainedModel, build_network, load_model, save_model

__all__ = ["TrainedModel", "build_network", "load_model", "save_model"]
