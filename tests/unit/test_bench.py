"""The benchmarks of speed: what they write, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench, evaluation
from lib.errors import InputError
from tests.scripts import Shapes

TEXT = f"before\n{bench.MARKS[0]}old\n{bench.MARKS[1]}after\n"


def test_tables_go_between_the_marks() -> None:
    once = bench.put_into(TEXT, "| new \\1 |\n")
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "| new \\1 |" in once
    assert "old" not in once
    assert bench.put_into(once, "| new \\1 |\n") == once
    with pytest.raises(InputError, match="marks"):
        bench.put_into("a README without", "| new |")


def test_the_readme_has_the_marks() -> None:
    assert "| x |" in bench.put_into(bench.README.read_text(), "| x |")


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
