"""All numbers of a split, from the counts of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.evaluation.bootstrap import Intervals, intervals
from lib.evaluation.metrics import Metrics, summarise


@dataclass(frozen=True)
class Summary:
    """A split's numbers.

    Attributes:
        rows: metrics by name: 'all', and 'kind: …' where kinds are known.
        intervals: of the metrics of 'all', 95 %, over objects.
        objects: number of objects.
    """

    rows: dict[str, Metrics]
    intervals: Intervals
    objects: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each row's metrics; 'all' has the intervals, null where there is none."""
        out = {name: metrics.as_dict() for name, metrics in self.rows.items()}
        ends = {c: None if low != low else [low, high] for c, (low, high) in self.intervals.items()}
        out["all"] |= {"objects": self.objects, "bootstrap_95": ends}
        return out


def summary(
    inter: npt.NDArray[np.int64],
    union: npt.NDArray[np.int64],
    objects: Sequence[int],
    kinds: Sequence[str | None],
) -> Summary:
    """Summarise a split.

    Args:
        inter, union: (N,) of each sample, pixels.
        objects: which object each of the N samples is about.
        kinds: of each sample's expression; None where unknown.
    """
    rows = {"all": summarise(inter, union)}
    of_sample = np.array([kind or "" for kind in kinds])
    for kind in sorted({kind for kind in kinds if kind}):
        chosen = of_sample == kind
        rows[f"kind: {kind}"] = summarise(inter[chosen], union[chosen])
    which = np.asarray(objects, dtype=np.int64)
    return Summary(rows, intervals(inter, union, which), len(np.unique(which)))
