"""IoU metrics of referring segmentation, from exact integer counts (LAVT, Sec. 4.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = (*(f"P@{k}" for k in PRECISION_AT), "oIoU", "mIoU")


def intersection_union(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel counts of each sample.

    Args:
        pred, target: (B, H, W), non-zero = object.

    Returns:
        Intersection and union, (B,) int64 each: exact for any size.
    """
    pred, target = pred.flatten(1) != 0, target.flatten(1) != 0
    return (pred & target).sum(1), (pred | target).sum(1)


def sample_iou(inter: np.ndarray, union: np.ndarray) -> np.ndarray:
    """I / U of each sample, (N,) float64; 0 if the union is empty."""
    return np.divide(inter, union, out=np.zeros(len(inter)), where=union > 0)


@dataclass(frozen=True)
class Metrics:
    """The row of a paper's table, in percent.

    Attributes:
        mIoU: mean of the samples' IoUs.
        oIoU: sum of intersections over sum of unions; nan if every union is empty.
        precision: percentage of samples with an IoU of at least K, by K.
        samples: number of samples.
        intersection, union: sums, pixels.
    """

    mIoU: float
    oIoU: float
    precision: dict[str, float]
    samples: int
    intersection: int
    union: int

    def row(self) -> dict[str, float]:
        """The columns of a paper's table by name."""
        columns = {f"P@{k}": v for k, v in self.precision.items()}
        return {**columns, "oIoU": self.oIoU, "mIoU": self.mIoU}

    def headline(self) -> dict[str, float]:
        """What a run's log shows; the best checkpoint is the best in the first."""
        return {"oIoU": self.oIoU, "mIoU": self.mIoU}

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for JSON; what is not defined (nan) becomes None."""
        return {k: None if v != v else v for k, v in asdict(self).items()}

    def release_text(self) -> str:
        """The lines that the release prints, character by character."""
        lines = [f"    precision@{k} = {v:.2f}" for k, v in self.precision.items()]
        lines.append(f"    overall IoU = {self.oIoU:.2f}")
        return f"Final results:\nMean IoU is {self.mIoU:.2f}\n\n" + "\n".join(lines) + "\n"


def summarise(inter: np.ndarray | Tensor, union: np.ndarray | Tensor) -> Metrics:
    """Metrics of a split.

    Args:
        inter: (N,) integer, intersection of each sample, pixels.
        union: (N,) integer, union of each sample, pixels.

    Returns:
        The metrics, in percent.

    Raises:
        ValueError: no samples, or the shapes differ.
    """
    inter, union = np.asarray(inter, dtype=np.int64), np.asarray(union, dtype=np.int64)
    if inter.shape != union.shape or inter.ndim != 1 or not len(inter):
        raise ValueError(f"need two (N,) arrays, N > 0: got {inter.shape} and {union.shape}")
    iou = sample_iou(inter, union)
    total_inter, total_union = int(inter.sum()), int(union.sum())
    return Metrics(
        mIoU=100 * float(iou.mean()),
        oIoU=100 * total_inter / total_union if total_union else float("nan"),
        precision={str(k): 100 * float((iou >= k).mean()) for k in PRECISION_AT},
        samples=len(iou),
        intersection=total_inter,
        union=total_union,
    )


class Counts:
    """Intersection, union and visits of every sample of a dataset, summed over processes.

    Each process counts its own samples; the sum of the tables of all processes is the table of
    the split, exactly and in the dataset's order.

    Args:
        size: number of samples of the dataset.
        device: where to count.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        # Intersection, union, whether the prediction is that there is no target, visits.
        self.table = torch.zeros(size, 4, dtype=torch.int64, device=device)

    def add(
        self, index: Tensor, pred: Tensor, target: Tensor, no_target: Tensor | None = None
    ) -> None:
        """Count a batch: index (B,) positions in the dataset, pred and target (B, H, W).

        ``no_target`` (B,): whether the prediction is that there is none.
        """
        inter, union = intersection_union(pred, target)
        none = torch.zeros_like(inter) if no_target is None else no_target
        rows = torch.stack([inter, union, none.long(), torch.ones_like(inter)], dim=1)
        self.table.index_add_(0, index, rows)

    def put(self, index: int, inter: int, union: int, no_target: bool = False) -> None:
        """Enter the counts of one sample."""
        self.table[index] += torch.tensor([inter, union, no_target, 1], device=self.table.device)

    def of(self, expected: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Intersection and union of the expected samples, in that order.

        Raises:
            RuntimeError: a sample was not evaluated exactly once, or another one was evaluated.
        """
        table = self.table.cpu().numpy()
        if not (table[expected, 3] == 1).all() or table[:, 3].sum() != len(expected):
            raise RuntimeError("evaluation did not visit each sample exactly once")
        return table[expected, 0], table[expected, 1]

    def no_target(self, expected: list[int]) -> npt.NDArray[np.bool_]:
        """Whether the prediction of each expected sample is that there is no target."""
        return self.table.cpu().numpy()[expected, 2] > 0
