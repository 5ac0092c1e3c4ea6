"""Results as tables: for the terminal, and as papers print them in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.evaluation.bootstrap import LEVEL, RESAMPLES
from lib.evaluation.metrics import Metrics
from lib.evaluation.protocol import STANDARD, tag, warning
from lib.evaluation.published import Published
from lib.evaluation.summary import Summary
from utils import write_text

METHOD = (
    f"Intervals: {100 * LEVEL:.0f} % bootstrap over objects, {RESAMPLES:,} draws "
    "(±: half an interval's width)."
)
NO_NUMBER = "-"
NAN = float("nan")
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
    """A split's result, and what was published for it, where anything was.

    Attributes:
        split: its name.
        summary: the result.
        published: of the same model.
        others: published of other models.
        trained_on: how many images of the split the model was trained on; None if unknown.
    """

    split: str
    summary: Summary
    published: Published | None = None
    others: Sequence[Published] = ()
    trained_on: int | None = None

    @property
    def metrics(self) -> Metrics:
        """Over all samples of the split."""
        return self.summary.rows["all"]

    @property
    def seen(self) -> str:
        """What to know of the model's training, in words; '' if nothing."""
        return f"trained on {self.trained_on} of its images" if self.trained_on else ""


@dataclass(frozen=True)
class Results:
    """What tables are made of.

    Attributes:
        title: data and model, in words.
        facts: what a line of the CSV starts with, by column.
        protocol: the label of :class:`lib.evaluation.protocol.Protocol`.
        entries: by split.
    """

    title: str
    facts: dict[str, str]
    protocol: str
    entries: Sequence[Entry]

    @property
    def columns(self) -> list[str]:
        """Heads of the metrics, which are the same in all entries."""
        return list(self.entries[0].metrics.row())

    def remarks(self) -> list[str]:
        """Sentences that belong below a table."""
        notes = [METHOD]
        for entry in self.entries:
            row = entry.published
            if row and row.reason:
                notes.append(f"{entry.split}: not compared with the published row, {row.reason}.")
            if row and row.note:
                notes.append(f"{entry.split}, published: {row.note}")
            if entry.others:
                notes.append(f"{entry.split}: rows of other models are as published, of all of it.")
        return notes


def format_table(rows: Sequence[tuple[str, Metrics]]) -> str:
    """Rows as papers print them, under a header."""
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{h:>8}" for h in (*rows[0][1].row(), "n"))]
    for name, m in rows:
        cells = "".join(f"{_number(v, f'{v:.2f}'):>8}" for v in m.row().values())
        lines.append(f"{name:<{width}}{cells}{m.samples:>8}")
    return "\n".join(lines)


def as_text(results: Results) -> str:
    """Every row of every split, then the splits with intervals and published rows."""
    mark = tag(results.protocol)
    named = [
        (f"{entry.split}{mark} {name}", metrics)
        for entry in results.entries
        for name, metrics in entry.summary.rows.items()
    ]
    rows = _rows(results, ranges=False)
    width = max(len(row[0]) for row in rows)
    head = " " * width + "".join(f"{h:>8}" for h in (*results.columns, "n"))
    lines = [row[0].ljust(width) + "".join(f" {cell:>7}" for cell in row[1:]) for row in rows]
    below = "\n".join([results.title, head, *map(str.rstrip, lines), *_below(results)])
    return f"{format_table(named)}\n\n{below}" if len(named) > len(results.entries) else below


def as_markdown(results: Results) -> str:
    """The same as a Markdown page."""
    heads = ["", *results.columns, "n"]
    rows = [heads, ["---"] * len(heads), *_rows(results, ranges=True)]
    table = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    below = "\n\n".join(_below(results))
    return "\n".join([f"# {results.title}", "", *table, "", below]) + "\n"


def as_latex(results: Results) -> str:
    """The same as a tabular that needs no package, to be \\input in a table."""
    columns = len(results.columns) + 2
    rows = [["", *results.columns, "n"], *_rows(results, ranges=True)]
    lines = [" & ".join(map(latex_escape, row)) + r" \\" for row in rows]
    lines.insert(1, r"\hline")
    wide = rf"\multicolumn{{{columns}}}{{p{{0.9\linewidth}}}}"
    notes = [rf"{wide}{{\footnotesize {latex_escape(remark)}}} \\" for remark in _below(results)]
    begin = rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}"
    title = rf"\multicolumn{{{columns}}}{{l}}{{{latex_escape(results.title)}}} \\"
    body = [begin, r"\hline", title, *lines, r"\hline", *notes, r"\end{tabular}"]
    return "\n".join(body) + "\n"


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it literally."""
    return re.sub(r"[&%$#_{}\\~^<>|±]", lambda match: _LATEX[match[0]], text)


def as_csv(results: Results) -> str:
    """One line a split and kind of number: measured, low, high, published, difference."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = results.columns
    heads = [*results.facts, "protocol", "split", "row", *columns, "samples", "objects", "remark"]
    writer.writerow(heads)
    for entry in results.entries:
        front = [*results.facts.values(), results.protocol, entry.split]
        for row, values, remark in _numbers(entry):
            cells = ["" if (v := values.get(c, NAN)) != v else f"{v:.4f}" for c in columns]
            writer.writerow(
                [*front, row, *cells, entry.metrics.samples, entry.summary.objects, remark]
            )
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
        ("measured", entry.metrics.row(), entry.seen),
        ("low", {c: low for c, (low, _) in entry.summary.intervals.items()}, ""),
        ("high", {c: high for c, (_, high) in entry.summary.intervals.items()}, ""),
    ]
    published = entry.published
    if published and published.values:
        rows.append(("published", published.values, published.reason))
        if not published.reason:
            rows.append(("difference", _difference(entry.metrics, published), ""))
    for other in entry.others:
        rows.append(("published", other.values, f"another model: {other.title}"))
    return rows


def _difference(metrics: Metrics, published: Published) -> dict[str, float]:
    """Measured less published, in points."""
    return {c: v - published.values[c] for c, v in metrics.row().items()}


def _rows(results: Results, ranges: bool) -> list[list[str]]:
    """Cells of the table: each split's rows below each other.

    Args:
        results: of the splits.
        ranges: whether an interval is shown by both its ends, or by half its width.
    """
    rows = []
    for entry in results.entries:
        values, ends = entry.metrics.row(), entry.summary.intervals
        cells = [_number(v, f"{v:.2f}") for v in values.values()]
        rows.append([_label(entry, results.protocol), *cells, str(entry.metrics.samples)])
        shown = {
            c: f"[{low:.2f}, {high:.2f}]" if ranges else f"{(high - low) / 2:.2f}"
            for c, (low, high) in ends.items()
        }
        name = "95 % interval" if ranges else "  ±"
        rows.append([name, *(_number(sum(ends[c]), shown[c]) for c in values), ""])
        rows += _published_rows(entry)
    return rows


def _label(entry: Entry, protocol: str) -> str:
    """A split with what a reader of its numbers must know."""
    known = [text for text in (entry.seen, protocol) if text not in ("", STANDARD)]
    return entry.split + tag("; ".join(known) or STANDARD)


def _published_rows(entry: Entry) -> list[list[str]]:
    rows = []
    for published in filter(None, (entry.published, *entry.others)):
        if not published.values:
            continue
        given = [published.values.get(c, NAN) for c in entry.metrics.row()]
        cells = [_number(v, f"{v:.2f}") for v in given]
        remark = "not compared" if published.reason else ""
        rows.append([f"published ({published.title})", *cells, remark])
        if not remark:
            gaps = _difference(entry.metrics, published).values()
            rows.append(["difference", *(_number(v, f"{v:+.2f}") for v in gaps), ""])
    return rows


def _number(value: float, text: str) -> str:
    return text if value == value else NO_NUMBER  # nan: not defined


def _below(results: Results) -> list[str]:
    return [line for line in (warning(results.protocol), *results.remarks()) if line]
