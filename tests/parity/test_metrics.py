"""Counts, IoUs, aggregates and printed text beside the release's."""

from __future__ import annotations

import torch

from lib.evaluation.metrics import Counts, intersection_union, summarise
from tests.parity import checks


def test_every_number_and_the_printed_text() -> None:
    checks.require(checks.metrics_rows())


def test_counts_are_int64() -> None:
    target, pred = checks.metric_masks()
    inter, union = intersection_union(pred, target)
    assert inter.dtype == union.dtype == torch.int64


def test_batches_in_any_order_give_the_same_metrics() -> None:
    target, pred = checks.metric_masks()
    n = len(target)
    counts = Counts(n)
    for index in torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(7):
        counts.add(index, pred[index], target[index])
    whole = summarise(*intersection_union(pred, target))
    assert summarise(*counts.of(list(range(n)))) == whole
