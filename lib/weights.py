"""Files of weights: read untrusted ones, find the weights in them, write atomically."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError

MAX_BYTES = 64 << 30  # of a checkpoint; LAVT's with its optimizer has 2 GB


# Where a file keeps the weights, the first that it has; one may be inside another.
CONTAINERS = (
    *("model", "state_dict", "model_state_dict", "net", "network", "module", "weights"),
    *("teacher", "student", "model_ema", "ema"),
)
# Parts of names that torch.compile, DDP, FSDP and gradient checkpointing add.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code in it.

    NumPy's numbers become Python's, its arrays of numbers become tensors.

    Raises:
        InputError: missing, damaged, no checkpoint, or with more than tensors and plain values.
    """
    content = _load(Path(path))
    try:
        content = _plain(content)
    except Exception as e:  # a type that torch does not have, or a damaged text
        raise InputError(f"{path} holds an array that is no tensor ({str(e)[:100]})") from e
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _load(path: Path) -> Any:
    """Load a file of ``torch.save`` or a safetensors file onto the CPU; checksums are verified.

    Raises:
        InputError: missing, too large, damaged, or it holds anything that is not allowed.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give an existing file")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES >> 30} GB, the upper limit")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise InputError(f"{path} is damaged (checksum of {wrong}): get it again")
        with warnings.catch_warnings(), torch.serialization.safe_globals(_allowed()):
            warnings.simplefilter("ignore")  # about old protocols and layouts
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as e:  # damaged files raise nearly anything
        from lib.refused import refusal

        raise refusal(path, e) from e


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name."""
    with path.open("rb") as f:
        return f.read(9)[8:] == b"{"


def _allowed() -> list[Any]:
    """What ``torch.load(weights_only=True)`` admits besides tensors and plain values.

    It is ``argparse.Namespace``, in which the release stores its arguments, and what stands for
    NumPy's numbers and arrays.
    """
    from lib.numpy_values import STAND_INS

    return [argparse.Namespace, *STAND_INS]


def _plain(value: Any) -> Any:
    """The same with tensors for NumPy's arrays of numbers, and lists for those of texts."""
    from lib.numpy_values import Array

    if isinstance(value, Array):
        array = value.value
        return torch.from_numpy(array) if array.dtype.kind in "biufc" else array.tolist()
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_plain(vars(value)))
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def levels(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A file's content, the container in it, and so on; the last one may be a state dict."""
    found = [content]
    while not is_state(found[-1]):
        inner = [found[-1].get(name) for name in CONTAINERS]
        held = [value for value in inner if isinstance(value, Mapping)]
        if not held or len(found) > len(CONTAINERS):
            break
        found.append(held[0])
    return found


def is_state(value: Any) -> bool:
    """Whether ``value`` is a non-empty dict of names and dense tensors."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        and all(v.layout == torch.strided for v in value.values())
    )


def unwrap(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """A state dict without what wrappers add to the names.

    Args:
        state: names like ``module.model.layer.weight``.
        own: names of the module that the weights are for, like ``layer.weight``.

    Returns:
        If exactly one prefix stands before the own names: what is below it, without the prefix.
    """
    clean = {".".join(p for p in k.split(".") if p not in WRAPPERS): v for k, v in state.items()}
    for name in own:
        prefixes = {k.removesuffix(name) for k in clean if k.endswith("." + name) or k == name}
        if len(prefixes) == 1:
            prefix = prefixes.pop()
            return {k.removeprefix(prefix): v for k, v in clean.items() if k.startswith(prefix)}
        if prefixes:
            break
    return clean


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of the weights of a folder to share, hexadecimal."""
    digest, path = hashlib.sha256(), Path(path)
    with open(path / "model.safetensors" if path.is_dir() else path, "rb") as f:
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
        # A loader process that dies raises an error wherever the main process is.
        for error in (e, e.__context__):
            if "DataLoader worker" in str(error):
                raise RuntimeError(str(error)) from e
        raise InputError(
            f"cannot write {path} ({e}): free some space or change --output_dir"
        ) from e
    return partial
