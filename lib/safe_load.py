"""Load untrusted files of weights: no code in a file ever runs."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lib.errors import InputError

MAX_BYTES = 64 << 30  # of a checkpoint; LAVT's with its optimizer has 2 GB


def load_untrusted(path: Path) -> Any:
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
                "could run code: save it again without"
            ) from e
        if "Unsupported operand" in str(e):
            raise InputError(
                f"{path} holds more than tensors and plain values, or has another pickle protocol "
                "than torch.save's default: save it again"
            ) from e
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise InputError(f"{path} is damaged or no {kind}: get it again") from e
