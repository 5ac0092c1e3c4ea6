"""What evaluation computes, in plain numpy and float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def resized(logits: Floats, height: int, width: int) -> Floats:
    """Bilinear resize (..., S, S) -> (..., height, width), pixel centres at halves."""
    for axis, size in ((-2, height), (-1, width)):
        length = logits.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (at - low)[:, None] if axis == -2 else at - low
        a, b = np.take(logits, low, axis), np.take(logits, high, axis)
        logits = a * (1 - share) + b * share
    return logits


def averaged(logits: Floats) -> Floats:
    """Probability (H, W) of the object, of (K, 2, H, W)."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e[:, 1] / e.sum(1)).mean(0)


def counts(a: Bools, b: Bools) -> tuple[int, int]:
    return int((a & b).sum()), int((a | b).sum())


Sample = tuple[int, int, bool, bool]  # I, U, no target in truth, no target predicted


def divided(a: float, b: float) -> float:
    return 100 * a / b if b else math.nan


def by_table(samples: list[Sample]) -> dict[str, float]:
    """gRefCOCO's metrics record by record, as the table of its evaluation has them."""
    tp = fn = fp = tn = 0
    inter_sum = union_sum = 0
    ious, of_targets = [], []
    for inter, union, no_target, predicted_none in samples:
        if no_target and predicted_none:
            tp, iou = tp + 1, 1.0
        elif no_target:
            fn, iou = fn + 1, 0.0
            union_sum += union
        elif predicted_none:
            fp, iou = fp + 1, 0.0
            union_sum += union
        else:
            tn, iou = tn + 1, inter / union if union else 0.0
            inter_sum, union_sum = inter_sum + inter, union_sum + union
        ious.append(iou)
        of_targets += [] if no_target else [iou]
    row = {
        f"P@{k}": divided(sum(i >= k for i in of_targets), len(of_targets)) for k in (0.7, 0.8, 0.9)
    }
    return row | {
        "cIoU": divided(inter_sum, union_sum),
        "gIoU": divided(sum(ious), len(ious)),
        "N_acc": divided(tp, tp + fn),
        "T_acc": divided(tn, tn + fp),
    }


def by_hand_zero(samples: list[Sample]) -> dict[str, float]:
    """Ref-ZOM's: samples without target are in Acc alone."""
    targets = [(i, u) for i, u, none, _ in samples if not none]
    empty = [predicted for _, _, none, predicted in samples if none]
    ious = [i / u if u else 0.0 for i, u in targets]
    row = {
        f"P@{k}": divided(sum(i >= k for i in ious), len(ious)) for k in (0.5, 0.6, 0.7, 0.8, 0.9)
    }
    row |= {"oIoU": divided(sum(i for i, _ in targets), sum(u for _, u in targets))}
    row |= {"mIoU": divided(sum(ious), len(ious)), "Acc": divided(sum(empty), len(empty))}
    return row
