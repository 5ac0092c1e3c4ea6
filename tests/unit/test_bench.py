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


def test_the_page_has_the_marks(tmp_path: Path) -> None:
    copy = tmp_path / "speed.md"
    copy.write_text(bench.PAGE.read_text())
    put_between(copy, bench.MARKS, "| x |")
    assert "| x |" in copy.read_text()


def test_evaluation(shapes: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small run of the benchmark."""
    out = tmp_path / "out.json"
    options = ["--refer_data_root", str(shapes.root), "--ck_bert", str(shapes.root / "bert")]
    options += ["--swin_type", "micro", "--img_size", "56", "--batch_size", "3"]
    options += ["--expressions", "8", "--rounds", "1", "--workers", "0", "--device", "cpu"]
    evaluation.main([*options, "--output", str(out)])
    result = json.loads(out.read_text())
    assert result["images"] < result["expressions"] == 8
    assert [row["amp"] for row in result["rows"]] == ["off", "bf16"]
    for row in result["rows"]:
        assert row["evaluation"] > 0
        assert row["forward"] > 0
        assert row["metrics"]["samples"] == 8
    assert "expressions a second" in capsys.readouterr().out
    with pytest.raises(InputError, match="--amp 8bit"):
        evaluation.main([*options, "--amp", "8bit"])
