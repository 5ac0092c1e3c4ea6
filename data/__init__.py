"""Data sets: references and pictures as tensors."""
