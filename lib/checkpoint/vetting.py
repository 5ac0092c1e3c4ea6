"""Look a stranger's checkpoint over before torch opens it.

``torch.load(weights_only=True)`` runs no code, but takes a file's word for its sizes: a packed
megabyte may unfold to gigabytes, a weight may claim more memory than its data has, a list may
hold one list a billion times. Here the same pickle is built of stand-ins first, nothing of torch
is called, and every claim is compared with the file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from lib.errors import InputError

MAX_PICKLE = 16 << 20  # bytes; LAVT's with its optimizer has half a megabyte
MAX_DIRECTORY = 16 << 20  # bytes of a zip's table of contents; LAVT's has 0.2 million
MAX_VALUES = 2_000_000  # in all containers, shared ones counted each time
MAX_KEY = 1 << 63  # large numbers can be made to collide as keys

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in files of torch before 1.6

ITEM_SIZES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}
DTYPES = (
    "float64 double float32 float float16 half bfloat16 int64 long int32 int int16 short int8 "
    "uint8 bool"
)
# What protocol 2 is written with, as far as torch.load reads it.
OPCODES = (
    b"\x80cR\x81b.(aeust\x85\x86\x87N\x88\x89)]}KMJGXUQhjqr\x8a"  # torch.load's own choice
    b"0"  # POP, which it refuses itself
)


class _Foreign(Exception):
    """The file asks for something that is not on the list."""


class _Lie(Exception):
    """The file claims what is not so."""


class _Made(dict[Any, Any]):
    """Stand-in for an OrderedDict, Counter or Namespace."""


class _Storage:
    """Stand-in for a storage of so many items."""

    def __init__(self, items: int) -> None:
        self.items = items


class _Tensor:
    """Stand-in for a tensor."""


class _Name:
    """Stand-in for something on the list that a pickle asks for by its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def vet(path: Path) -> None:
    """Compare a checkpoint's claims with its file.

    Args:
        path: of torch.save, in today's zip layout or the one before torch 1.6.

    Raises:
        InputError: it is none, is damaged, asks for code, or would unfold to more than it has.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            if f.read(4) == b"PK\x03\x04":
                _vet_zip(f, size)
            else:
                f.seek(0)
                _vet_legacy(f, size)
    except _Foreign as e:
        raise InputError(
            f"{path} holds more than tensors and plain values ({e}) and was not opened: "
            "get the checkpoint from its authors"
        ) from None
    except _Lie as e:
        raise InputError(
            f"{path} is damaged or no PyTorch checkpoint (it {e}): get it again"
        ) from None
    except Exception as e:  # a damaged pickle or zip can raise nearly anything
        raise InputError(f"{path} is damaged or no PyTorch checkpoint: get it again") from e


def _vet_zip(f: IO[bytes], size: int) -> None:
    start, length = _directory(f, size)
    if length > MAX_DIRECTORY:
        raise _Lie("lists far too many files")
    with zipfile.ZipFile(f) as archive:
        members = archive.infolist()
        names = {m.filename.lower() for m in members}  # torch takes capitals for small letters
        # Prefixed data would have zipfile and torch look at different places.
        if archive.start_dir != start or len(names) < len(members):
            raise _Lie("has two tables of contents")
        if any(name.endswith("/constants.pkl") for name in names):
            raise _Foreign("a TorchScript program")
        packed = any(m.compress_type or m.flag_bits & 1 for m in members)
        if packed or sum(m.file_size for m in members) > size:
            raise _Lie("unpacks to more than its size")
        root = members[0].filename.partition("/")[0]
        sizes = {m.filename: m.file_size for m in members}
        if sizes[f"{root}/data.pkl"] > MAX_PICKLE:
            raise _Lie("has far too many values")
        if damaged := archive.testzip():  # torch itself does not compare the checksums
            raise _Lie(f"has a wrong checksum of {damaged}")
        pickled = archive.read(f"{root}/data.pkl")
    _Vetting(io.BytesIO(pickled), lambda key: sizes[f"{root}/data/{key}"]).vet()


def _directory(f: IO[bytes], size: int) -> tuple[int, int]:
    """Where the table of contents begins, by the zip's last 22 bytes, and its length."""
    f.seek(size - 22)
    magic, length, start, comment = struct.unpack("<4s8xIIH", f.read(22))
    if magic != b"PK\x05\x06" or comment:
        raise ValueError("the zip's end is missing")
    f.seek(max(size - 42, 0))
    locator, at = struct.unpack("<4s4xQ4x", f.read(20))
    if locator == b"PK\x06\x07":
        f.seek(at)
        magic, length, start = struct.unpack("<4s36xQQ", f.read(56))
        if magic != b"PK\x06\x06":
            raise ValueError("the zip's end is damaged")
    return start, length


def _vet_legacy(f: IO[bytes], size: int) -> None:
    """Five pickles, then the storages' bytes."""
    head = io.BytesIO(f.read(MAX_PICKLE))
    if _Vetting(head).vet() != LEGACY_MAGIC:
        raise ValueError("no checkpoint")
    for _ in range(4):
        _Vetting(head, lambda key: size).vet()


class _Vetting(pickle._Unpickler):
    """Builds a pickle of stand-ins.

    Args:
        file: the pickle.
        bytes_of: how many bytes the file has for the storage of a key.
    """

    stack: list[Any]

    def __init__(self, file: IO[bytes], bytes_of: Callable[[str], int] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._bytes_of = bytes_of
        self._storages: dict[str, _Storage] = {}

    def vet(self) -> Any:
        """Build, and bound what was built."""
        content = self.load()
        waiting, left = [(content, 0)], MAX_VALUES
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, dict):
                values = [*value.values()]
            elif isinstance(value, list | tuple):
                values = [*value]
            else:
                continue
            left -= len(values) + 1
            if left < 0 or depth > 64:
                raise _Lie("holds lists within lists beyond any use")
            waiting += [(v, depth + 1) for v in values]
        return content

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full in CALLS or full in ITEM_SIZES:
            return _Name(full)
        if module == "torch" and name in DTYPES.split():
            return None
        raise _Foreign(full)

    def persistent_load(self, pid: Any, /) -> Any:
        """A storage: 'storage', type, key, device, items[, view]."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or any(pid[5:]):
            raise _Foreign("another file")
        _, kind, key, _, items = pid[:5]
        if not isinstance(kind, _Name) or type(items) is not int or self._bytes_of is None:
            raise _Lie("holds a damaged weight")
        if key not in self._storages:
            if not 0 <= items * ITEM_SIZES[kind.name] <= self._bytes_of(key):
                raise _Lie("claims more data than it has")
            self._storages[key] = _Storage(items)
        return self._storages[key]

    def load_call(self) -> None:
        """Stands in for calling, and for making an object: REDUCE and NEWOBJ."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function.name not in CALLS:
            raise _Foreign("a call")
        self.stack.append(CALLS[function.name](*arguments))

    def load_build(self) -> None:
        """The attributes of an OrderedDict or Namespace."""
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, _Made) or not isinstance(state, dict):
            raise _Foreign("an object")
        made[_Made] = state  # to be bounded, too

    def load_setitems(self) -> None:
        """SETITEMS, for plain keys: hashing tuples of tuples has no end."""
        _check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_setitem(self) -> None:
        """SETITEM, for a plain key."""
        _check_keys([self.stack[-2]])
        super().load_setitem()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{op: pickle._Unpickler.dispatch[op] for op in OPCODES},
        pickle.REDUCE[0]: load_call,
        pickle.NEWOBJ[0]: load_call,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        number = isinstance(key, int | float) and -MAX_KEY <= key < MAX_KEY
        if not (number or isinstance(key, str | bytes) or key is None):
            raise _Lie("has keys that are neither names nor numbers")


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Compare a tensor's claims with its storage, which torch would enlarge instead."""
    if len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0:
        raise _Lie("holds a damaged weight")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if all(shape) and (last >= storage.items or math.prod(shape) > storage.items):
        raise _Lie("claims weights larger than their data")
    return _Tensor()


def _mapping(content: Any = (), /) -> _Made:
    """An OrderedDict or Counter; old pickles give its items as pairs."""
    pairs = list(content.items()) if isinstance(content, dict) else [(k, v) for k, v in content]
    _check_keys([key for key, _ in pairs])
    return _Made(pairs)


def _plain(*arguments: Any) -> tuple[Any, ...]:
    return arguments


# The explicit list of what a checkpoint may call for, with its stand-in.
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": _plain,
    "torch.device": _plain,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "argparse.Namespace": _mapping,
}
