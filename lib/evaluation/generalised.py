"""Metrics of datasets whose expressions refer to any number of objects, or to none.

'generalised' are gRefCOCO's: gIoU, cIoU, N_acc, T_acc. 'zero_target' are Ref-ZOM's: the standard
ones of samples with a target, and Acc of those without. Loaded for such datasets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.evaluation.counts import Bools, Floats, Ints, ratio
from lib.evaluation.metrics import COLUMNS, PRECISION_AT, Metrics, sample_iou, summarise

HIGH_PRECISION_AT = (0.7, 0.8, 0.9)
C = TypeVar("C", bound="TargetCounts")


@dataclass(frozen=True)
class GeneralisedMetrics(Metrics):
    """gRefCOCO's metrics, in percent; nan where not defined.

    The base's oIoU and mIoU are named cIoU and gIoU: an IoU of no target is 1 where that is
    predicted, else 0.

    Attributes:
        N_acc: share of the samples without target that are predicted to have none.
        T_acc: share of the samples with a target that are predicted to have one.
        targets: number of samples with a target.
    """

    N_acc: float = field(kw_only=True)
    T_acc: float = field(kw_only=True)
    targets: int = field(kw_only=True)

    def row(self) -> dict[str, float]:
        """The columns of a paper's table by name."""
        columns = {f"P@{k}": v for k, v in self.precision.items()}
        return columns | self.headline() | {"N_acc": self.N_acc, "T_acc": self.T_acc}

    def headline(self) -> dict[str, float]:
        """cIoU and gIoU."""
        return {"cIoU": self.oIoU, "gIoU": self.mIoU}

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for JSON; what is not defined (nan) becomes None."""
        values = super().as_dict()
        names = {"mIoU": "gIoU", "oIoU": "cIoU"}
        out = {names.get(name, name): value for name, value in values.items()}
        return out | {"precision": _plain(self.precision)}

    def release_text(self) -> str:
        """Lines for the terminal."""
        return _lines(self.row())


@dataclass(frozen=True)
class ZeroTargetMetrics(Metrics):
    """Ref-ZOM's metrics, in percent; nan where not defined.

    Those of the base are of the samples with a target alone; ``samples`` are all.

    Attributes:
        Acc: share of the samples without target whose predicted mask has no pixel.
        targets: number of samples with a target.
    """

    Acc: float = field(kw_only=True)
    targets: int = field(kw_only=True)

    def row(self) -> dict[str, float]:
        """The columns of a paper's table by name."""
        return super().row() | {"Acc": self.Acc}

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for JSON; what is not defined (nan) becomes None."""
        return super().as_dict() | {"precision": _plain(self.precision)}

    def release_text(self) -> str:
        """Lines for the terminal."""
        return _lines(self.row())


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {k: None if v != v else v for k, v in values.items()}


def _lines(row: dict[str, float]) -> str:
    lines = [f"    {name} = {'-' if v != v else f'{v:.2f}'}" for name, v in row.items()]
    return "Final results:\n" + "\n".join(lines) + "\n"


class TargetCounts(NamedTuple):
    """Counts of N samples some of which have no target.

    Attributes:
        intersection, union: of the predicted and true masks, (N,), pixels.
        no_target: (N,), whether there is none in truth.
        predicted_no_target: (N,), whether the prediction is that there is none; for Ref-ZOM,
            whether its mask has no pixel.
    """

    intersection: Ints
    union: Ints
    no_target: Bools
    predicted_no_target: Bools

    def take(self: C, rows: npt.NDArray[Any]) -> C:
        return type(self)(*(column[rows] for column in self))


class GeneralisedCounts(TargetCounts):
    """Counts of gRefCOCO; see :class:`lib.evaluation.counts.SampleCounts`."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*(f"P@{k}" for k in HIGH_PRECISION_AT), "cIoU", "gIoU", "N_acc", "T_acc")

    def iou(self) -> Floats:
        """1 for a missing target that is predicted to be missing, 0 where one of both is."""
        found = np.where(self.predicted_no_target, 0.0, sample_iou(self.intersection, self.union))
        return np.where(self.no_target, self.predicted_no_target.astype(np.float64), found)

    def summed(self) -> tuple[Ints, Ints]:
        """What each sample adds to the sums of cIoU."""
        inter = np.where(self.predicted_no_target, 0, self.intersection)
        return inter, np.where(self.no_target & self.predicted_no_target, 0, self.union)

    def summarise(self) -> GeneralisedMetrics:
        inter, union = (int(column.sum()) for column in self.summed())
        iou, targets = self.iou(), ~self.no_target
        return GeneralisedMetrics(
            mIoU=100 * float(iou.mean()),
            oIoU=100 * inter / union if union else float("nan"),
            precision={str(k): _share(iou[targets] >= k) for k in HIGH_PRECISION_AT},
            samples=len(iou),
            intersection=inter,
            union=union,
            N_acc=_share(self.predicted_no_target[self.no_target]),
            T_acc=_share(~self.predicted_no_target[targets]),
            targets=int(targets.sum()),
        )

    def terms(self) -> Floats:
        iou, targets = self.iou(), ~self.no_target
        hits = [targets & (iou >= k) for k in HIGH_PRECISION_AT]
        right = [self.no_target & self.predicted_no_target, targets & ~self.predicted_no_target]
        columns = [np.ones(len(iou)), targets, *self.summed(), iou, *right, *hits]
        return np.column_stack(columns).astype(np.float64)

    def of_sums(self, sums: Floats) -> Floats:
        samples, targets, inter, union, iou, missing, present = sums[:, :7].T
        hits = ratio(sums[:, 7:], targets[:, None])
        rows = [ratio(inter, union), ratio(iou, samples), ratio(missing, samples - targets)]
        return 100 * np.column_stack([hits, *rows, ratio(present, targets)])


class ZeroTargetCounts(TargetCounts):
    """Counts of Ref-ZOM; see :class:`lib.evaluation.counts.SampleCounts`."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*COLUMNS, "Acc")

    def iou(self) -> Floats:
        """1 for a missing target whose mask is empty."""
        found = sample_iou(self.intersection, self.union)
        return np.where(self.no_target, self.predicted_no_target.astype(np.float64), found)

    def summarise(self) -> ZeroTargetMetrics:
        targets = ~self.no_target
        given: dict[str, Any] = {"mIoU": float("nan"), "oIoU": float("nan")}
        given |= {"precision": {str(k): float("nan") for k in PRECISION_AT}}
        given |= {"intersection": 0, "union": 0}
        if targets.any():
            given = vars(summarise(self.intersection[targets], self.union[targets]))
        return ZeroTargetMetrics(
            **{**given, "samples": len(targets)},
            Acc=_share(self.predicted_no_target[self.no_target]),
            targets=int(targets.sum()),
        )

    def terms(self) -> Floats:
        iou, targets = self.iou(), ~self.no_target
        hits = [targets & (iou >= k) for k in PRECISION_AT]
        sums = [targets * column for column in (self.intersection, self.union, iou)]
        right = self.no_target & self.predicted_no_target
        columns = [np.ones(len(iou)), targets, *sums, right, *hits]
        return np.column_stack(columns).astype(np.float64)

    def of_sums(self, sums: Floats) -> Floats:
        samples, targets, inter, union, iou, right = sums[:, :6].T
        hits = ratio(sums[:, 6:], targets[:, None])
        rows = [ratio(inter, union), ratio(iou, targets), ratio(right, samples - targets)]
        return 100 * np.column_stack([hits, *rows])


def _share(chosen: Bools) -> float:
    return 100 * float(chosen.mean()) if len(chosen) else float("nan")


KINDS: dict[str, type[GeneralisedCounts] | type[ZeroTargetCounts]] = {
    "generalised": GeneralisedCounts,
    "zero_target": ZeroTargetCounts,
}


class HeadRecorder:
    """A model as the evaluation calls it; keeps what its no-target head says.

    Args:
        model: :class:`lib.no_target.NoTargetLAVT`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.said: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The model's logits (B, 2, H, W)."""
        logits, no_target = self.model.encode(*inputs)
        self.said.append(no_target)
        return logits

    def of_samples(self, logits: Sequence[Tensor]) -> Tensor:
        """(B,) bool, whether each sample of the batch is predicted to have no target.

        Args:
            logits: of each sample's expressions, whose probabilities are averaged.
        """
        numbers = [len(each) for each in logits]
        said = torch.cat(self.said)[: sum(numbers)]  # a filled batch has more rows
        self.said.clear()
        said = said.float().softmax(1).split(numbers)
        return torch.stack([each.mean(0) for each in said]).argmax(1) == 1
