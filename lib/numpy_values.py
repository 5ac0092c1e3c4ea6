"""NumPy's numbers and arrays in a file of weights.

NumPy's own functions trust a pickle: a damaged one ends the process. What is here takes their place
in ``torch.load``, and takes apart what the pickle gives: codes of simple types, and bytes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

SIMPLE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16)|[SU][0-9]{1,7}")


class Dtype:
    """Stands for ``numpy.dtype``: a simple type's code, like 'i8', and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def is_one_of(self, codes: re.Pattern[str]) -> bool:
        """Whether it is a type of these codes, in a byte order that there is."""
        return bool(codes.fullmatch(str(self.code))) and self.order in ("<", ">", "=", "|")

    def read(self, data: Any) -> np.ndarray[Any, Any]:
        """The values of a buffer, in one dimension."""
        if not self.is_one_of(SIMPLE):
            raise ValueError(f"class numpy.ndarray of type {str(self.code)[:20]}")
        return np.frombuffer(data, np.dtype(self.code).newbyteorder(self.order))


class Array:
    """Stands for ``numpy.ndarray``; ``value`` is the array."""

    value = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        order = "F" if fortran else "C"
        self.value = dtype.read(data).reshape(shape, order=order).copy()  # type: ignore[call-overload]


def make_array(*_: Any) -> Array:
    """Stands for ``_reconstruct``."""
    return Array()


def make_number(dtype: Dtype, data: Any) -> Any:
    """Stands for ``scalar``: Python's number or text."""
    value = dtype.read(data)[0]
    return float(value) if isinstance(value, np.longdouble) else value.item()


def no_bytes() -> bytes:
    """Stands for ``bytes()``, the data of an empty array."""
    return b""


# For torch.serialization.safe_globals; NumPy 1 has core where NumPy 2 has _core.
STAND_INS = [
    (Dtype, "numpy.dtype"),
    (Array, "numpy.ndarray"),
    (no_bytes, "builtins.bytes"),
    *((make_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((make_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
