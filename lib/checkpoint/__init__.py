"""Checkpoints: published layouts, and ImageNet Swin weights."""

from lib.checkpoint.layouts import TRAINING_STATE, load_model, load_training
from lib.weights import file_hash, read_checkpoint, write_checkpoint, write_partial

__all__ = [
    "TRAINING_STATE",
    "file_hash",
    "load_model",
    "load_training",
    "read_checkpoint",
    "write_checkpoint",
    "write_partial",
]
