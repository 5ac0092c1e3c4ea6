"""Checkpoint files: read untrusted ones, write atomically."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lib.errors import InputError

MAX_BYTES = 64 << 30  # of a checkpoint; LAVT's with its optimizer has 2 GB


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code in it.

    Raises:
        InputError: missing, damaged, no checkpoint, or with more than tensors and plain values.
    """
    content = _load(Path(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _load(path: Path) -> Any:
    """Load a file of ``torch.save`` or a safetensors file onto the CPU.

    ``torch.load(weights_only=True)`` admits tensors, plain containers, numbers and strings; added
    is ``argparse.Namespace``, in which the release stores its arguments. Checksums are verified.

    Raises:
        InputError: missing, too large, damaged, or it holds anything else.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give an existing file")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES >> 30} GB, the upper limit")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise InputError(f"{path} is damaged (checksum of {wrong}): get it again")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about old protocols and layouts
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as e:  # damaged files raise nearly anything
        if other := re.search(r"GLOBAL ([\w.]+)|class .?([\w.]+\.\w+)", str(e)):
            raise InputError(
                f"{path} holds more than tensors and plain values ({other[1] or other[2]}), which "
                "could run code: save it again without them"
            ) from e
        if "Unsupported operand" in str(e):
            raise InputError(
                f"{path} holds more than tensors and plain values, or has another pickle protocol "
                "than torch.save's default: save it again"
            ) from e
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise InputError(f"{path} is damaged or no {kind}: get it again") from e


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
