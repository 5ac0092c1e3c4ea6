"""All numbers of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from data.dataset_refer_bert import OtherObjectExpressions, ReferDataset
from data.loaders import one_expression_per_reference
from lib.evaluation.bootstrap import Intervals, intervals
from lib.evaluation.counts import SampleCounts
from lib.evaluation.evaluator import EvalConfig, OnPrediction, evaluate
from lib.evaluation.metrics import Metrics
from utils import DistInfo


@dataclass(frozen=True)
class Summary:
    """A split's numbers.

    Attributes:
        rows: metrics by name: 'all', and 'kind: …' if kinds are known.
        intervals: 95 % confidence intervals of 'all', over objects.
        objects: number of objects.
    """

    rows: dict[str, Metrics]
    intervals: Intervals
    objects: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each row's metrics; 'all' has the intervals, null if there is none."""
        out = {name: metrics.as_dict() for name, metrics in self.rows.items()}
        ends = {c: None if low != low else [low, high] for c, (low, high) in self.intervals.items()}
        out["all"] |= {"objects": self.objects, "bootstrap_95": ends}
        return out


def summary(counts: SampleCounts, objects: Sequence[int], kinds: Sequence[str | None]) -> Summary:
    """Summarise a split.

    Args:
        counts: of N samples.
        objects: which object each of the N samples is about.
        kinds: of each sample's expression; None if unknown.
    """
    rows = {"all": counts.summarise()}
    of_sample = np.array([kind or "" for kind in kinds])
    for kind in sorted({kind for kind in kinds if kind}):
        chosen = of_sample == kind
        rows[f"kind: {kind}"] = counts.take(chosen).summarise()
    which = np.asarray(objects, dtype=np.int64)
    return Summary(rows, intervals(counts, which), len(np.unique(which)))


def evaluate_split(
    model: nn.Module,
    dataset: ReferDataset,
    config: EvalConfig,
    info: DistInfo,
    *,
    one_expression_seed: int | None = None,
    control: bool = False,
    on_prediction: OnPrediction | None = None,
) -> Summary:
    """All numbers of a split.

    Args:
        model, dataset, config, info, on_prediction: as for
            :func:`lib.evaluation.evaluator.evaluate`.
        one_expression_seed: if given, one expression per reference is drawn with this seed.
        control: also evaluate each object with the expression of another object in its image.
    """
    samples = list(range(len(dataset)))
    if one_expression_seed is not None:
        samples = one_expression_per_reference(dataset.samples_of_ref, one_expression_seed, 0)
    counts = evaluate(model, dataset, samples, config, info, on_prediction)
    kinds = dataset.sample_kinds()
    result = summary(counts, _objects(dataset, samples), [kinds[i] for i in samples])
    if control:
        others = OtherObjectExpressions(dataset)
        if chosen := sorted(set(samples) & set(others.indices)):
            same = np.isin(samples, chosen)
            result.rows["same, right sentence"] = counts.take(same).summarise()
            wrong = evaluate(model, others, chosen, config, info)
            result.rows["same, sentence of another object"] = wrong.summarise()
    return result


def _objects(dataset: ReferDataset, samples: Sequence[int]) -> list[int]:
    """A number for the object of each sample: references to the same annotations share it."""
    records = [dataset.records[i] for i in samples]
    keys = [tuple(record.ann_ids) or (-1, record.ref_id) for record in records]
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    return [number[key] for key in keys]
