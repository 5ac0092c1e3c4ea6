"""The quickstart's preset, its cost, and the benchmark that trains it with several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from args import parse_train
from benchmarks import compare_models, preset, quickstart
from lib.errors import InputError
from tests.scripts import Shapes


def options(root: Path, name: str = "lavt_one") -> list[str]:
    own = [*preset.preset("QS_MODEL", root), *preset.preset("QS_TRAIN", root)]
    return [*own, "--model", name]


def test_flops_of_a_step(shapes: Shapes) -> None:
    """Those of the quickstart's first preset are known; they grow with the batch."""
    own = ["--swin_type", "micro", "--img_size", "112", "--ape", "28", "--batch_size", "16"]
    own += ["--model", "lavt_one", "--drop_path", "0", "--lang_layers", "all"]
    own += ["--text_from_scratch", "--ck_bert", str(shapes.root / "bert")]
    flops = preset.step_flops(own)
    assert flops == 48_708_796_416
    assert preset.step_flops([*own, "--batch_size", "4", "--accumulate", "2"]) == flops / 2


def test_a_run(shapes: Shapes, tmp_path: Path) -> None:
    """train.py and test.py, on a few images."""
    own = ["--loss", "ce", "--workers", "0", "--epochs", "1", "--batch_size", "4"]
    flags = [*options(shapes.root), *own]
    found = preset.train_and_test(tmp_path, flags, control=True)
    assert found["splits"].keys() == set(preset.SPLITS) >= found["control"].keys() >= {"val"}
    assert found["tflop"] == found["steps"] * preset.step_flops(flags) / 1e12
    assert found["seconds"] > 0


def result(score: float) -> dict[str, Any]:
    splits = {split: {"oIoU": score - 5, "mIoU": score} for split in preset.SPLITS}
    cost = {"tflop": 30.0, "seconds": 500.0, "seconds_per_step": 0.5, "peak_memory_gb": 1.0}
    return {"splits": splits, "control": {"val": 60.0}, **cost}


def test_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[list[str]] = []

    def fake(folder: Path, options: list[str], *, control: bool) -> object:
        assert control
        done.append(options)
        return result(70.0 + 10 * len(done))

    monkeypatch.setattr(quickstart, "train_and_test", fake)
    own = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--options=--lr 1"]
    quickstart.main([*own, "--seeds", "3"])
    quickstart.main([*own, "--seeds", "3", "4"])  # goes on where it was
    assert [options[-4:] for options in done] == [
        ["--lr", "1", "--seed", "3"],
        ["--lr", "1", "--seed", "4"],
    ]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| mean | 80.00 | 85.00 | 80.00 |")
    assert last.endswith("| 60.00 | 30.0 | 500 |")
    written = json.loads((tmp_path / "out/seeds.json").read_text())
    assert list(written["rows"]) == ["3", "4"]
    with pytest.raises(InputError, match="other --options"):
        quickstart.main([*own[:-1], "--seeds", "3"])


def test_models(
    shapes: Shapes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same seeds and epochs for each; the table has the means."""
    done: list[list[str]] = []

    def fake(folder: Path, options: list[str], *, control: bool) -> object:
        done.append(options)
        return result(70.0 + 10 * len(done))

    monkeypatch.setattr(quickstart, "train_and_test", fake)
    own = ["--data", str(shapes.root), "--output", str(tmp_path / "out"), "--epochs", "7"]
    compare_models.main([*own, "--seeds", "1", "2"])
    given = [parse_train(options) for options in done]
    assert [(a.model, a.seed, a.epochs, a.swin_type) for a in given] == [
        (name, seed, 7, "micro") for name in ("lavt_one", "crossvlt") for seed in (1, 2)
    ]
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].startswith("| lavt_one | 2 | 80.00 | 85.00 |")
    assert rows[1].startswith("| crossvlt | 2 | 100.00 | 105.00 |")
    written = json.loads((tmp_path / "out/compare.json").read_text())
    assert list(written["models"]["crossvlt"]["rows"]) == ["1", "2"]
