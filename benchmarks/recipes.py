"""What each way to train better is worth, on RefShapes, beside the published recipe.

    python -m data.refshapes --out medium/data --level medium --scenes 1000 --val_scenes 100
    OMP_NUM_THREADS=1 python -m benchmarks.recipes --data medium/data --work study --jobs 2

Each row is train.py and test.py with its flags and each seed: for equal steps and, where a step
costs more than one of the published recipe (MaskRIS, two passes), again for equal computation. Runs
are written as they are done, so that an interrupted benchmark resumes. The table of
docs/training.md is made from the file of results; ``--rows`` without a name does that alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import utils
from args import Parser
from benchmarks.pages import markdown, put_between
from benchmarks.preset import REPO, run_script, step_flops
from lib.errors import InputError
from lib.segmentation import MODELS
from lib.swin import SWIN_SIZES

RESULTS = REPO / "benchmarks/results/recipes_cpu.json"
PAGE = REPO / "docs/training.md"
MARKS = ("<!-- table: python -m benchmarks.recipes -->", "<!-- end -->")

BASE = "--text_from_scratch --lang_layers all --drop_path 0 --val_expressions all"
PUBLISHED = "published"
WARM = "--warmup_steps {warmup} --backbone_lr_scale 0.5"
ROWS = {
    PUBLISHED: "",
    "Dice": "--loss dice",
    "warm-up, scaled rates": WARM,
    "EMA": "--model_ema --model_ema_warmup",
    "mosaic": "--mosaic 0.5 --mosaic_directions",
    "MaskRIS": "--maskris --maskris_patch 8 --clip_grad 1",
}
ROWS["all together"] = " ".join(filter(None, ROWS.values()))
STEPS, COMPUTE = "steps", "computation"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The benchmark's options."""
    p = Parser(
        prog="python -m benchmarks.recipes", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = p.add_argument
    add("--data", default="medium/data", help="a RefShapes root")
    add("--work", default="recipes_study", help="folder for the runs")
    add("--results", type=Path, default=RESULTS, help="JSON file, continued")
    add("--page", type=Path, default=PAGE, help="Markdown file that has the table")
    add("--epochs", type=int, default=4, help="of the published recipe, an even number")
    add("--batch_size", type=int, default=32)
    add("--lr", type=float, default=1e-3, help="of all rows")
    add("--warmup", type=int, default=50, help="steps")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--amp", default="off", help="see train.py")
    add("--model", default="lavt_one", choices=list(MODELS))
    add("--swin_type", default="pico", choices=list(SWIN_SIZES))
    add("--img_size", type=int, default=56, help="a multiple of 8, MaskRIS' patch")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--rows", nargs="*", default=list(ROWS), metavar="'NAME'", help="which rows")
    args = p.parse_args(argv)
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise InputError(f"--rows {unknown[0]}: choose of {', '.join(map(repr, ROWS))}")
    if args.epochs < 2 or args.epochs % 2:
        raise InputError(f"--epochs {args.epochs}: give an even number, for rows of half the steps")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a file of results share."""
    names = ("epochs", "batch_size", "lr", "warmup", "amp", "model", "swin_type", "img_size")
    return {name: getattr(args, name) for name in names}


def flags_of(row: str, args: argparse.Namespace) -> list[str]:
    """Flags of train.py, without data, epochs and seed."""
    own = ROWS[row].format(warmup=args.warmup)
    size = f"--img_size {args.img_size} --ape {args.img_size // 4}"
    words = f"--model {args.model} --swin_type {args.swin_type} {size} {BASE} {own}"
    words += f" --lr {args.lr} --batch_size {args.batch_size} --amp {args.amp}"
    return words.split()


def data_flags(args: argparse.Namespace) -> list[str]:
    """Flags of both scripts for the data."""
    data = Path(args.data).resolve()
    bert = ["--ck_bert", str(data / "bert"), "--bert_tokenizer", str(data / "bert")]
    return ["--refer_data_root", str(data), *bert, "--workers", "1", "--device", "cpu"]


def passes(row: str) -> int:
    """Forward and backward passes of a step."""
    return 2 if "--maskris" in ROWS[row].split() else 1


def budgets(row: str, epochs: int) -> dict[str, int]:
    """Epochs of a row by what equals the published recipe."""
    same = {STEPS: epochs}
    return same if passes(row) == 1 else same | {COMPUTE: epochs // passes(row)}


def run(row: str, budget: str, epochs: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row with one seed.

    Returns:
        ``val``: metrics and intervals of the best checkpoint; ``curve``: (step, seconds, mIoU)
        after each epoch; ``tflop_per_step``.

    Raises:
        InputError: a script failed.
    """
    name = "".join(c if c.isalnum() else "_" for c in row)
    folder = Path(args.work).resolve() / f"{name}_{budget}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = data_flags(args)
    words = [*flags_of(row, args), *data, "--epochs", str(epochs), "--seed", str(seed)]
    flop = step_flops(words) * passes(row) / 1e12
    run_script(folder, "train.py", *words, "--model_id", "row")
    best, results = folder / "checkpoints/model_best_row.pth", folder / "results.json"
    words = ["--split", "val", "--batch-size", "32", "--resume", str(best)]
    run_script(folder, "test.py", *data, *words, "--results", str(results))
    lines = (folder / "models/row/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve, seconds = [], 0.0
    for record in map(json.loads, lines):
        if record["kind"] == "epoch":
            seconds += record["seconds"]
            curve.append((record["step"], round(seconds, 1), record["val"]["mIoU"]))
    val = json.loads(results.read_text(encoding="utf-8"))["splits"]["val"]["all"]
    shutil.rmtree(folder / "checkpoints")
    return {"val": val, "curve": curve, "tflop_per_step": flop, "passes": passes(row)}


def reached(one: Mapping[str, Any], goal: float) -> tuple[float, float] | None:
    """Seconds and TFLOP of training until an epoch reaches a mIoU; None if none does."""
    for step, seconds, score in one["curve"]:
        if score >= goal:
            return seconds, step * one["tflop_per_step"]
    return None


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs as Markdown: mean and range over seeds, interval over objects, cost to the goal.

    Args:
        runs: by ``row | budget | seed``.
    """
    by_row: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, one in runs.items():
        row, budget, _ = key.split(" | ")
        by_row.setdefault((row, budget), []).append(one)
    base = by_row.get((PUBLISHED, STEPS), [])
    goal = statistics.mean(one["curve"][-1][2] for one in base) if base else float("nan")
    head = ["recipe", "equal", "seeds", "val mIoU", "difference", "val oIoU"]
    head += ["seconds to the published score", "TFLOP to it"]
    lines = []
    for row in ROWS:
        for budget in (STEPS, COMPUTE):
            group = by_row.get((row, budget), [])
            if not group:
                continue
            mean = statistics.mean(one["val"]["mIoU"] for one in group)
            apart = mean - statistics.mean(one["val"]["mIoU"] for one in base) if base else 0.0
            cost = [c for c in (reached(one, goal) for one in group) if c is not None]
            missed = len(group) - len(cost)
            note = f" ({missed} of {len(group)} do not reach it)" if missed else ""
            seconds, tflop = (statistics.mean(c[i] for c in cost) if cost else None for i in (0, 1))
            lines.append(
                [
                    row,
                    budget,
                    str(len(group)),
                    score(group, "mIoU"),
                    "" if row == PUBLISHED else f"{apart:+.2f}",
                    score(group, "oIoU"),
                    "never" if seconds is None else f"{seconds:.0f}{note}",
                    "never" if tflop is None else f"{tflop:.1f}{note}",
                ]
            )
    words = "Mean over seeds [lowest to highest seed; mean 95 % interval over objects]. "
    words += f"The published recipe's score after its last epoch: mIoU {goal:.2f}."
    return f"{markdown(head, lines)}\n\n{words}"


def score(group: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Mean of a metric, its range over seeds, and the mean interval over objects."""
    values = [one["val"][metric] for one in group]
    ends = [one["val"].get("bootstrap_95", {}).get(metric) for one in group]
    text = f"{statistics.mean(values):.2f} [{min(values):.2f} to {max(values):.2f}"
    if all(ends):
        low, high = (statistics.mean(end[i] for end in ends) for i in (0, 1))
        text += f"; {low:.2f} to {high:.2f}"
    return text + "]"


def load(path: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """The results so far.

    Raises:
        InputError: they are of other settings.
    """
    if not path.is_file():
        return {"settings": chosen, "environment": utils.environment(), "runs": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"] != chosen:
        raise InputError(f"{path} is of other settings: give another file by --results")
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet; put the table into the page, and print it."""
    args = parse(argv)
    record = load(args.results, settings(args))
    waiting = [
        (row, budget, epochs, seed)
        for seed in range(args.seeds)
        for row in args.rows
        for budget, epochs in budgets(row, args.epochs).items()
        if f"{row} | {budget} | {seed}" not in record["runs"]
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(run, *job, args): job for job in waiting}
        try:
            for done in utils.progress(as_completed(jobs), "runs", 0, len(jobs)):
                row, budget, _, seed = jobs[done]
                record["runs"][f"{row} | {budget} | {seed}"] = done.result()
                utils.write_json(record, args.results)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    text = table(record["runs"])
    put_between(args.page, MARKS, text)
    print(text)


if __name__ == "__main__":
    utils.run_script(main)
