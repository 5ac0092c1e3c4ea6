"""Reading metrics.jsonl as runs leave it, and drawing it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib.errors import InputError
from tools import curves


def step(number: int, loss: float | None = 1.0, epoch: int = 0) -> dict[str, Any]:
    return {"kind": "step", "epoch": epoch, "step": number, "loss": loss, "lr": 1e-3 / number}


def epoch(number: int, at: int, oIoU: float | None = None) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": "epoch", "epoch": number, "step": at, "loss": 0.5}
    return record | ({"val": {"oIoU": oIoU, "mIoU": 60.0, "precision": {}}} if oIoU else {})


def write_run(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(r) + "\n" for r in records) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_reads_steps_epochs_and_validations(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [step(10, 2.0), step(20, 1.0), epoch(0, 20, 55.0)])
    run = curves.read_run(folder, "a")
    assert (run.loss.steps, run.loss.values) == ([10, 20], [2.0, 1.0])
    assert run.lr.values == [1e-4, 5e-5]
    assert (run.oIoU.steps, run.oIoU.values, run.mIoU.values) == ([20], [55.0], [60.0])
    assert run.unreadable == 0
    assert curves.read_run(folder / "metrics.jsonl", "a").loss == run.loss


def test_truncated_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [step(10)], tail='{"kind": "step", "epo')
    run = curves.read_run(folder, "a")
    assert run.loss.steps == [10]
    assert run.unreadable == 1


def test_null_becomes_a_gap(tmp_path: Path) -> None:
    run = curves.read_run(write_run(tmp_path / "a", [step(10, None), step(20, 3.0)]), "a")
    assert math.isnan(run.loss.values[0])
    assert curves.smoothed(run.loss.values)[1] == 3.0


def test_resumed_run_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    dead = [step(10, 9.0), step(20, 9.0), step(30, 9.0), step(40, 9.0)]
    run = curves.read_run(write_run(tmp_path / "a", [*dead, step(30, 1.0), step(35, 2.0)]), "a")
    assert run.loss.steps == [10, 20, 30, 35]
    assert run.loss.values == [9.0, 9.0, 1.0, 2.0]


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert curves.smoothed([4.0] * 50) == pytest.approx([4.0] * 50)
    rising = curves.smoothed([float(i) for i in range(100)], span=10)
    assert rising == sorted(rising)
    assert rising[-1] == pytest.approx(99 - 9, abs=0.1)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir(parents=True)
    assert curves.names(paths) == [str(paths[0]), str(paths[1]), "b"]


@pytest.mark.parametrize("content", ["", "\n\n", "no json\n", "[]\n3\n", '{"kind": "other"}\n'])
def test_nothing_to_draw(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "a", [], tail=content)
    with pytest.raises(InputError, match="holds no step or epoch"):
        curves.read_run(folder, "a")


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: give the folder of a run"):
        curves.main([str(tmp_path / "nowhere")])


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_run(tmp_path / "a", [step(10)])
    with pytest.raises(InputError, match=r"pip install -r requirements-tools\.txt"):
        curves.main([str(folder), "--output", str(tmp_path / "c.png")])


def test_draws_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    full = [step(i, 1 / i) for i in range(1, 40)] + [epoch(0, 20, 40.0), epoch(1, 40, 50.0)]
    a = write_run(tmp_path / "a", full, tail='{"half')
    b = write_run(tmp_path / "b", [step(10), step(20, None)])  # without validations
    c = write_run(tmp_path / "c", [epoch(0, 5)])  # without steps
    output = tmp_path / "new" / "curves.png"
    curves.main([str(a), str(b), str(c), "--output", str(output)])
    with Image.open(output) as image:
        assert image.width > image.height > 300
    printed = capsys.readouterr().out
    assert "a: 1 unreadable line(s) ignored" in printed
    assert str(output) in printed


def test_draws_a_run_without_validation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "a", [step(10, None)])
    curves.main([str(folder), "--output", str(tmp_path / "c.svg")])
    assert "<svg" in (tmp_path / "c.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "says"), [("c.xyz", "ending in .png"), ("file/c.png", "cannot")])
def test_output_that_cannot_be(tmp_path: Path, name: str, says: str) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    folder = write_run(tmp_path / "a", [step(10)])
    with pytest.raises(InputError, match=says):
        curves.main([str(folder), "--output", str(tmp_path / name)])
