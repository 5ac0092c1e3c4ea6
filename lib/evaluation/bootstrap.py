"""Bootstrap intervals over objects: how far a number would move on other objects of the kind.

An object's expressions share its image and mask, so objects are drawn, with all their samples:
drawing samples would make the intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lib.evaluation.counts import Floats, SampleCounts

Intervals = dict[str, tuple[float, float]]

RESAMPLES = 10_000
LEVEL = 0.95
CELLS = 1 << 22  # of one block of draws; bounds memory


def intervals(
    counts: SampleCounts,
    objects: npt.NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """95 % percentile intervals of a split's metrics.

    Args:
        counts: of N samples.
        objects: (N,) which object each sample is about.
        resamples: number of draws, each of as many objects as there are.
        seed: of the draws.

    Returns:
        (low, high) in percent by the heads of :meth:`lib.evaluation.metrics.Metrics.row`; nan
        where no draw defines a metric.
    """
    drawn = _resampled(_object_sums(counts, objects), resamples, seed)
    return _percentiles(counts.columns, counts.of_sums(drawn))


def paired_intervals(
    first: SampleCounts,
    second: SampleCounts,
    objects: npt.NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """Intervals of the second's metrics less the first's, each draw being of the same objects.

    Args:
        first, second: counts of the same samples.
        objects: (N,) which object each sample is about.
        resamples, seed: as in :func:`intervals`.

    Returns:
        (low, high) of the difference, in points, by column.
    """
    sums = [_object_sums(counts, objects) for counts in (first, second)]
    width = sums[0].shape[1]
    drawn = _resampled(np.concatenate(sums, axis=1), resamples, seed)
    gains = second.of_sums(drawn[:, width:]) - first.of_sums(drawn[:, :width])
    return _percentiles(first.columns, gains)


def _object_sums(counts: SampleCounts, objects: npt.NDArray[np.int64]) -> Floats:
    """(M, C) terms of the metrics, summed over each object."""
    _, which = np.unique(objects, return_inverse=True)
    return np.stack([np.bincount(which, weights=c) for c in counts.terms().T], axis=1)


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


def _percentiles(columns: Sequence[str], values: Floats) -> Intervals:
    """Ends of each column over the draws that define it."""
    tail = 50 * (1 - LEVEL)
    out = {}
    for name, column in zip(columns, values.T, strict=True):
        defined = column[~np.isnan(column)]
        ends = np.percentile(defined, [tail, 100 - tail]) if len(defined) else (np.nan, np.nan)
        out[name] = (float(ends[0]), float(ends[1]))
    return out
