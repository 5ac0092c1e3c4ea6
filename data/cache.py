"""Arrays kept on disk between runs, for what takes seconds to make from a data set's files.

A file is found by what it was made from, is read through the page cache, which all processes
and workers share, and holds numbers only. It may be deleted at any time. A file that is damaged,
or of another kind, counts as absent; a folder that cannot be written to is no error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

log = logging.getLogger(__name__)

MAGIC = b"arrays 1\n"
DIGEST_BYTES = 16
ALIGNMENT = 64
PERSONAL = "lavt"  # folder in the user's own cache


def digest(*parts: bytes | npt.NDArray[Any]) -> str:
    """Name of a content: of the parts, and of where each ends."""
    found = hashlib.sha256()
    for part in parts:
        view = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else memoryview(part)
        found.update(view.nbytes.to_bytes(8, "little"))
        found.update(view)
    return found.hexdigest()[: 2 * DIGEST_BYTES]


def default_folder(data_root: str | Path) -> Path:
    """`.cache` in the data root, or the user's own cache where that cannot be written to."""
    if os.access(data_root, os.W_OK):
        return Path(data_root) / ".cache"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / PERSONAL


class ArrayCache:
    """A folder of files of arrays.

    Processes need no locks: a file appears whole, by renaming, and two that make the same one
    make the same content.

    Args:
        folder: made when the first file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, kind: str, key: str) -> Arrays | None:
        """What was put, mapped and read-only; None if it is not there whole.

        Args:
            kind: of content and of its form; a part of the file's name.
            key: `digest` of all that the content depends on.
        """
        path = self._path(kind, key)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return _parse(memoryview(mapped), f"{kind} {key}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.info("%s is not used: %s", path, error)
            return None

    def put(self, kind: str, key: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Keep some arrays.

        Returns:
            The same, mapped from the file where it could be written.
        """
        path = self._path(kind, key)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    for piece in _pieces(arrays, f"{kind} {key}"):
                        file.write(piece)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            log.info("nothing is kept in %s (%s)", self.folder, error.strerror)
            return dict(arrays)
        kept = self.get(kind, key)
        return dict(arrays) if kept is None else kept

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key}.arrays"


def _pieces(arrays: Mapping[str, npt.NDArray[Any]], title: str) -> list[bytes | memoryview]:
    """A file: magic, digest of the rest, length of the header, header, arrays."""
    listed: list[Any] = []
    body: list[bytes | memoryview] = []
    offset = 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        listed.append([name, array.dtype.str, array.shape, offset])
        padding = -array.nbytes % ALIGNMENT
        body += [array.tobytes(), bytes(padding)]
        offset += array.nbytes + padding
    header = json.dumps({"title": title, "arrays": listed}).encode()
    start = len(MAGIC) + DIGEST_BYTES + 8
    header += b" " * (-(start + len(header)) % ALIGNMENT)
    rest = [len(header).to_bytes(8, "little"), header, *body]
    return [MAGIC, _checksum(rest), *rest]


def _parse(content: memoryview, title: str) -> Arrays:
    """Arrays of a file.

    Raises:
        ValueError, KeyError, TypeError: it is not what `_pieces` made of arrays with this title.
    """
    start = len(MAGIC) + DIGEST_BYTES
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError("it is of another kind")
    if _checksum([content[start:]]) != content[len(MAGIC) : start]:
        raise ValueError("it is damaged")
    begin = start + 8
    end = begin + int.from_bytes(content[start:begin], "little")
    header = json.loads(bytes(content[begin:end]))
    if header["title"] != title:
        raise ValueError("it holds something else")
    return {
        name: _array(content[end:], np.dtype(dtype), shape, offset)
        for name, dtype, shape, offset in header["arrays"]
    }


def _array(body: memoryview, dtype: np.dtype[Any], shape: list[int], offset: int) -> Any:
    """An array of numbers that lies inside of the body, for NumPy trusts its caller in that."""
    size = math.prod(shape) * dtype.itemsize
    inside = offset >= 0 and min(shape, default=0) >= 0 and offset + size <= len(body)
    if dtype.kind not in "biuf" or not inside:
        raise ValueError("it holds other things than numbers, or not all of them")
    return np.frombuffer(body[offset : offset + size], dtype).reshape(shape)


def _checksum(pieces: list[Any]) -> bytes:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.digest()[:DIGEST_BYTES]
