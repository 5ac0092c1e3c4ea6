"""The benchmarks of speed: what they write, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench, evaluation
from benchmarks.pages import put_between
from lib.errors import InputError
from tests.scripts import Shapes


def test_tables_go_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<a>\nold\n<b>\nafter\n")
    for _ in range(2):
        put_between(page, ("<a>", "<b>"), "| new \\1 |")
        assert page.read_text() == "before\n<a>\n| new \\1 |\n<b>\nafter\n"
    with pytest.raises(InputError, match="marks"):
        put_between(page, ("<a>", "<c>"), "| new |")


def test_the_readme_has_the_marks(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(bench.README.read_text())
    put_between(copy, bench.MARKS, "| x |")
    assert "| x |" in copy.read_text()


def test_evaluation_ways_agree(
    shapes: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small run: each way of evaluating finds the same, and is timed."""
    out = tmp_path / "out.json"
    options = ["--refer_data_root", str(shapes.root), "--ck_bert", str(shapes.root / "bert")]
    options += ["--swin_type", "micro", "--img_size", "56", "--batch-size", "3"]
    options += ["--sentences", "8", "--rounds", "1", "--workers", "0", "--device", "cpu"]
    evaluation.main([*options, "--output", str(out)])
    result = json.loads(out.read_text())
    assert result["same_metrics"]
    assert result["pictures"] < result["sentences"] == 8
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert [row["amp"] for row in result["rows"]] == ["off"] * 5 + ["bf16"] * 4
    exact = [{**m, "way": ""} for m in result["metrics"] if m["amp"] == "off"]
    assert len(exact) == 3
    assert all(m == exact[0] for m in exact)
    assert "one sentence at a time" in capsys.readouterr().out
    with pytest.raises(InputError, match="--amp 8bit"):
        evaluation.main([*options, "--amp", "8bit"])
