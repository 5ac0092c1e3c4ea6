"""What evaluation computes, in plain numpy and float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def resized(logits: Floats, height: int, width: int) -> Floats:
    """Bilinear resize (..., S, S) -> (..., height, width), pixel centres at halves."""
    for axis, size in ((-2, height), (-1, width)):
        length = logits.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (at - low)[:, None] if axis == -2 else at - low
        a, b = np.take(logits, low, axis), np.take(logits, high, axis)
        logits = a * (1 - share) + b * share
    return logits


def averaged(logits: Floats) -> Floats:
    """Probability (H, W) of the object, of (K, 2, H, W)."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e[:, 1] / e.sum(1)).mean(0)


def counts(a: Bools, b: Bools) -> tuple[int, int]:
    return int((a & b).sum()), int((a | b).sum())
