"""Comparing two runs bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib import checkpoint
from tests.parity.same_run import differences, run_differences


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(3), torch.tensor([1, 1, 1 + 2**-23])),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(2, 1)),
        (0.1 + 0.2, 0.3),
        (1, 1.0),
        ([1, 2], [1, 2, 3]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ],
)
def test_any_difference_is_detected(one: Any, other: Any) -> None:
    result = differences({"x": [one]}, {"x": [other]})
    assert [line.split(":")[0] for line in result] == ["/x/0"]


def test_equal_values_are_equal() -> None:
    def values() -> dict[str, Any]:
        nan = torch.tensor([float("nan")])
        return {"x": [torch.arange(3.0), nan, torch.tensor(1)], "y": (1, 0.5, float("nan"), None)}

    assert differences(values(), values()) == []


def test_runs_differ_by_what_they_learned_not_by_the_clock(tmp_path: Path) -> None:
    def write(folder: Path, weight: float, seconds: float, loss: float) -> Path:
        for which in ("last", "best"):
            path = folder / "checkpoints" / f"model_{which}_lavt.pth"
            checkpoint.write_checkpoint(
                {"model": {"w": torch.tensor(weight)}, "args": seconds}, path
            )
        (folder / "models/lavt").mkdir(parents=True)
        line = json.dumps({"kind": "step", "loss": loss, "seconds_per_step": seconds})
        (folder / "models/lavt/metrics.jsonl").write_text(line + "\n")
        return folder

    run = write(tmp_path / "run", 1.0, 1.0, 0.5)
    assert run_differences(run, write(tmp_path / "same", 1.0, 2.0, 0.5)) == []
    result = run_differences(run, write(tmp_path / "other", 2.0, 1.0, 0.25))
    assert [line.split(":")[0] for line in result] == [
        "model_last_lavt.pth",
        "model_best_lavt.pth",
        "metrics.jsonl",
    ]
