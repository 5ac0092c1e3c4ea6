"""What the quickstart reaches with several seeds, and what its training costs.

    python -m benchmarks.quickstart --data quickstart/data --seeds 0 1 2
    python -m benchmarks.quickstart --data quickstart/data --options "--loss ce --epochs 2"

Trains with train.py and the Makefile's preset, and evaluates with test.py and its control. Prints a
table (Markdown) with the mean of the seeds, and writes a JSON file after each run; a run that is in
it already is not made again. FLOPs are counted as in benchmarks/speed.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils
from args import Parser
from benchmarks.pages import markdown
from benchmarks.preset import SPLITS, preset, train_and_test
from lib.errors import InputError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(prog="benchmarks.quickstart", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, help="a RefShapes root")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--options", default="", help="of train.py, in place of the preset's")
    p.add_argument("--output", default="seeds", help="folder for runs and seeds.json")
    return p.parse_args(argv)


def train_options(args: argparse.Namespace) -> list[str]:
    """Options of train.py, without the seed."""
    data = Path(args.data).resolve()
    return [*preset("QS_MODEL", data), *preset("QS_TRAIN", data), *args.options.split()]


def run(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate with a seed; its row of the table."""
    folder = Path(args.output).resolve() / f"seed{seed}"
    return train_and_test(folder, [*train_options(args), "--seed", str(seed)], control=True)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Rows as Markdown, and their mean."""
    columns = [(split, metric) for split in SPLITS for metric in ("oIoU", "mIoU")]
    numbers = [
        [
            *(row["splits"][split][metric] for split, metric in columns),
            row["control"]["val"],
            row["tflop"],
            row["seconds"],
        ]
        for row in rows.values()
    ]
    numbers.append([statistics.mean(column) for column in zip(*numbers, strict=True)])
    head = [" ".join(column) for column in columns]
    head = ["seed", *head, "control, val mIoU lower by", "TFLOP", "seconds"]
    lines = [
        [name, *(f"{n:.2f}" for n in row[:-2]), f"{row[-2]:.1f}", f"{row[-1]:.0f}"]
        for name, row in zip([*rows, "mean"], numbers, strict=True)
    ]
    return markdown(head, lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the seeds that are not in the file yet, and write it after each.

    Returns:
        the file's content: ``options``, and ``rows`` by seed.

    Raises:
        InputError: the file is of other options.
    """
    path = Path(args.output) / "seeds.json"
    record: dict[str, Any] = {"options": args.options, "rows": {}}
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["options"] != args.options:
            raise InputError(f"{path} is of other --options: give another --output")
    for seed in args.seeds:
        if str(seed) not in record["rows"]:
            record["rows"][str(seed)] = run(seed, args) | {"environment": utils.environment()}
            utils.write_json(record, path)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, print the table."""
    print(table(measure(parse(argv))["rows"]))


if __name__ == "__main__":
    utils.run_script(main)
