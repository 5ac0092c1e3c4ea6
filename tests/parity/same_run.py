"""Whether two training runs ended in the same state, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib import checkpoint

# What a clock or the machine's memory decides, and no interruption could keep.
MEASURED = ("seconds", "seconds_per_step", "peak_memory_gb")
# Where a run lives and how it was continued; it takes no part in the training.
UNCOMPARED = ("args",)


def run_differences(run: Path, other: Path, model_id: str = "lavt") -> list[str]:
    """Everything in which two runs differ: weights, optimizer, schedule, best score, metrics lines.

    Args:
        run: folder that the one was started in, with ``checkpoints/`` and ``models/``.
        other: folder of the other.
        model_id: of both.

    Returns:
        A line for each difference, none where the runs are equal.

    Raises:
        InputError: a checkpoint is missing or damaged.
    """
    result = []
    for which in ("last", "best"):
        name = f"model_{which}_{model_id}.pth"
        one, two = (_compared(folder / "checkpoints" / name) for folder in (run, other))
        result += [f"{name}: {where}" for where in differences(one, two)]
    lines, others = (metrics_lines(folder / "models" / model_id) for folder in (run, other))
    return result + [f"metrics.jsonl: {where}" for where in differences(lines, others)]


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, without what is measured anew each time."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values differ; tensors and floats are compared bit by bit."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: other keys, or in another order"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return [] if same and torch.equal(_bytes(one), _bytes(other)) else [f"{where}: tensors"]
    # repr, because it tells every float from every other, and nan is nan.
    return [] if repr(one) == repr(other) else [f"{where}: {one!r} and {other!r}"]


def _compared(path: Path) -> dict[str, Any]:
    return {k: v for k, v in checkpoint.read_checkpoint(path).items() if k not in UNCOMPARED}


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
