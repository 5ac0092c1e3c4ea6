"""Models side by side on RefShapes, with equal steps, the quickstart's preset and a micro Swin.

    python -m benchmarks.compare_models --data quickstart/data --models lavt_one crossvlt

Runs benchmarks/quickstart.py for each model; an interrupted benchmark goes on. Prints a table
(Markdown) of means over the seeds and writes a JSON file. Seconds and memory are this machine's:
compare them within one table only.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from args import Parser, model_options, parse_train
from benchmarks import quickstart
from benchmarks.pages import markdown
from benchmarks.preset import SPLITS
from lib.segmentation import MODELS, build_model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(
        prog="benchmarks.compare_models", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", required=True, help="a RefShapes root")
    p.add_argument("--models", nargs="+", default=["lavt_one", "crossvlt"], choices=list(MODELS))
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--output", default="compare", help="folder for runs and compare.json")
    return p.parse_args(argv)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate a model with each seed.

    Returns:
        ``parameters``, a number, and ``rows`` as benchmarks/quickstart.py writes them.
    """
    # CrossVLT validates over every expression by default, and its epochs would take longer.
    # The quickstart's Swin is too narrow for its heads.
    own = f"--model {name} --swin_type micro --val_expressions one --epochs {args.epochs}"
    output = ["--output", str(Path(args.output) / name)]
    seeds = ["--seeds", *map(str, args.seeds)]
    one = quickstart.parse(["--data", args.data, *seeds, f"--options={own}", *output])
    rows = quickstart.measure(one)["rows"]
    with torch.device("meta"):
        model = build_model(name, **model_options(parse_train(quickstart.train_options(one))))
    return {"parameters": sum(p.numel() for p in model.parameters()), "rows": rows}


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Means over the seeds as Markdown."""
    columns = [(split, metric) for split in SPLITS for metric in ("oIoU", "mIoU")]
    head = ["model", "seeds", *(" ".join(column) for column in columns)]
    head += ["control, val mIoU lower by", "TFLOP", "s/step", "parameters", "peak memory"]
    lines = []
    for name, model in models.items():
        rows = list(model["rows"].values())
        numbers = [[row["splits"][s][m] for row in rows] for s, m in columns]
        numbers += [[row["control"]["val"] for row in rows]]
        tflop, seconds, memory = (
            statistics.mean(row[key] for row in rows)
            for key in ("tflop", "seconds_per_step", "peak_memory_gb")
        )
        cost = [f"{tflop:.1f}", f"{seconds:.3f}", f"{model['parameters'] / 1e6:.2f} M"]
        means = [f"{statistics.mean(each):.2f}" for each in numbers]
        lines.append([name, str(len(rows)), *means, *cost, f"{memory:.2f} GB"])
    return markdown(head, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all models, write the file, print the table."""
    args = parse(argv)
    models = {name: run(name, args) for name in args.models}
    record = {"models": models, "args": vars(args), "environment": utils.environment()}
    utils.write_json(record, Path(args.output) / "compare.json")
    print(table(models))


if __name__ == "__main__":
    utils.run_script(main)
