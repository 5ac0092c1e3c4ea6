"""Every ablation of LAVT, trained and evaluated on RefShapes with the quickstart's preset.

    python -m data.refshapes --out quickstart/data --level easy
    OMP_NUM_THREADS=1 python -m benchmarks.ablations --data quickstart/data --work ablations

Each row is train.py and test.py with the quickstart's options, its own, and an equal budget that is
smaller than the quickstart's. Rows are written as they are done, so that an interrupted benchmark
goes on where it was. The table of docs/ablations.md is made from the file of results; ``--rows``
without a name does that alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import utils
from args import Parser
from lib.errors import InputError

REPO = Path(__file__).parent.parent
RESULTS = REPO / "benchmarks/results/ablations_cpu.json"
PAGE = REPO / "docs/ablations.md"
MARKS = ("<!-- table: python -m benchmarks.ablations -->", "<!-- end -->")
SPLITS = ("val", "testA", "testB")

# The name of a row is its options; the text says what they change.
PUBLISHED = "(published)"
ROWS = {
    PUBLISHED: "LAVT",
    "--seed 1": "LAVT, another seed",
    "--seed 2": "LAVT, another seed",
    "--lang_path off": "V' = V: no fused feature goes on to the next stage",
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


def preset(name: str, data: Path) -> list[str]:
    """Options that the Makefile gives the quickstart, ``QS_MODEL`` or ``QS_TRAIN``."""
    text = (REPO / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(rf"^{name} :=(.*)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the Makefile defines no {name}")
    return found[1].replace("$(QS)/data", str(data)).split()


def run_row(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row.

    Raises:
        InputError: a script failed.
    """
    data = Path(args.data).resolve()
    own = [] if row == PUBLISHED else row.split()
    folder = Path(args.work).resolve() / re.sub(r"\W+", "_", row).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    model = [*preset("QS_MODEL", data), *own]
    train = [*preset("QS_TRAIN", data), "--epochs", str(args.epochs), "--model_id", "row"]
    _script(folder, "train.py", *model, *train)
    best = folder / "checkpoints/model_best_row.pth"
    evaluation = ["--split", ",".join(SPLITS), "--batch-size", "32", "--workers", "1"]
    results = folder / "results.json"
    _script(
        folder, "test.py", *model, *evaluation, "--resume", str(best), "--results", str(results)
    )
    (folder / "checkpoints/model_last_row.pth").unlink()
    lines = (folder / "models/row/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if r["kind"] == "step"]
    splits = json.loads(results.read_text(encoding="utf-8"))["splits"]
    return {
        "splits": {split: splits[split]["all"] for split in SPLITS},
        "steps": steps[-1]["step"],
        "loss": steps[-1]["loss"],
        "seconds_per_step": statistics.median(s["seconds_per_step"] for s in steps),
        "environment": utils.environment(),
    }


def _script(cwd: Path, script: str, *options: str) -> None:
    command = [sys.executable, str(REPO / script), *options]
    if subprocess.run(command, cwd=cwd).returncode:
        raise InputError(f"{script} failed in {cwd}: see above")


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
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, what in ROWS.items():
        if name not in rows:
            continue
        of = rows[name]["splits"]
        scores = [f"{of[s][m]:.2f}" for s in SPLITS for m in ("oIoU", "mIoU")]
        apart = of["val"]["mIoU"] - base["splits"]["val"]["mIoU"] if base else None
        shown = "" if apart is None or name == PUBLISHED else f"{apart:+.2f}"
        shown_name = name if name == PUBLISHED else f"`{name}`"
        lines.append("| " + " | ".join([shown_name, what, *scores, shown]) + " |")
    missing = [f"`{name}`" for name in ROWS if name not in rows]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines)


def write_table(rows: Mapping[str, Mapping[str, Any]], page: Path) -> None:
    """Put the table between the page's marks."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}"
    page.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rows that are not done yet; print the table, and put it into the page."""
    args = parse(argv)
    record = load(args.results, args.epochs)
    waiting = [row for row in args.rows if row not in record["rows"]]
    for i, row in enumerate(waiting):
        print(f"row {i + 1} of {len(waiting)}: {row}", flush=True)
        record["rows"][row] = run_row(row, args)
        utils.write_json(record, args.results)
    print(table(record["rows"]))
    write_table(record["rows"], args.page)


if __name__ == "__main__":
    utils.run_script(main)
