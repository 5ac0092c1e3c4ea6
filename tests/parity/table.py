"""Print how far this code is from the official release, as one table.

python -m tests.parity.table
python -m tests.parity.table --cases a,b --skip-slow
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from args import Parser
from lib.errors import InputError
from tests.parity import checks
from tests.parity.checks import CASES, Row
from utils import progress


class Check(NamedTuple):
    """A check to run, or the reason why it cannot be."""

    title: str
    run: Callable[[], list[Row]] | None
    reason: str = ""


def forward(letter: str, dtype: torch.dtype) -> Check:
    """The check of a forward case in one precision."""
    name = str(dtype).removeprefix("torch.")

    def run() -> list[Row]:
        ours = checks.outputs(letter, dtype)
        if dtype == torch.float64:
            return checks.float64_rows(letter, ours)
        return checks.input_rows(letter) + checks.float32_rows(letter, ours)

    return Check(f"forward {letter}, {name}", run)


def training(precision: str) -> Check:
    """The check of three training steps in one precision."""
    return Check(
        f"training, {precision}",
        lambda: checks.training_rows(checks.run_training(getattr(torch, precision)), precision),
    )


def tokens(folder: str) -> Check:
    """The check of the tokenizer, where there is a vocabulary."""
    vocabulary = Path(folder) if folder else checks.find_vocabulary()
    if vocabulary is None:
        return Check("tokens", None, "no vocabulary here: give --bert_tokenizer FOLDER")
    return Check("tokens", lambda: checks.tokenization_rows(vocabulary))


def plan(cases: str, skip_slow: bool, vocabulary: str) -> list[Check]:
    """What to run, the quick first."""
    todo = [
        Check("formula", checks.formula_rows),
        Check("keys", checks.keys_rows),
        Check("groups", checks.group_rows),
        Check("metrics", checks.metrics_rows),
        Check("pictures", checks.preprocessing_rows),
        tokens(vocabulary),
    ]
    for letter in cases:
        todo.append(forward(letter, torch.float32))
        if letter == "e" and skip_slow:
            todo.append(Check("forward e, float64", None, "slow"))
        else:
            todo.append(forward(letter, torch.float64))
    for precision in ("float64", "float32"):
        skipped = Check(f"training, {precision}", None, "slow")
        todo.append(skipped if skip_slow else training(precision))
    return todo


def table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Lines up four columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def parse_cases(text: str) -> str:
    """The letters of ``--cases``.

    Raises:
        InputError: one of them is no case.
    """
    letters = [part.strip() for part in text.split(",") if part.strip()]
    if not letters or any(letter not in tuple(CASES) for letter in letters):
        raise InputError(f"--cases {text}: give letters of {','.join(CASES)}, like a,b")
    return "".join(dict.fromkeys(letters))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the table.

    Returns:
        Exit code: 1 where any check failed, else 0.
    """
    parser = Parser(prog="tests.parity.table", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="forward cases, like a,b")
    parser.add_argument(
        "--skip_slow", action="store_true", help="leave out training and case e in float64"
    )
    parser.add_argument("--bert_tokenizer", default="", help="folder with BERT's vocab.txt")
    args = parser.parse_args(argv)
    todo = plan(parse_cases(args.cases), args.skip_slow, args.bert_tokenizer)
    lines = [("quantity", "tolerance", "measured", "verdict")]
    failed = 0
    for check in progress(todo, "parity", rank=0):
        if check.run is None:
            lines.append((check.title, "-", "-", f"skipped: {check.reason}"))
            continue
        for row in check.run():
            failed += not row.passed
            verdict = "ok" if row.passed else "FAIL"
            lines.append((row.quantity, f"{row.tolerance:g}", f"{row.measured:.2g}", verdict))
    print(table(lines))
    print(f"\n{failed} failed" if failed else "\nall within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
