"""Every ablation of LAVT, trained and evaluated on RefShapes: a micro Swin of 112 x 112 pixels.

    python -m data.refshapes --out quickstart/data --level easy
    OMP_NUM_THREADS=1 python -m benchmarks.ablations --data quickstart/data --work ablations

Each row is train.py and test.py with the same options, its own, and an equal budget. Rows are
written as they are done, so that an interrupted benchmark resumes. The table of docs/ablations.md
is made from the file of results; ``--rows`` without a name does that alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import utils
from args import Parser
from benchmarks.pages import markdown, put_between
from benchmarks.preset import REPO, SPLITS, train_and_test
from lib.errors import InputError

RESULTS = REPO / "benchmarks/results/ablations_cpu.json"
PAGE = REPO / "docs/ablations.md"
MARKS = ("<!-- table: python -m benchmarks.ablations -->", "<!-- end -->")

# What the rows have in common. It does not follow the quickstart: finished rows are of it.
OPTIONS = (
    "--model lavt_one --swin_type micro --img_size 112 --ape 28 "
    "--refer_data_root DATA --ck_bert DATA/bert --bert_tokenizer DATA/bert "
    "--text_from_scratch --lang_layers all --loss dice --lr 1e-3 --drop_path 0 --batch-size 16 "
    "--workers 1 --amp auto"
)
# The name of a row is its options; the text says what they change.
PUBLISHED = "(published)"
ROWS = {
    PUBLISHED: "LAVT",
    "--seed 1": "LAVT, another seed",
    "--seed 2": "LAVT, another seed",
    "--lang_path off": "V' = V: no fused feature enters the next stage",
    "--gate off": "V' = V + F",
    "--fusion concat": "[V; mean word] in place of PWAM",
    "--fusion add": "V + mean word in place of PWAM",
    "--fusion mul": "V * mean word in place of PWAM",
    "--lang_path off --fusion concat": "neither pathway nor PWAM",
    "--gate none": "no activation in the gate",
    "--gate sigmoid": "Sigmoid in the gate",
    "--gate relu": "ReLU in the gate",
    "--gate gelu": "GELU in the gate",
    "--pwam_norm none": "no norm in PWAM",
    "--pwam_norm layer": "LayerNorm in PWAM",
    "--pwam_norm batch": "BatchNorm in PWAM",
    "--decoder_features V": "the decoder sees V', not F",
    "--pwam_combine add": "V + gathered words, not their product",
    "--pwam_combine words": "gathered words alone",
    "--pwam_attention sigmoid": "words do not compete",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(
        prog="python -m benchmarks.ablations",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", default="quickstart/data", help="a RefShapes root")
    p.add_argument("--work", default="ablations", help="folder for the runs")
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON file, continued")
    p.add_argument("--page", type=Path, default=PAGE, help="Markdown file that has the table")
    p.add_argument("--epochs", type=int, default=1, help="budget of each row")
    p.add_argument("--rows", nargs="*", default=list(ROWS), metavar="'OPTIONS'", help="which rows")
    args = p.parse_args(argv)
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        raise InputError(f"--rows {unknown[0]}: choose of {', '.join(map(repr, ROWS))}")
    return args


def run_row(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row.

    Raises:
        InputError: a script failed.
    """
    own = [] if row == PUBLISHED else row.split()
    folder = Path(args.work).resolve() / re.sub(r"\W+", "_", row).strip("_")
    data = Path(args.data).resolve()
    options = [*OPTIONS.replace("DATA", str(data)).split(), *own, "--epochs", str(args.epochs)]
    result = train_and_test(folder, options)
    (folder / "checkpoints/model_last_row.pth").unlink()
    return {**result, "environment": utils.environment()}


def load(path: Path, epochs: int) -> dict[str, Any]:
    """The results so far.

    Raises:
        InputError: they are of another budget.
    """
    if not path.is_file():
        return {"epochs": epochs, "rows": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["epochs"] != epochs:
        raise InputError(
            f"{path} is of {record['epochs']} epochs a row, not {epochs}: give another by --results"
        )
    return record


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows that are done as Markdown, and their distance from the published network's val."""
    base = rows.get(PUBLISHED)
    head = [
        "options",
        "what",
        *(f"{s} {m}" for s in SPLITS for m in ("oIoU", "mIoU")),
        "val mIoU, difference",
    ]
    lines = []
    for name, what in ROWS.items():
        if name not in rows:
            continue
        of = rows[name]["splits"]
        scores = [f"{of[s][m]:.2f}" for s in SPLITS for m in ("oIoU", "mIoU")]
        apart = of["val"]["mIoU"] - base["splits"]["val"]["mIoU"] if base else None
        shown = "" if apart is None or name == PUBLISHED else f"{apart:+.2f}"
        shown_name = name if name == PUBLISHED else f"`{name}`"
        lines.append([shown_name, what, *scores, shown])
    text = markdown(head, lines)
    missing = [f"`{name}`" for name in ROWS if name not in rows]
    return f"{text}\n\nNot measured yet: {', '.join(missing)}." if missing else text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rows that are not done yet; put the table into the page, and print it."""
    args = parse(argv)
    record = load(args.results, args.epochs)
    waiting = [row for row in args.rows if row not in record["rows"]]
    for i, row in enumerate(waiting):
        print(f"row {i + 1} of {len(waiting)}: {row}", flush=True)
        record["rows"][row] = run_row(row, args)
        utils.write_json(record, args.results)
    put_between(args.page, MARKS, table(record["rows"]))
    print(table(record["rows"]))


if __name__ == "__main__":
    utils.run_script(main)
