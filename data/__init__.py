"""Datasets: references and images as tensors."""
