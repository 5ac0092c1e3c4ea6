"""Models side by side on RefShapes, with equal steps, the quickstart's preset and a micro Swin.

    python -m benchmarks.compare_models --data quickstart/data --models lavt_one crossvlt

Trains each with train.py and evaluates it with test.py, each in a process of its own; prints a
table (Markdown) and writes a JSON file. Seconds and memory are this machine's: compare them within
one table only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from args import Parser, model_options, parse_train
from benchmarks.pages import markdown
from benchmarks.preset import SPLITS, preset, train_and_test
from lib.segmentation import MODELS, build_model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(
        prog="benchmarks.compare_models", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", required=True, help="a RefShapes root")
    p.add_argument("--models", nargs="+", default=["lavt_one", "crossvlt"], choices=list(MODELS))
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--output", default="compare", help="folder for runs and compare.json")
    return p.parse_args(argv)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate a model; its row of the table."""
    data = Path(args.data).resolve()
    # CrossVLT validates over every expression by default, and its epochs would take longer.
    # The quickstart's Swin is too narrow for its heads.
    own = ["--model", name, "--swin_type", "micro", "--val_expressions", "one"]
    own += ["--epochs", str(args.epochs)]
    options = [*preset("QS_MODEL", data), *preset("QS_TRAIN", data), *own]
    result = train_and_test(Path(args.output).resolve() / name, options)
    with torch.device("meta"):
        model = build_model(name, **model_options(parse_train(options)))
    return {"model": name, **result, "parameters": sum(p.numel() for p in model.parameters())}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    head = [f"{split} {m}" for split in SPLITS for m in ("oIoU", "mIoU")]
    lines = []
    for row in rows:
        scores = [f"{row['splits'][s][m]:.2f}" for s in SPLITS for m in ("oIoU", "mIoU")]
        size = f"{row['parameters'] / 1e6:.2f} M"
        cost = [
            f"{row['tflop']:.1f}",
            f"{row['seconds_per_step']:.3f}",
            size,
            f"{row['peak_memory_gb']:.2f} GB",
        ]
        lines.append([row["model"], *scores, *cost])
    return markdown(["model", *head, "TFLOP", "s/step", "parameters", "peak memory"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all models, write the file, print the table."""
    args = parse(argv)
    rows = [run(name, args) for name in args.models]
    record = {"rows": rows, "args": vars(args), "environment": utils.environment()}
    utils.write_json(record, Path(args.output) / "compare.json")
    print(table(rows))


if __name__ == "__main__":
    utils.run_script(main)
