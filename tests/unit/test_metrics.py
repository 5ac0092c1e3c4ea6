"""IoU counts on hand-drawn masks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.evaluation.metrics import Counts, intersection_union, sample_iou, summarise


def drawn(text: str) -> Tensor:
    """A mask of rows of '#' and '.'."""
    return torch.tensor([[c == "#" for c in row] for row in text.split()]).long()


LEFT = drawn("##.. ##.. ##.. ##..")
TOP = drawn("#### #### .... ....")
NONE = drawn(".... .... .... ....")
ALL = drawn("#### #### #### ####")


@pytest.mark.parametrize(
    ("pred", "target", "inter", "union"),
    [
        (LEFT, LEFT, 8, 8),
        (LEFT, TOP, 4, 12),
        (LEFT, NONE, 0, 8),
        (NONE, LEFT, 0, 8),
        (NONE, NONE, 0, 0),
        (ALL, LEFT, 8, 16),
        (LEFT, 1 - LEFT, 0, 16),
    ],
)
def test_counts_by_hand(pred: Tensor, target: Tensor, inter: int, union: int) -> None:
    result = intersection_union(pred[None], target[None])
    assert [x.item() for x in result] == [inter, union]
    assert all(x.dtype == torch.int64 for x in result)


def test_any_non_zero_value_is_the_object() -> None:
    inter, union = intersection_union(LEFT[None] * 255, LEFT[None].bool())
    assert (inter.item(), union.item()) == (8, 8)


def test_iou_of_an_empty_union_is_zero() -> None:
    iou = sample_iou(np.array([0, 4, 8]), np.array([0, 12, 8]))
    assert iou.tolist() == [0.0, 4 / 12, 1.0]


def test_summary_by_hand() -> None:
    result = summarise([8, 4, 0, 5], [8, 12, 8, 10])  # type: ignore[arg-type]
    assert result.mIoU == pytest.approx(100 * (1 + 1 / 3 + 0 + 0.5) / 4)
    assert result.oIoU == pytest.approx(100 * 17 / 38)
    assert result.precision == {"0.5": 50.0, "0.6": 25.0, "0.7": 25.0, "0.8": 25.0, "0.9": 25.0}
    assert (result.samples, result.intersection, result.union) == (4, 17, 38)


def test_precision_counts_equality() -> None:
    result = summarise(np.array([6, 7, 9]), np.array([10, 10, 10]))
    assert [round(v, 6) for v in result.precision.values()] == [
        100.0,
        100.0,
        round(200 / 3, 6),
        round(100 / 3, 6),
        round(100 / 3, 6),
    ]


def test_sums_stay_exact_beyond_what_floats_hold() -> None:
    huge = 2**53 + 1
    result = summarise(np.array([huge, 0]), np.array([huge, 2]))
    assert result.intersection == huge
    assert result.union == huge + 2


def test_nothing_at_all_is_nan_and_null() -> None:
    result = summarise(np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert math.isnan(result.oIoU)
    assert "overall IoU = nan" in result.release_text()
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["oIoU"] is None


@pytest.mark.parametrize(("inter", "union"), [([], []), ([1], [1, 2]), ([[1]], [[1]])])
def test_impossible_arrays_are_refused(inter: list[int], union: list[int]) -> None:
    with pytest.raises(ValueError, match="need two"):
        summarise(np.array(inter), np.array(union))


def test_tables_of_processes_add_up() -> None:
    index = torch.arange(4)
    pred, target = torch.stack([LEFT, TOP, ALL, NONE]), torch.stack([TOP, TOP, LEFT, NONE])
    whole = Counts(4)
    whole.add(index, pred, target)
    parts = [Counts(4), Counts(4)]
    for rank, part in enumerate(parts):
        part.add(index[rank::2], pred[rank::2], target[rank::2])
    parts[0].table += parts[1].table
    assert torch.equal(parts[0].table, whole.table)
    inter, union = whole.of([2, 0, 1, 3])
    assert (inter.tolist(), union.tolist()) == ([8, 4, 8, 0], [16, 12, 8, 0])


@pytest.mark.parametrize("visits", [[0], [0, 1, 1], [0, 1, 2]], ids=["less", "twice", "not asked"])
def test_each_sample_must_be_visited_once(visits: list[int]) -> None:
    counts = Counts(3)
    for i in visits:
        counts.add(torch.tensor([i]), LEFT[None], LEFT[None])
    with pytest.raises(RuntimeError, match="exactly once"):
        counts.of([0, 1])
