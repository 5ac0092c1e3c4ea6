"""Score what test.py --predictions wrote, without a model; or compare two such files.

    python -m tools.score predictions.jsonl [--from_masks] [--json FILE] [--csv FILE]
    python -m tools.score A.jsonl B.jsonl [--top 10] [--json FILE] [--csv FILE] [--force]

One file gives the numbers that test.py printed, from each sample's counts; --from_masks counts
again from the masks, at the image's original size, which is --eval_size original.

Of two files B is compared with A on the samples that both have. Expressions of one object are not
independent, so intervals and tests are over objects: a paired bootstrap of the metrics; of each
object's mean IoU the Wilcoxon signed-rank test and the sign test, both two-sided.
"""

from __future__ import annotations

import argparse
import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

import utils
from args import Parser
from lib.errors import InputError
from lib.evaluation import tables
from lib.evaluation.bootstrap import Intervals, paired_intervals
from lib.evaluation.counts import SampleCounts
from lib.evaluation.metrics import Metrics
from lib.evaluation.protocol import at_original_size, warning
from lib.evaluation.summary import summary
from tools.report.breakdown import object_codes
from tools.report.records import Prediction, counts_of, read_records
from utils import log

SHOWN = 48  # characters of an expression in the table


def label_of(samples: Sequence[Prediction], from_masks: bool = False) -> str:
    """The protocol of the samples' counts, or of those from their masks."""
    return at_original_size(samples[0].protocol) if from_masks else samples[0].protocol


def by_split(samples: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """The samples of each split, in order."""
    splits: dict[str, list[Prediction]] = {}
    for sample in samples:
        splits.setdefault(sample.split, []).append(sample)
    return splits


def score(path: Path, from_masks: bool = False) -> tables.Results:
    """The tables of a file.

    Raises:
        InputError: it cannot be read, or a line is damaged.
    """
    samples = read_records(path)
    entries = []
    for split, part in by_split(samples).items():
        kinds = [sample.kind for sample in part]
        numbers = summary(counts_of(part, from_masks), object_codes(part).tolist(), kinds)
        entries.append(tables.Entry(split, numbers))
    return tables.Results(str(path), {"file": str(path)}, label_of(samples, from_masks), entries)


@dataclass(frozen=True)
class Comparison:
    """What changed from A to B in a split.

    Attributes:
        first, second: metrics of A and B, of the samples that both have.
        intervals: 95 %, of the second's less the first's, in points.
        samples: how many got (better, worse, equal).
        objects: likewise, by an object's mean IoU.
        wilcoxon, sign: p-values over objects, two-sided; 1 where nothing changed.
    """

    first: Metrics
    second: Metrics
    intervals: Intervals
    samples: tuple[int, int, int]
    objects: tuple[int, int, int]
    wilcoxon: float
    sign: float


def compare(first: SampleCounts, second: SampleCounts, objects: Sequence[int]) -> Comparison:
    """Compare the counts of the same samples.

    Args:
        first, second: of A and B, N samples.
        objects: which object each sample is about.
    """
    which = np.asarray(objects, dtype=np.int64)
    gains = second.iou() - first.iou()
    _, place, counts = np.unique(which, return_inverse=True, return_counts=True)
    # Equal counts give equal IoUs, so that the gains of an unchanged object are exactly 0.
    of_object = np.bincount(place, weights=gains) / counts
    better, worse, equal = _signs(of_object)
    changed = better + worse
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few objects or ties: the p-value is approximate then
        wilcoxon = float(stats.wilcoxon(of_object).pvalue) if changed else 1.0
    sign = float(stats.binomtest(better, changed).pvalue) if changed else 1.0
    return Comparison(
        first=first.summarise(),
        second=second.summarise(),
        intervals=paired_intervals(first, second, which),
        samples=_signs(gains),
        objects=(better, worse, equal),
        wilcoxon=wilcoxon,
        sign=sign,
    )


def _signs(gains: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    return int((gains > 0).sum()), int((gains < 0).sum()), int((gains == 0).sum())


@dataclass(frozen=True)
class Matched:
    """Samples that two files have in common.

    Attributes:
        pairs: of A and B, in A's order.
        only_first, only_second: number of the others.
    """

    pairs: list[tuple[Prediction, Prediction]]
    only_first: int
    only_second: int


def match(paths: Sequence[Path], from_masks: bool, force: bool) -> Matched:
    """Read two files and find the samples that both have.

    Args:
        paths: of A and B.
        from_masks: whether the counts will be taken from the masks.
        force: compare what is not comparable.

    Raises:
        InputError: a file cannot be read, they share no sample; without ``force``: their
            protocols or true masks differ.
    """
    a, b = (read_records(path) for path in paths)
    labels = [label_of(samples, from_masks) for samples in (a, b)]
    if labels[0] != labels[1] and not force:
        raise InputError(
            f"{paths[0]} is of the protocol '{labels[0]}', {paths[1]} of '{labels[1]}': their "
            "numbers mean different things; --force compares them nevertheless"
        )
    of_key = {sample.key: sample for sample in b}
    pairs = [(sample, of_key[sample.key]) for sample in a if sample.key in of_key]
    if not pairs:
        raise InputError(f"{paths[0]} and {paths[1]} have no sample in common")
    if a[0].metrics != b[0].metrics:
        raise InputError(f"{paths[0]} and {paths[1]} are of datasets with different metrics")
    others = sum(x.truth != y.truth or x.ann_ids != y.ann_ids for x, y in pairs)
    if others and not force:
        raise InputError(
            f"{others} of {len(pairs)} samples have another true mask in {paths[1]} than in "
            f"{paths[0]}: they are not of the same data; --force compares them nevertheless"
        )
    return Matched(pairs, len(a) - len(pairs), len(b) - len(pairs))


@dataclass(frozen=True)
class Change:
    """A sample's IoU in A and B, in percent."""

    split: str
    ref_id: int
    sent_ids: tuple[int, ...]
    sentence: str
    file_name: str
    iou_a: float
    iou_b: float
    gain: float


def changes(pairs: Sequence[tuple[Prediction, Prediction]], from_masks: bool) -> list[Change]:
    """Every sample's change, the greatest loss first."""
    first, second = (counts_of(side, from_masks).iou() for side in zip(*pairs, strict=True))
    result = [
        Change(
            *(sample.split, sample.ref_id, sample.sent_ids, sample.sentence, sample.file_name),
            *(100 * x, 100 * y, 100 * (y - x)),
        )
        for (sample, _), x, y in zip(pairs, first.tolist(), second.tolist(), strict=True)
    ]
    return sorted(result, key=lambda change: change.gain)


def comparison_text(split: str, result: Comparison) -> str:
    """A split's comparison, for the terminal."""
    a, b = result.first.row(), result.second.row()
    lines = [f"{split:<14}" + "".join(f"{c:>8}" for c in (*a, "n"))]
    rows = {"A": a, "B": b, "B - A": {c: b[c] - a[c] for c in a}}
    rows |= {"  95 % from": {c: low for c, (low, _) in result.intervals.items()}}
    rows |= {"  to": {c: high for c, (_, high) in result.intervals.items()}}
    for name, row in rows.items():
        size = f"{result.first.samples:>8}" if name in ("A", "B") else ""
        cells = ("-" if row[c] != row[c] else f"{row[c]:.2f}" for c in a)
        lines.append(f"{name:<14}" + "".join(f"{cell:>8}" for cell in cells) + size)
    for what, (better, worse, equal) in (("samples", result.samples), ("objects", result.objects)):
        lines.append(f"{what}: {better} better, {worse} worse, {equal} equal")
    lines.append(
        f"over objects: Wilcoxon p = {result.wilcoxon:.3g}, sign test p = {result.sign:.3g}"
    )
    return "\n".join(lines)


def changes_text(ranked: Sequence[Change], top: int) -> str:
    """The samples that changed most, worst and best, for the terminal."""
    worse = [change for change in ranked if change.gain < 0][:top]
    better = [change for change in ranked[::-1] if change.gain > 0][:top]
    parts = []
    for title, chosen in (("worse in B", worse), ("better in B", better)):
        lines = [f"{title:<12}{'A':>7}{'B':>8}{'B - A':>8}  ref      expression"]
        lines += [
            f"{c.split[:11]:<11}{c.iou_a:8.2f}{c.iou_b:8.2f}{c.gain:+8.2f}  {c.ref_id:<8} "
            f"{_printable(c.sentence)}"
            for c in chosen
        ]
        parts.append("\n".join(lines if chosen else [f"{title}: none"]))
    return "\n\n".join(parts)


def _printable(text: str) -> str:
    """An untrusted expression for a terminal: short, and without control characters."""
    short = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def changes_csv(ranked: Sequence[Change]) -> str:
    """One line a sample, the greatest loss first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Change.__dataclass_fields__)
    for change in ranked:
        row = asdict(change) | {"sent_ids": " ".join(map(str, change.sent_ids))}
        row["sentence"] = change.sentence.encode("utf-8", "replace").decode("utf-8")
        writer.writerow(row.values())
    return out.getvalue()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked.

    Raises:
        InputError: naming the option and what it takes.
    """
    p = Parser("python -m tools.score", description="Score predictions, or compare two files.")
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one to score, or two")
    p.add_argument(
        "--from_masks", action="store_true", help="count again, at the image's original size"
    )
    p.add_argument("--force", action="store_true", help="compare what is not comparable")
    p.add_argument("--top", type=int, default=10, help="samples to list that changed most")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    p.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the table; of two files, every sample"
    )
    args = p.parse_args(argv)
    if len(args.files) > 2:
        raise InputError(f"{len(args.files)} files: give one to score, or two to compare")
    if args.top < 0:
        raise InputError(f"--top {args.top}: must be 0 or more")
    return args


def score_one(args: argparse.Namespace) -> None:
    """Write and print the numbers of a file."""
    results = score(args.files[0], args.from_masks)
    if args.json:
        splits = {entry.split: entry.summary.as_dict() for entry in results.entries}
        content = {"splits": splits, "protocol": results.protocol, "file": str(args.files[0])}
        utils.write_json(content, args.json)
    if args.csv:
        utils.write_text(tables.as_csv(results), args.csv)
    log.info("%s", tables.as_text(results))


def compare_two(args: argparse.Namespace) -> None:
    """Write and print how the second file differs from the first."""
    matched = match(args.files, args.from_masks, args.force)
    labels = {label_of(side, args.from_masks) for side in zip(*matched.pairs, strict=True)}
    log.info("A: %s\nB: %s", *args.files)
    for line in filter(None, map(warning, sorted(labels))):
        log.info("%s", line)
    if matched.only_first or matched.only_second:
        numbers = (len(matched.pairs), matched.only_first, matched.only_second)
        log.info("%d samples in both; not compared: %d only in A, %d only in B", *numbers)
    first, second = (by_split(side) for side in zip(*matched.pairs, strict=True))
    result = {
        split: compare(
            counts_of(part, args.from_masks),
            counts_of(second[split], args.from_masks),
            object_codes(part).tolist(),
        )
        for split, part in first.items()
    }
    ranked = changes(matched.pairs, args.from_masks)
    texts = [comparison_text(split, of_split) for split, of_split in result.items()]
    if args.json:
        content: dict[str, Any] = {"files": [str(path) for path in args.files]}
        content |= {"protocols": sorted(labels), "only_in_a": matched.only_first}
        content |= {"only_in_b": matched.only_second}
        content |= {"splits": {split: _plain(of_split) for split, of_split in result.items()}}
        utils.write_json(content, args.json)
    if args.csv:
        utils.write_text(changes_csv(ranked), args.csv)
    log.info("\n%s", "\n\n".join([*texts, changes_text(ranked, args.top)]))


def _plain(result: Comparison) -> dict[str, Any]:
    """For JSON, which has no nan."""
    ends = {c: None if low != low else [low, high] for c, (low, high) in result.intervals.items()}
    signs = ("better", "worse", "equal")
    return {
        "a": result.first.as_dict(),
        "b": result.second.as_dict(),
        "difference_bootstrap_95": ends,
        "samples": dict(zip(signs, result.samples, strict=True)),
        "objects": dict(zip(signs, result.objects, strict=True)),
        "wilcoxon_p": result.wilcoxon,
        "sign_test_p": result.sign,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Score one file or compare two, as the command line says."""
    args = parse(argv)
    utils.setup_logging(None, 0)
    score_one(args) if len(args.files) == 1 else compare_two(args)


if __name__ == "__main__":
    utils.run_script(main)
