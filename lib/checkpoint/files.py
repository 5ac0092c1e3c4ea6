"""Checkpoint files: read untrusted ones, write atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from lib.errors import InputError
from lib.safe_load import load_untrusted


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code in it.

    Raises:
        InputError: missing, damaged, no checkpoint, or with more than tensors and plain values.
    """
    content = load_untrusted(Path(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically: a temporary file, fsync, rename.

    Raises:
        InputError: the file cannot be written; an existing one is unchanged.
    """
    partial = write_partial(content, path)
    try:
        os.replace(partial, path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {e.strerror}") from e


def write_partial(content: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the content of ``path`` to a temporary file beside it, flushed to the disk.

    Returns:
        The temporary file, to be renamed.

    Raises:
        InputError: it cannot be written; no temporary file is left.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed process may have left it as a hard link of a good file, so it is not overwritten.
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(
            f"cannot write {path} ({e}): free some space or change --output_dir"
        ) from e
    return partial
