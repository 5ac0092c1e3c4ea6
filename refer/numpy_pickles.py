"""NumPy's numbers, strings and small arrays in a pickle, as plain values.

What is here takes the place of NumPy's own functions, as in :mod:`lib.numpy_values`, and makes
plain values, of small arrays alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lib import numpy_values
from refer.pickles import NotPlain

MAX_BYTES = 1 << 20  # of an array: it may be in a pickle many times over
NUMBERS_AND_TEXT = re.compile(r"b1|[iu][1248]|f[248]|[SU][0-9]{1,7}")


class Dtype(numpy_values.Dtype):
    """Stands for `numpy.dtype`; makes plain values."""

    def values(self, data: Any) -> list[Any]:
        """The values of a buffer; of an array of objects, they are the buffer."""
        if self.code == "O8" and isinstance(data, list):
            return data
        if not self.is_one_of(NUMBERS_AND_TEXT):
            raise NotPlain(f"it holds NumPy's type {str(self.code)[:20]!r}")
        if isinstance(data, str):  # Python 2's; bytes lost in decoding leave it too short
            data = data.encode("latin-1")
        if len(data) > MAX_BYTES:
            raise NotPlain("it holds a large NumPy array")
        return self.read(data).tolist() if data else []


class Array:
    """Stands for `numpy.ndarray`.

    Attributes:
        values: a list; a single value for an array without dimensions.
    """

    def __init__(self, *_: Any) -> None:
        self.values: Any = []

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        self.fill(data, dtype, shape)

    def fill(self, data: Any, dtype: Dtype, shape: Any) -> None:
        """Read the values of a buffer."""
        values = dtype.values(data)
        if shape not in ((), (len(values),)):
            raise NotPlain("it holds a NumPy array of several dimensions, or a damaged one")
        self.values = values if shape else values[0]


def _scalar(dtype: Dtype, data: Any) -> Any:
    (value,) = dtype.values(data) if data else ("",)  # only an empty string has no bytes
    return value


def _frombuffer(data: Any, dtype: Dtype, shape: Any, _: Any) -> Array:
    array = Array()
    array.fill(data, dtype, shape)
    return array


# By the names of NumPy 1; NumPy 2 has _core for core.
REPLACEMENTS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
}


def replacement(module: str, name: str) -> Callable[..., Any] | None:
    """What takes the place of a function of NumPy; None for all that is not needed."""
    return REPLACEMENTS.get((module.replace("numpy._core", "numpy.core"), name))
