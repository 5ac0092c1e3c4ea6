"""Tables of results, and the published rows beside them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest

from lib.evaluation import tables
from lib.evaluation.counts import StandardCounts
from lib.evaluation.metrics import COLUMNS
from lib.evaluation.protocol import Protocol
from lib.evaluation.published import look_up
from lib.evaluation.summary import summary
from lib.evaluation.tables import Entry, Results
from refer.datasets import published_counts
from refer.published import PUBLISHED_ROWS as ROWS
from tests.scripts import REPO

NAMES = {"RefCOCO": "refcoco", "RefCOCO+": "refcoco+", "G-Ref": "refcocog"}
SPLITS = ("val", "testA", "testB")
VAL = ("refcoco", "unc", "val")
SIZE = (3811, 10834)


def markdown_rows(text: str) -> dict[tuple[str, str, str], list[float]]:
    """Numbers of each line such as '| G-Ref val (umd) | 70.81 | …', by dataset and split."""
    result = {}
    for line in text.splitlines():
        named = re.match(r"\| (RefCOCO\+?|G-Ref) (\w+)(?: \((\w+)\))? \|(.*)\|$", line)
        if named:
            numbers = [float(cell) for cell in named[4].split("|")]
            result[NAMES[named[1]], named[3] or "unc", named[2]] = numbers
    return result


def test_documented_results_are_the_published_rows() -> None:
    parts = (REPO / "docs" / "results.md").read_text(encoding="utf-8").split("\n## ")
    for model, option in (("lavt", "ce"), ("lavt_one", "dice"), ("crossvlt", "")):
        (part,) = [
            p for p in parts if f"`--model {model}{' --loss ' + option if option else ''}`" in p
        ]
        assert "| | " + " | ".join(COLUMNS) + " |" in part
        assert markdown_rows(part) == {data: list(row) for data, row in ROWS[model].items()}


def test_results_in_the_readme_are_the_published_rows() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    shown = ("P@0.5", "P@0.7", "P@0.9", "oIoU", "mIoU")
    assert "| | " + " | ".join(shown) + " |" in readme
    columns = [COLUMNS.index(column) for column in shown]
    rows = {data: [row[c] for c in columns] for data, row in ROWS["lavt"].items()}
    assert markdown_rows(readme) == rows
    for model in ("lavt_one", "crossvlt"):
        values = [ROWS[model]["refcoco", "unc", s][COLUMNS.index("oIoU")] for s in SPLITS]
        assert " / ".join(f"{v:.2f}" for v in values) in readme


def test_published_row_and_when_it_may_be_compared() -> None:
    result = look_up("lavt", VAL, Protocol(), *SIZE)
    assert result is not None
    assert result.reason == result.note == ""
    assert result.values["oIoU"] == 72.73
    assert result.values["mIoU"] == 74.46
    other = look_up("lavt", VAL, Protocol(eval_mode="cat"), *SIZE)
    assert other is not None
    assert other.reason == "other protocol: eval_mode=cat"
    assert other.values == result.values


@pytest.mark.parametrize("size", [(3810, 10834), (3811, 10833), (17, 47)])
def test_nothing_is_published_for_other_data(size: tuple[int, int]) -> None:
    result = look_up("lavt", VAL, Protocol(), *size)
    assert result is not None
    assert result.values == {}
    assert "other data" in result.reason


def test_what_nobody_published() -> None:
    assert look_up("toy", VAL, Protocol(), *SIZE) is None
    assert look_up("crossvlt", ("refcocog", "google", "val"), Protocol(), 5000, 9536) is None
    assert look_up("lavt", ("refclef", "unc", "val"), Protocol(), 1, 1) is None


def test_unverified_number_of_expressions_is_not_asked_for() -> None:
    result = look_up("lavt", ("refcocog", "google", "val"), Protocol(), 5000, 9000)
    assert result is not None
    assert result.reason == ""


def test_every_published_row_has_a_size() -> None:
    for model, rows in ROWS.items():
        for data in rows:
            size = published_counts(data[0], data[1])[data[2]]
            assert size.sentences is not None
            result = look_up(model, data, Protocol(), size.refs, size.sentences)
            assert result is not None
            assert result.reason == ""


def entry(split: str = "val", model: str = "lavt", **protocol: str) -> Entry:
    union = np.array([100, 100, 50, 80])
    counts = StandardCounts(np.array([90, 40, 50, 0]), union)
    result = summary(counts, [1, 1, 2, 3], [None] * 4)
    data = ("refcocog", "umd", "test") if model == "crossvlt" else ("refcoco", "unc", split)
    size = published_counts(data[0], data[1])[data[2]]
    assert size.sentences is not None
    known = look_up(model, data, Protocol(**protocol), size.refs, size.sentences)  # type: ignore[arg-type]
    return Entry(split, result, known)


def results(*entries: Entry, protocol: str = "standard") -> Results:
    facts = {"dataset": "refcoco", "splitBy": "unc", "model": "lavt_one"}
    return Results("RefCOCO+ (unc), lavt_one", facts, protocol, entries)


def test_csv_holds_every_number() -> None:
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(results(entry("val"), entry("testA"))))))
    assert [(line["split"], line["row"]) for line in lines] == [
        (split, row)
        for split in ("val", "testA")
        for row in ("measured", "low", "high", "published", "difference")
    ]
    by_row = {line["row"]: line for line in lines[:5]}
    assert by_row["measured"]["oIoU"] == "54.5455"
    assert by_row["published"]["oIoU"] == "72.7300"
    assert by_row["difference"]["oIoU"] == "-18.1845"
    assert float(by_row["low"]["mIoU"]) < float(by_row["measured"]["mIoU"])
    assert (by_row["measured"]["samples"], by_row["measured"]["objects"]) == ("4", "3")
    assert {line["model"] for line in lines} == {"lavt_one"}


def test_other_protocol_is_labelled_and_not_compared() -> None:
    result = results(entry(eval_mode="cat"), protocol="eval_mode=cat")
    rows = [line["row"] for line in csv.DictReader(io.StringIO(tables.as_csv(result)))]
    assert rows == ["measured", "low", "high", "published"]
    for form in (tables.as_text, tables.as_markdown, tables.as_latex):
        text = form(result).replace("\\_", "_")
        assert "val [eval_mode=cat]" in text
        assert "NOT the standard protocol: eval_mode=cat" in text
        assert "not compared" in text
        assert "other protocol: eval_mode=cat" in text
        assert "difference" not in text


@pytest.mark.parametrize("form", [tables.as_text, tables.as_markdown, tables.as_latex])
def test_standard_protocol(form: object) -> None:
    assert callable(form)
    text = form(results(entry()))
    assert "NOT" not in text
    assert "-18.18" in text
    assert "72.73" in text
    assert "published (LAVT, cross entropy)" in text
    assert "over objects, 10,000 draws" in text


def test_markdown_and_latex_have_equally_many_cells_in_each_row() -> None:
    result = results(entry(), entry("testA"))
    lines = [line for line in tables.as_markdown(result).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 3}
    latex = tables.as_latex(result)
    rows = [line for line in latex.splitlines() if " & " in line]
    assert len(rows) == 1 + 2 * 4
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(COLUMNS) + 1}
    assert all(row.endswith(r" \\") for row in rows)
    assert latex.count(r"\begin{tabular}{lrrrrrrrr}") == latex.count(r"\end{tabular}") == 1
    assert latex.count("{") == latex.count("}")


def test_latex_specials_are_escaped() -> None:
    assert tables.latex_escape("a_b & 95 % #1 {x}~^\\<|±") == (
        r"a\_b \& 95 \% \#1 \{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}"
        r"\textless{}\textbar{}$\pm$"
    )


def test_slip_in_a_published_row_is_told() -> None:
    result = results(entry("test", "crossvlt"))
    for form in (tables.as_text, tables.as_markdown, tables.as_latex):
        assert "Only its oIoU should be quoted" in form(result)
    row, lavt = ROWS["crossvlt"]["refcocog", "umd", "test"], ROWS["lavt"]["refcocog", "umd", "test"]
    assert row[:5] == lavt[:5]
    assert row[COLUMNS.index("mIoU")] == lavt[COLUMNS.index("oIoU")]


def test_terminal_lists_kinds_where_there_are_any() -> None:
    counts = StandardCounts(np.array([9, 1, 5]), np.array([10, 10, 10]))
    result = summary(counts, [1, 2, 3], ["size", "location", "size"])
    text = tables.as_text(Results("x", {}, "text=sent", [Entry("val", result)]))
    assert re.search(r"val \[text=sent\] kind: location +0\.00 .* 10\.00 +10\.00 +1\n", text)
    assert re.search(r"val \[text=sent\] kind: size +100\.00 .* 70\.00 +70\.00 +2\n", text)
    plain = summary(counts, [1, 2, 3], [None] * 3)
    assert "all" not in tables.as_text(Results("x", {}, "standard", [Entry("val", plain)]))


def test_no_object_pixel_at_all_prints_no_number() -> None:
    nothing = StandardCounts(np.zeros(2, np.int64), np.zeros(2, np.int64))
    result = Results("x", {}, "standard", [Entry("val", summary(nothing, [1, 2], [None] * 2))])
    assert result.entries[0].summary.as_dict()["all"]["bootstrap_95"]["oIoU"] is None
    for form in (tables.as_text, tables.as_markdown, tables.as_latex, tables.as_csv):
        assert "nan" not in form(result)


def test_tables_are_written_beside_the_results(tmp_path: Path) -> None:
    written = tables.write_tables(results(entry()), tmp_path / "sub" / "r.json")
    assert [path.name for path in written] == ["r.md", "r.tex", "r.csv"]
    assert all(path.read_text(encoding="utf-8") for path in written)
