"""Results as tables: for the terminal, and as papers print them in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.bootstrap import COLUMNS, LEVEL, RESAMPLES, Intervals
from lib.metrics import Metrics
from lib.protocol import tag, warning
from tools.published import Published
from utils import write_text

NAMES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "G-Ref", "refclef": "RefCLEF"}
METHOD = (
    f"Intervals: {100 * LEVEL:.0f} % bootstrap over objects, {RESAMPLES:,} draws; "
    "± is half an interval's width."
)
NO_NUMBER = "-"
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Entry:
    """A split's result.

    Attributes:
        split: its name.
        metrics: over all its samples.
        intervals: of these metrics, by column.
        objects: number of objects.
        published: what was published for it, where anything was.
    """

    split: str
    metrics: Metrics
    intervals: Intervals
    objects: int
    published: Published | None = None


@dataclass(frozen=True)
class Results:
    """What a table is made of; ``protocol`` is the label of :class:`lib.protocol.Protocol`."""

    dataset: str
    split_by: str
    model: str
    protocol: str
    entries: Sequence[Entry]

    @property
    def title(self) -> str:
        """Data set and model, in words."""
        return f"{NAMES.get(self.dataset, self.dataset)} ({self.split_by}), {self.model}"

    def remarks(self) -> list[str]:
        """Sentences that belong below a table."""
        found = [METHOD]
        for entry in self.entries:
            row = entry.published
            if row and row.reason:
                found.append(f"{entry.split}: not compared with the published row, {row.reason}.")
            if row and row.note:
                found.append(f"{entry.split}, published: {row.note}")
        return found


def format_table(rows: Sequence[tuple[str, Metrics]]) -> str:
    """Rows as papers print them, under a header."""
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{h:>8}" for h in (*COLUMNS, "n"))]
    for name, m in rows:
        cells = "".join(f"{v:8.2f}" for v in m.row().values())
        lines.append(f"{name:<{width}}{cells}{m.samples:>8}")
    return "\n".join(lines)


def as_text(results: Results) -> str:
    """Splits with intervals, published rows and differences, for a terminal."""
    rows = _rows(results, measured=lambda value, _: f"{value:.2f}", with_half=True)
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows]
    head = " " * width + "".join(f"{h:>8}" for h in (*COLUMNS, "n"))
    return "\n".join([results.title, head, *lines, *_below(results)])


def as_markdown(results: Results) -> str:
    """The same as a Markdown page."""
    rows = [["", *COLUMNS, "n"], ["---"] * (len(COLUMNS) + 2), *_paper_rows(results)]
    table = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join([f"# {results.title}", "", *table, "", *_below(results, "\n")]) + "\n"


def as_latex(results: Results) -> str:
    """The same as a tabular that needs no package, to be \\input in a table."""
    columns = len(COLUMNS) + 2
    rows = [["", *COLUMNS, "n"], *_paper_rows(results)]
    lines = [" & ".join(map(latex_escape, row)) + r" \\" for row in rows]
    lines.insert(1, r"\hline")
    notes = [
        rf"\multicolumn{{{columns}}}{{l}}{{\footnotesize {latex_escape(remark)}}} \\"
        for remark in _below(results)
    ]
    begin = rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}"
    title = rf"\multicolumn{{{columns}}}{{l}}{{{latex_escape(results.title)}}} \\"
    body = [begin, r"\hline", title, *lines, r"\hline", *notes, r"\end{tabular}"]
    return "\n".join(body) + "\n"


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it literally."""
    return re.sub(r"[&%$#_{}\\~^<>|±]", lambda found: _LATEX[found[0]], text)


def as_csv(results: Results) -> str:
    """One line a split and kind of number: measured, low, high, published, difference."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    facts = ["dataset", "splitBy", "model", "protocol", "split", "row"]
    writer.writerow([*facts, *COLUMNS, "samples", "objects", "remark"])
    for entry in results.entries:
        front = [results.dataset, results.split_by, results.model, results.protocol, entry.split]
        for row, values, remark in _numbers(entry):
            cells = ["" if (v := values[c]) != v else f"{v:.4f}" for c in COLUMNS]
            writer.writerow([*front, row, *cells, entry.metrics.samples, entry.objects, remark])
    return out.getvalue()


def write_tables(results: Results, beside: Path) -> list[Path]:
    """Write Markdown, LaTeX and CSV beside a file, with its name and endings of their own.

    Raises:
        InputError: one cannot be written.
    """
    forms = {".md": as_markdown, ".tex": as_latex, ".csv": as_csv}
    written = [beside.with_suffix(ending) for ending in forms]
    for path, form in zip(written, forms.values(), strict=True):
        write_text(form(results), path)
    return written


def _numbers(entry: Entry) -> list[tuple[str, dict[str, float], str]]:
    """Kind of row, its values and a remark, for every row about a split."""
    rows = [
        ("measured", entry.metrics.row(), ""),
        ("low", {c: low for c, (low, _) in entry.intervals.items()}, ""),
        ("high", {c: high for c, (_, high) in entry.intervals.items()}, ""),
    ]
    published = entry.published
    if published and published.values:
        rows.append(("published", published.values, published.reason))
        if not published.reason:
            rows.append(("difference", _difference(entry.metrics, published), ""))
    return rows


def _difference(metrics: Metrics, published: Published) -> dict[str, float]:
    """Measured less published, in points."""
    return {c: v - published.values[c] for c, v in metrics.row().items()}


def _paper_rows(results: Results) -> list[list[str]]:
    return _rows(results, lambda v, half: f"{v:.2f} ± {half:.2f}", with_half=False)


def _rows(
    results: Results, measured: Callable[[float, float], str], with_half: bool
) -> list[list[str]]:
    """Cells of the table: each split's rows below each other.

    Args:
        results: of the splits.
        measured: a cell, from a number and half its interval.
        with_half: whether half the interval has a row of its own, in place of both its ends.
    """
    rows = []
    for entry in results.entries:
        values, ends = entry.metrics.row(), entry.intervals
        half = {c: (high - low) / 2 for c, (low, high) in ends.items()}
        name = entry.split + tag(results.protocol)
        cells = [_number(values[c], measured(values[c], half[c])) for c in COLUMNS]
        rows.append([name, *cells, str(entry.metrics.samples)])
        if with_half:
            rows.append(["  ±", *(_number(half[c], f"{half[c]:.2f}") for c in COLUMNS), ""])
        else:
            ranges = [_number(sum(ends[c]), "[{:.2f}, {:.2f}]".format(*ends[c])) for c in COLUMNS]
            rows.append(["95 % interval", *ranges, ""])
        rows += _published_rows(entry)
    return rows


def _published_rows(entry: Entry) -> list[list[str]]:
    published = entry.published
    if not published or not published.values:
        return []
    given = [f"{published.values[c]:.2f}" for c in COLUMNS]
    remark = "not compared" if published.reason else ""
    rows = [[f"published ({published.title})", *given, remark]]
    if not remark:
        gaps = _difference(entry.metrics, published)
        rows.append(["difference", *(_number(gaps[c], f"{gaps[c]:+.2f}") for c in COLUMNS), ""])
    return rows


def _number(value: float, text: str) -> str:
    return text if value == value else NO_NUMBER  # nan: every union is empty


def _below(results: Results, gap: str = "") -> list[str]:
    lines = [line for line in (warning(results.protocol), *results.remarks()) if line]
    return [line + gap for line in lines]
