"""Versions and commit, for result files."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers"),
    *("pycocotools", "numpy", "pillow", "scipy"),
)


def version(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    if package == "torch":
        return torch.__version__  # with the build, which the package's record may leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of this code, with '-dirty' if tracked files have changed."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
