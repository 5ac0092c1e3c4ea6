"""Bootstrap intervals over objects: how far a number would move on other objects of the kind.

An object's expressions share its image and mask, so objects are drawn, with all their samples:
drawing samples would make the intervals too narrow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lib.evaluation.metrics import PRECISION_AT, sample_iou

Floats = npt.NDArray[np.float64]
Intervals = dict[str, tuple[float, float]]

RESAMPLES = 10_000
LEVEL = 0.95
CELLS = 1 << 22  # of one block of draws; bounds memory

COLUMNS = (*(f"P@{k}" for k in PRECISION_AT), "oIoU", "mIoU")


def intervals(
    inter: npt.NDArray[np.int64],
    union: npt.NDArray[np.int64],
    objects: npt.NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """95 % percentile intervals of a split's metrics.

    Args:
        inter, union: (N,) of each sample, pixels.
        objects: (N,) which object each sample is about.
        resamples: number of draws, each of as many objects as there are.
        seed: of the draws.

    Returns:
        (low, high) in percent by the heads of :meth:`lib.evaluation.metrics.Metrics.row`.
    """
    drawn = _resampled(_object_sums(inter, union, objects), resamples, seed)
    return _percentiles(_metrics(drawn))


def paired_intervals(
    first: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    second: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    objects: npt.NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """Intervals of the second's metrics less the first's, each draw being of the same objects.

    Args:
        first, second: intersection and union of the same samples, (N,) each, pixels.
        objects: (N,) which object each sample is about.
        resamples, seed: as in :func:`intervals`.

    Returns:
        (low, high) of the difference, in points, by column.
    """
    sums = [_object_sums(*counts, objects) for counts in (first, second)]
    width = sums[0].shape[1]
    drawn = _resampled(np.concatenate(sums, axis=1), resamples, seed)
    return _percentiles(_metrics(drawn[:, width:]) - _metrics(drawn[:, :width]))


def _object_sums(
    inter: npt.NDArray[np.int64], union: npt.NDArray[np.int64], objects: npt.NDArray[np.int64]
) -> Floats:
    """(M, 4 + K): samples, I, U, IoU and hits at each precision, summed over each object."""
    iou = sample_iou(inter, union)
    columns = [np.ones(len(iou)), inter, union, iou, *(iou >= k for k in PRECISION_AT)]
    _, which = np.unique(objects, return_inverse=True)
    return np.stack([np.bincount(which, weights=c) for c in columns], axis=1)


def _resampled(sums: Floats, resamples: int, seed: int) -> Floats:
    """(R, C) column sums of R draws of M of the M rows, with replacement."""
    rng = np.random.default_rng(seed)
    rows = len(sums)
    block = max(1, CELLS // rows)
    out = np.empty((resamples, sums.shape[1]))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(0, rows, (size, rows), dtype=np.int32).astype(np.int64)
        drawn += rows * np.arange(size)[:, None]
        # How often each row was drawn, so that the sums are one product of matrices.
        times = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        out[start : start + size] = times.astype(np.float64) @ sums
    return out


def _metrics(sums: Floats) -> Floats:
    """(R, len(COLUMNS)) metrics in percent of (R, 4 + K) sums; nan where all unions are empty."""
    samples, inter, union, iou = sums[:, :4].T
    overall = np.divide(inter, union, out=np.full(len(sums), np.nan), where=union > 0)
    hits = sums[:, 4:] / samples[:, None]
    return 100 * np.column_stack([hits, overall, iou / samples])


def _percentiles(values: Floats) -> Intervals:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return {c: (float(a), float(b)) for c, a, b in zip(COLUMNS, low, high, strict=True)}
