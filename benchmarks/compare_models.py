"""Models side by side on RefShapes, with equal steps and the quickstart's preset.

    python -m benchmarks.compare_models --data quickstart/data --models lavt_one crossvlt

Trains each with train.py and evaluates it with test.py, each in a process of its own; prints a
table (Markdown) and writes a JSON file. Seconds and memory are this machine's: compare them within
one table only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils
from args import Parser
from bert import load_config
from lib.segmentation import MODELS, build_model

REPO = Path(__file__).parent.parent
SPLITS = ("val", "testA", "testB")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(
        prog="benchmarks.compare_models", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", required=True, help="a RefShapes root")
    p.add_argument("--models", nargs="+", default=["lavt_one", "crossvlt"], choices=list(MODELS))
    p.add_argument("--swin_type", default="micro")
    p.add_argument("--img_size", type=int, default=112)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--output", default="compare", help="folder for runs and compare.json")
    return p.parse_args(argv)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate a model; its row of the table."""
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = str(Path(args.data).resolve())
    bert = f"{data}/bert"
    shared = ["--model", name, "--swin_type", args.swin_type, "--img_size", str(args.img_size)]
    shared += [
        "--ape",
        str(args.img_size // 4),
        "--refer_data_root",
        str(Path(args.data).resolve()),
    ]
    shared += ["--ck_bert", bert, "--bert_tokenizer", bert, "--workers", "1"]
    recipe = ["--text_from_scratch", "--lang_layers", "all", "--loss", "dice", "--amp", "auto"]
    recipe += ["--lr", str(args.lr), "--drop_path", "0", "--epochs", str(args.epochs)]
    recipe += ["--val_expressions", "one", "--batch-size", str(args.batch_size)]
    _script(folder, "train.py", *shared, *recipe, "--model_id", name)
    _script(
        folder,
        "test.py",
        *(*shared, "--batch-size", "32", "--split", ",".join(SPLITS)),
        *("--resume", f"checkpoints/model_best_{name}.pth", "--results", f"{name}.json"),
    )
    records = [
        json.loads(line)
        for line in (folder / f"models/{name}/metrics.jsonl").open(encoding="utf-8")
    ]
    paces = [r["seconds_per_step"] for r in records if r["kind"] == "step"]
    splits = json.loads((folder / f"{name}.json").read_text())["splits"]
    model = build_model(
        name, swin_type=args.swin_type, window_size=7, text_config=load_config(bert)
    )
    return {
        "model": name,
        "splits": {split: splits[split]["all"] for split in SPLITS},
        "seconds_per_step": statistics.median(paces),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_gb": max(r["peak_memory_gb"] for r in records if r["kind"] == "epoch"),
    }


def _script(cwd: Path, script: str, *options: str) -> None:
    command = [sys.executable, str(REPO / script), *options]
    if subprocess.run(command, cwd=cwd).returncode:
        raise SystemExit(f"{script} failed; see above")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    head = [f"{split} {m}" for split in SPLITS for m in ("oIoU", "mIoU")]
    head = ["model", *head, "s/step", "parameters", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        scores = [f"{row['splits'][s][m]:.2f}" for s in SPLITS for m in ("oIoU", "mIoU")]
        size = f"{row['parameters'] / 1e6:.2f} M"
        cost = [f"{row['seconds_per_step']:.3f}", size, f"{row['peak_memory_gb']:.2f} GB"]
        lines.append("| " + " | ".join([row["model"], *scores, *cost]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all models, print the table, write the file."""
    args = parse(argv)
    rows = [run(name, args) for name in args.models]
    print(table(rows))
    record = {"rows": rows, "args": vars(args), "environment": utils.environment()}
    utils.write_json(record, Path(args.output) / "compare.json")


if __name__ == "__main__":
    utils.run_script(main)
