"""All speed benchmarks of this machine, in one result file and the tables of docs/speed.md.

    python -m benchmarks.bench --data quickstart/data     # or: make bench
    python -m benchmarks.bench --report benchmarks/results/FILE.json

Runs benchmarks.speed, benchmarks.evaluation and benchmarks.data, writes
``benchmarks/results/<machine>.json``, and puts its tables between the marks in docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from args import Parser
from benchmarks import data, evaluation, speed
from benchmarks.pages import put_between

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
BASE = ("--swin_type", "base", "--window", "12", "--expressions", "24", "--rounds", "2")
MARKS = ("<!-- table: make bench -->", "<!-- end of make bench -->")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's flags."""
    p = Parser(prog="benchmarks.bench", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="quickstart/data", help="a REFER root with a bert/ folder")
    p.add_argument("--quick", action="store_true", help="fewer repeats")
    p.add_argument("--report", metavar="JSON", help="only put its tables into the page")
    return p.parse_args(argv)


def tables(record: dict[str, Any]) -> str:
    """The tables of speed and evaluation."""
    rows = record["speed"]["rows"]
    host = speed.summary({**record["speed"], "rows": [{**r, "profile": None} for r in rows]})
    return f"\n{host}\n\n{evaluation.table(record['evaluation'])}\n"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all three and join what they wrote."""
    bert = str(Path(args.data) / "bert")
    quick = ["--quick"] if args.quick else []
    common = ["--refer_data_root", args.data]
    parts = {
        "speed": (speed.main, ["--train", "--plain", "--profile", *quick]),
        "evaluation": (evaluation.main, [*common, "--ck_bert", bert, *BASE]),
        "data": (data.main, [*common, "--bert_tokenizer", bert]),
    }
    record = {}
    for name, (run, argv) in parts.items():
        path = folder / f"{name}.json"
        run([*argv, "--output", str(path)])
        record[name] = json.loads(path.read_text(encoding="utf-8"))
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file, fill in the page."""
    args = parse(argv)
    if args.report:
        record = json.loads(Path(args.report).read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = measure(args, Path(folder))
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        host, threads = record["speed"]["machine"]["cpu"], record["speed"]["rows"][0]["threads"]
        name = gpu or f"{host} {threads} threads"
        path = HERE / "results" / f"{speed.slug(name)}.json"
        utils.write_json(record, path)
        print(f"written: {path}")
    put_between(PAGE, MARKS, tables(record))


if __name__ == "__main__":
    utils.run_script(main)
