"""Bootstrap intervals against all resamples of a few objects, one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lib.evaluation.bootstrap import intervals, paired_intervals
from lib.evaluation.counts import StandardCounts
from lib.evaluation.metrics import COLUMNS, Metrics, summarise

INTER = np.array([90, 20, 70, 10, 55, 5, 99])
UNION = np.array([100, 80, 100, 90, 60, 100, 100])
COUNTS = StandardCounts(INTER, UNION)
OBJECTS = np.array([7, 7, 3, 5, 5, 5, 9])


def every_resample(inter: np.ndarray, union: np.ndarray) -> list[Metrics]:
    """Metrics of all 4**4 draws of the four objects, each equally likely."""
    of_object = [np.flatnonzero(name == OBJECTS) for name in np.unique(OBJECTS)]
    chosen = [np.concatenate(draw) for draw in itertools.product(of_object, repeat=len(of_object))]
    return [summarise(inter[rows], union[rows]) for rows in chosen]


def test_columns_are_those_of_a_row() -> None:
    assert tuple(summarise(INTER, UNION).row()) == COLUMNS


def test_ends_are_quantiles_of_all_resamples() -> None:
    result = intervals(COUNTS, OBJECTS, resamples=40_000)
    rows = [metrics.row() for metrics in every_resample(INTER, UNION)]
    for column, (low, high) in result.items():
        values = np.array([row[column] for row in rows])
        # Sampled quantiles lie between exact ones of slightly other levels.
        assert np.quantile(values, 0.02) - 1e-9 <= low <= np.quantile(values, 0.03) + 1e-9
        assert np.quantile(values, 0.97) - 1e-9 <= high <= np.quantile(values, 0.98) + 1e-9
        assert low < high


def test_more_expressions_of_an_object_do_not_narrow_it() -> None:
    """Copies of samples carry no news; drawing samples would call it certainty."""
    once = intervals(COUNTS, OBJECTS)
    many = intervals(StandardCounts(np.tile(INTER, 50), np.tile(UNION, 50)), np.tile(OBJECTS, 50))
    for column in COLUMNS:
        assert many[column] == pytest.approx(once[column])


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = intervals(COUNTS, OBJECTS, resamples=1000)
    monkeypatch.setattr("lib.evaluation.bootstrap.CELLS", 40)
    assert intervals(COUNTS, OBJECTS, resamples=1000) == whole
    assert intervals(COUNTS, OBJECTS, resamples=1000, seed=1) != whole


def test_one_object_has_no_width() -> None:
    result = intervals(COUNTS, np.zeros(7, np.int64))
    row = summarise(INTER, UNION).row()
    for column, (low, high) in result.items():
        assert low == pytest.approx(row[column])
        assert high == pytest.approx(row[column])


def test_nothing_at_all_is_nan() -> None:
    result = intervals(StandardCounts(np.zeros(2, np.int64), np.zeros(2, np.int64)), np.arange(2))
    assert np.isnan(result["oIoU"]).all()
    assert result["mIoU"] == (0.0, 0.0)


def test_paired_differences() -> None:
    """The same objects are drawn for both, so what both share cancels."""
    other = INTER + np.array([5, 0, 0, 4, 0, 0, 0])
    better = StandardCounts(other, UNION)
    result = paired_intervals(COUNTS, better, OBJECTS, resamples=40_000)
    gains = [
        {c: b.row()[c] - a.row()[c] for c in COLUMNS}
        for a, b in zip(every_resample(INTER, UNION), every_resample(other, UNION), strict=True)
    ]
    for column, (low, high) in result.items():
        values = np.array([gain[column] for gain in gains])
        assert np.quantile(values, 0.02) - 1e-9 <= low <= np.quantile(values, 0.03) + 1e-9
        assert np.quantile(values, 0.97) - 1e-9 <= high <= np.quantile(values, 0.98) + 1e-9
    same = paired_intervals(COUNTS, COUNTS, OBJECTS)
    assert set(same.values()) == {(0.0, 0.0)}
