"""Which group a sample is in, and what a group's mean and interval are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.record_files import rle
from tools.report.breakdown import breakdowns, locations, mean_with_interval, object_codes
from tools.report.records import Prediction, Rle

NO_MASK = Rle(10, 10, "T3")  # one run of 100 pixels outside


def prediction(**changes: Any) -> Prediction:
    """A sample; only what is grouped by matters."""
    base = Prediction(
        split="val",
        ref_id=1,
        ann_ids=(1,),
        image_id=1,
        category_id=1,
        sent_ids=(1,),
        sentence="dog",
        category="dog",
        file_name="a.jpg",
        height=10,
        width=10,
        same_category=0,
        iou=0.0,
        intersection=0,
        union=0,
        score=0.0,
        segmentation=NO_MASK,
        truth=NO_MASK,
        protocol="standard",
    )
    return dataclasses.replace(base, **changes)


def labels_of(key: str, **changes: Any) -> list[str]:
    """The groups of a sample."""
    result = next(b for b in breakdowns([prediction(**changes)]) if b.key == key)
    assert result.members.shape == (1, len(result.labels))
    return [label for label, member in zip(result.labels, result.members[0], strict=True) if member]


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("", "1"),
        ("dog", "1"),
        ("the   left dog", "3"),
        ("a b c d e f", "6-7"),
        ("a b c d e f g", "6-7"),
        ("a b c d e f g h", "8-10"),
        ("word " * 15, "11-15"),
        ("word " * 16, "16+"),
        ("left dog | the dog", "4"),  # averaged expressions
    ],
)
def test_length(sentence: str, label: str) -> None:
    assert labels_of("length", sentence=sentence) == [label]


@pytest.mark.parametrize(
    ("pixels", "label"),
    [(0, "< 1"), (1, "1-2.5"), (2, "1-2.5"), (3, "2.5-5"), (5, "5-10"), (40, "≥ 40"), (99, "≥ 40")],
)
def test_size(pixels: int, label: str) -> None:
    counts = rle(np.arange(100).reshape(10, 10) < pixels)["counts"]
    assert labels_of("size", truth=Rle(10, 10, counts)) == [label]


@pytest.mark.parametrize(
    ("sentence", "result"),
    [
        ("man", set()),
        ("LEFTMOST man", {"left"}),
        ("dog,bottom-right.", {"bottom", "right"}),
        ("brightly lit bleft", set()),
        ("guy standing up far from us", set()),
        ("girl in the foreground between men", {"front", "middle"}),
        ("слева 左", set()),
    ],
)
def test_location(sentence: str, result: set[str]) -> None:
    assert locations(sentence) == result
    expected = {"any", *result} if result else {"none"}
    assert set(labels_of("location", sentence=sentence)) == expected


@pytest.mark.parametrize(("others", "label"), [(0, "0"), (4, "4"), (5, "5+"), (70, "5+")])
def test_same_category(others: int, label: str) -> None:
    assert labels_of("same_category", same_category=others) == [label]


def test_interval_of_independent_samples_is_students() -> None:
    values = np.random.default_rng(0).random(40)
    mean = mean_with_interval(values, np.arange(40))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert (mean.n, mean.value) == (40, values.mean())
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=1e-12)


def test_expressions_of_one_object_count_once() -> None:
    values, objects = np.random.default_rng(0).random(40), np.arange(40)
    once = mean_with_interval(values, objects)
    thrice = mean_with_interval(np.repeat(values, 3), np.repeat(objects, 3))
    assert thrice.n == 120
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_interval_needs_two_objects() -> None:
    none = mean_with_interval(np.array([]), np.array([], dtype=np.int64))
    one = mean_with_interval(np.array([0.2, 0.4]), np.array([7, 7]))
    assert (none.n, one.n, one.value) == (0, 2, pytest.approx(0.3))
    assert np.isnan([none.value, none.low, one.low, one.high]).all()


def test_objects_of_two_splits_differ() -> None:
    samples = [prediction(), prediction(sent_ids=(2,)), prediction(split="testA")]
    first, second, other = object_codes(samples).tolist()
    assert first == second != other
