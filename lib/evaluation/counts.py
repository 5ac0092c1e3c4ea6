"""The counts of samples that metrics, tables and intervals are made of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lib.evaluation.metrics import COLUMNS, PRECISION_AT, Metrics, sample_iou, summarise

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class SampleCounts(Protocol):
    """The counts of N samples, of which a kind of metrics is made."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics, as in :meth:`Metrics.row`."""

    def take(self, rows: npt.NDArray[Any]) -> SampleCounts:
        """Those of some samples: indices, or (N,) bool."""

    def iou(self) -> Floats:
        """Each sample's, (N,)."""

    def summarise(self) -> Metrics:
        """The metrics, in percent."""

    def terms(self) -> Floats:
        """(N, C); the metrics are a function of their sums over the samples."""

    def of_sums(self, sums: Floats) -> Floats:
        """(R, len(columns)) metrics in percent of (R, C) sums; nan where not defined."""


class StandardCounts(NamedTuple):
    """Intersection and union of N samples, pixels: metrics of datasets of one target each."""

    intersection: Ints
    union: Ints

    @property
    def columns(self) -> tuple[str, ...]:
        """See :class:`SampleCounts`, as for the methods."""
        return COLUMNS

    def take(self, rows: npt.NDArray[Any]) -> StandardCounts:
        return StandardCounts(self.intersection[rows], self.union[rows])

    def iou(self) -> Floats:
        return sample_iou(*self)

    def summarise(self) -> Metrics:
        return summarise(*self)

    def terms(self) -> Floats:
        iou = self.iou()
        hits = (iou >= k for k in PRECISION_AT)
        return np.column_stack([np.ones(len(iou)), *self, iou, *hits]).astype(np.float64)

    def of_sums(self, sums: Floats) -> Floats:
        samples, inter, union, iou = sums[:, :4].T
        hits = ratio(sums[:, 4:], samples[:, None])
        return 100 * np.column_stack([hits, ratio(inter, union), ratio(iou, samples)])


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, nan where the whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def sample_counts(
    kind: str, inter: Ints, union: Ints, no_target: Bools, predicted: Bools
) -> SampleCounts:
    """The counts of a kind of metrics.

    Args:
        kind: see :class:`refer.datasets.DatasetInfo`.
        inter, union: of the predicted and true masks, (N,), pixels.
        no_target: (N,), whether there is none in truth; of no matter to 'standard'.
        predicted: (N,), whether the prediction is that there is none; likewise.
    """
    if kind == "standard":
        return StandardCounts(inter, union)
    from lib.evaluation.generalised import KINDS

    return KINDS[kind](inter, union, no_target, predicted)
