"""Why a file of weights cannot be read, in one line."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from lib.errors import InputError

CLASS = re.compile(r"GLOBAL ([\w.]+)|class .?([\w.]+\.\w+)")
# Modules and names of what checkpoints usually hold.
USUAL = ("torch", "numpy", "_codecs", "argparse", "bytes", "bytearray", "set", "complex")
WEIGHTS = {f"c['{name}']" for name in ("model", "bert_model", "state_dict", "net", "model_ema")}
MAX_DEPTH = 20


def refusal(path: Path, error: Exception) -> InputError:
    """The error to raise for a file that ``torch.load`` or safetensors could not read.

    Args:
        path: of the file.
        error: of the library.
    """
    with path.open("rb") as f:
        start = f.read(40)
    if start.startswith(b"version https://git-lfs"):
        return InputError(f"{path} is a pointer of Git LFS, not the file itself: git lfs pull")
    if start.lstrip().startswith(b"<"):
        return InputError(f"{path} is a web page, not the file itself: get it again")
    of_class = CLASS.search(str(error))
    if of_class or "Unsupported operand" in str(error):
        name = of_class[1] or of_class[2] if of_class else "object, or another pickle protocol"
        content = _content(path)
        found = _find(content, name.rpartition(".")[2]) or _find(content, "")
        where, remedy = (f" in {found[0]}", found[1]) if found else ("", "leave it out")
        return InputError(
            f"{path} holds more than tensors and plain values, a {name}{where}, which could run "
            "code: it is not read; where you trust the file, save it again: "
            f"c = torch.load('{path}', weights_only=False); {remedy}; torch.save(c, 'plain.pth')"
        )
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    return InputError(f"{path} is damaged or no {kind}: get it again")


class _Other:
    """Stands for an object of any class. Nothing of the class, nor of its module, is used.

    Attributes:
        usual: whether checkpoints usually hold such objects.
        args: that it was made with.
        state: the pickle's, such as attributes.
    """

    usual = False

    def __new__(cls, *args: Any, **kwargs: Any) -> _Other:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Other:
        return self

    def append(self, value: Any) -> None:
        """Of a list of another class."""

    extend = append


class _Reader(pickle.Unpickler):
    """Builds lists, dictionaries and plain values, and stand-ins for all other objects."""

    def find_class(self, module: str, name: str, /) -> Any:
        """A stand-in."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (_Other,), {"usual": module.partition(".")[0] in USUAL or name in USUAL})

    def persistent_load(self, pid: Any, /) -> Any:
        """Nothing, for the storage of a tensor."""


def _content(path: Path) -> Any:
    """The content with stand-ins; None if it cannot be read."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                return _Reader(io.BytesIO(archive.read(name))).load()
        with path.open("rb") as f:
            first = _Reader(f).load()
            if not isinstance(first, int):
                return first
            for _ in range(2):  # the older format has a version and sizes of types before it
                _Reader(f).load()
            return _Reader(f).load()
    except Exception:  # a damaged pickle raises nearly anything
        return None


def _is_usual(value: _Other) -> bool:
    """Whether checkpoints usually hold such an object; of NumPy's, only those of simple types."""
    name = type(value).__name__
    if name == "_reconstruct" and isinstance(value.state, tuple):
        code = getattr(value.state[2], "args", None)
    else:
        code = getattr(value.args[0], "args", None) if name == "scalar" and value.args else None
    return value.usual and not (code and str(code[0]).startswith(("O", "V", "M", "m")))


def _find(value: Any, name: str, code: str = "c", outer: str = "") -> tuple[str, str] | None:
    """Where the first object of a class is, and the statement that takes it out; None without one.

    Args:
        value: with stand-ins.
        name: of the class; '' for any that is not usual in checkpoints.
        code: Python code of the value.
        outer: code of the object to be removed with it, '' for itself.
    """
    if isinstance(value, _Other):
        if type(value).__name__ == name or not (name or _is_usual(value)):
            if code == "c" or code in WEIGHTS:
                return code, f"{code} = {code}.state_dict()"
            return code, f"del {outer or code}"
        if type(value).__name__ != "Namespace" or not isinstance(value.state, dict):
            return None
        items = [(f"{code}.{key}", inner) for key, inner in value.state.items()]
    elif isinstance(value, dict):
        items = [(f"{code}[{key!r}]", inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{code}[{i}]", inner) for i, inner in enumerate(value)]
    else:
        return None
    if isinstance(value, tuple):
        outer = outer or code
    if code.count("[") > MAX_DEPTH:
        return None
    found = (_find(inner, name, at, outer) for at, inner in items)
    return next((place for place in found if place), None)
