"""The scripts run with the quickstart's options, for benchmarks that train."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError

REPO = Path(__file__).parent.parent
SPLITS = ("val", "testA", "testB")


def preset(name: str, data: Path) -> list[str]:
    """Options that the Makefile gives the quickstart, ``QS_MODEL`` or ``QS_TRAIN``."""
    text = (REPO / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    match = re.search(rf"^{name} :=(.*)$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the Makefile defines no {name}")
    return match[1].replace("$(QS)/data", str(data)).split()


def train_and_test(
    folder: Path, data: Path, options: Sequence[str], epochs: int, training: Sequence[str] = ()
) -> dict[str, Any]:
    """Train and evaluate with the preset and some options more.

    Args:
        folder: for what the scripts write.
        data: a RefShapes root.
        options: of both scripts; they override the preset's.
        epochs: of training.
        training: options of training alone.

    Returns:
        ``splits`` {name: metrics}, ``steps``, the last ``loss``, ``seconds_per_step`` (median) and
        ``peak_memory_gb``.

    Raises:
        InputError: a script failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = [*preset("QS_MODEL", data), *options]
    own = [*training, "--epochs", str(epochs), "--model_id", "row"]
    run_script(folder, "train.py", *model, *preset("QS_TRAIN", data), *own)
    best, results = folder / "checkpoints/model_best_row.pth", folder / "results.json"
    testing = ["--split", ",".join(SPLITS), "--batch-size", "32", "--workers", "1"]
    testing += ["--resume", str(best), "--results", str(results)]
    run_script(folder, "test.py", *model, *testing)
    lines = (folder / "models/row/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r for r in records if r["kind"] == "step"]
    splits = json.loads(results.read_text(encoding="utf-8"))["splits"]
    return {
        "splits": {split: splits[split]["all"] for split in SPLITS},
        "steps": steps[-1]["step"],
        "loss": steps[-1]["loss"],
        "seconds_per_step": statistics.median(s["seconds_per_step"] for s in steps),
        "peak_memory_gb": max(r["peak_memory_gb"] for r in records if r["kind"] == "epoch"),
    }


def run_script(cwd: Path, script: str, *options: str) -> None:
    """Run a script of the project in a process of its own.

    Raises:
        InputError: it failed.
    """
    command = [sys.executable, str(REPO / script), *options]
    if subprocess.run(command, cwd=cwd).returncode:
        raise InputError(f"{script} failed in {cwd}: see above")
