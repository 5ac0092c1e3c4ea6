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

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from args import model_options, parse_train
from lib.errors import InputError
from lib.segmentation import build_model
from lib.training import optim
from tools.quickstart_report import RIGHT, WRONG

REPO = Path(__file__).parent.parent
SPLITS = ("val", "testA", "testB")


def preset(name: str, data: Path) -> list[str]:
    """Options that the Makefile gives the quickstart, ``QS_MODEL`` or ``QS_TRAIN``."""
    text = (REPO / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    match = re.search(rf"^{name} :=(.*)$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the Makefile defines no {name}")
    return match[1].replace("$(QS)/data", str(data)).split()


def step_flops(options: Sequence[str]) -> int:
    """FLOPs of a training step as PyTorch counts them: 2 per multiply-add, forward and backward.

    Args:
        options: of train.py. Expressions fill ``--max_tokens``, as padding does.
    """
    args, count = parse_train(options), 2
    with torch.device("meta"):
        model = build_model(args.model, **model_options(args)).train()
        image = torch.empty(count, 3, args.img_size, args.img_size)
        words = torch.ones(count, args.max_tokens, dtype=torch.long)
    groups = optim.parameter_groups(model, args.weight_decay, args.lang_layers)
    optim.freeze_unused(model, groups)
    # Plain attention is made of matmuls, which every PyTorch counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(image, words, words).sum().backward()
    return counter.get_total_flops() * args.batch_size * args.accumulate // count


def train_and_test(
    folder: Path, options: Sequence[str], *, control: bool = False
) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        folder: for what the scripts write.
        options: of train.py; test.py takes the model's from the checkpoint.
        control: whether to evaluate with another object's expression, too.

    Returns:
        ``splits`` {name: metrics}, ``steps``, ``tflop`` of all steps, the last ``loss``,
        ``seconds`` of the epochs, ``seconds_per_step`` (median), ``peak_memory_gb``, and with
        ``control`` the same-named {split: by how many points of mIoU it is lower}, of splits that
        have images with several objects.

    Raises:
        InputError: a script failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flops = step_flops(options)
    run_script(folder, "train.py", *options, "--model_id", "row")
    best, results = folder / "checkpoints/model_best_row.pth", folder / "results.json"
    testing = ["--split", ",".join(SPLITS), "--batch-size", "32", "--workers", "1"]
    testing += ["--resume", str(best), "--results", str(results)] + ["--control"] * control
    root = parse_train(options).refer_data_root
    run_script(folder, "test.py", "--refer_data_root", root, *testing)
    lines = (folder / "models/row/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps, epochs = ([r for r in records if r["kind"] == kind] for kind in ("step", "epoch"))
    splits = json.loads(results.read_text(encoding="utf-8"))["splits"]
    result = {
        "splits": {split: splits[split]["all"] for split in SPLITS},
        "steps": steps[-1]["step"],
        "tflop": flops * steps[-1]["step"] / 1e12,
        "loss": steps[-1]["loss"],
        "seconds": sum(e["seconds"] for e in epochs),
        "seconds_per_step": statistics.median(s["seconds_per_step"] for s in steps),
        "peak_memory_gb": max(e["peak_memory_gb"] for e in epochs),
    }
    if control:
        result["control"] = {
            split: rows[RIGHT]["mIoU"] - rows[WRONG]["mIoU"]
            for split, rows in splits.items()
            if RIGHT in rows and WRONG in rows
        }
    return result


def run_script(cwd: Path, script: str, *options: str) -> None:
    """Run a script of the project in a process of its own.

    Raises:
        InputError: it failed.
    """
    command = [sys.executable, str(REPO / script), *options]
    if subprocess.run(command, cwd=cwd).returncode:
        raise InputError(f"{script} failed in {cwd}: see above")
