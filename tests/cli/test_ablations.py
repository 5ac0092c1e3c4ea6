"""Ablations from train.py through a resumed run to test.py, and their benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import test as test_script
import train as train_script
from args import parse_test, parse_train, variant
from benchmarks import ablations, preset
from lib.errors import InputError
from lib.variants import CHOICES
from tests.scripts import Shapes, one_line_error

RUNS = ["--gate off --decoder_features V --pwam_norm batch", "--lang_path off --fusion concat"]


@pytest.mark.parametrize("options", RUNS)
def test_train_resume_test(
    options: str, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = options.split()
    recipe = [*shapes.train_options, "--epochs", "2", "--model_id", "a"]
    train_script.main([*recipe, *own, "--stop_after", "1"])
    last = "checkpoints/model_last_a.pth"
    message = one_line_error(train_script.main, [*recipe, "--resume", last])
    assert "would fit: " in message
    assert all(word in message for word in own)
    train_script.main([*recipe, *own, "--resume", last])
    content = torch.load(last, weights_only=True)
    assert content["epoch"] == 1
    evaluation = [*shapes.options, "--split", "val", "--results", "r.json", "--resume", last]
    test_script.main(evaluation)
    alone = json.loads(Path("r.json").read_text())
    assert alone["args"][own[0].removeprefix("--")] == own[1]
    test_script.main([*evaluation, *own])
    assert json.loads(Path("r.json").read_text())["splits"] == alone["splits"]
    published = f"{CHOICES[own[0].removeprefix('--')][0]}"
    message = one_line_error(test_script.main, [*evaluation, own[0], published])
    assert f"{own[0]} {published} contradicts {last}, which is of {own[0]} {own[1]}" in message


def test_shapes_do_not_tell_but_the_arguments_do(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*shapes.train_options, "--epochs", "1", "--model_id", "a", "--gate", "relu"]
    train_script.main(options)
    evaluation = ["--split", "val", "--resume", "checkpoints/model_last_a.pth"]
    message = one_line_error(test_script.main, [*shapes.options, *evaluation, "--gate", "tanh"])
    assert message.endswith("which is of --gate relu: leave the flag out")


def test_every_row_of_the_benchmark_is_an_ablation() -> None:
    result = set()
    for row in ablations.ROWS:
        if row == ablations.PUBLISHED:
            continue
        args = parse_train(row.split())
        result |= variant(args).changed().items() or {("seed", args.seed)}
    every = {(name, value) for name, values in CHOICES.items() for value in values[1:]}
    assert result == every | {("seed", 1), ("seed", 2)}


def test_the_benchmark_takes_the_quickstarts_options(tmp_path: Path) -> None:
    args = parse_train([*preset.preset("QS_MODEL", tmp_path), *preset.preset("QS_TRAIN", tmp_path)])
    assert (args.model, args.swin_type, args.lr) == ("lavt_one", "pico", 1e-3)
    assert args.loss == "ce:0.5,dice:0.5"
    assert args.refer_data_root == str(tmp_path)
    with pytest.raises(ValueError, match="no QS_NONE"):
        preset.preset("QS_NONE", tmp_path)


def row_of(mIoU: float) -> dict[str, Any]:
    return {"splits": {s: {"oIoU": 2.0, "mIoU": mIoU} for s in ablations.SPLITS}}


def test_the_benchmark_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(f"before\n{ablations.MARKS[0]}\nold\n{ablations.MARKS[1]}\nafter\n")
    options = ["--results", str(results), "--page", str(page), "--rows", ablations.PUBLISHED]
    done: list[str] = []

    def fake(row: str, args: argparse.Namespace) -> dict[str, Any]:
        if len(done) == 2:
            raise InputError("interrupted")
        done.append(row)
        return row_of(50.0 - len(done))

    monkeypatch.setattr(ablations, "run_row", fake)
    with pytest.raises(InputError, match="interrupted"):
        ablations.main([*options, "--fusion add", "--gate off"])
    ablations.main([*options, "--fusion add"])
    assert done == [ablations.PUBLISHED, "--fusion add"]
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| `--fusion add` |" in text
    assert "48.00 | -1.00 |" in text
    assert "Not measured yet: `--seed 1`," in text
    whole = ablations.table({name: row_of(50.0) for name in ablations.ROWS})
    assert "Not measured" not in whole
    assert whole.count("\n") == len(ablations.ROWS) + 1
    with pytest.raises(InputError, match="is of 1 epochs a row, not 2"):
        ablations.main([*options, "--epochs", "2"])
    with pytest.raises(InputError, match="--rows --gate silu: choose of"):
        ablations.main(["--rows=--gate silu"])


def test_a_row_is_trained_and_evaluated(shapes: Shapes, tmp_path: Path) -> None:
    args = ablations.parse(["--data", str(shapes.root), "--work", str(tmp_path)])
    row = ablations.run_row("--fusion add", args)
    assert set(row["splits"]) == {"val", "testA", "testB"}
    assert row["steps"] > 0
    assert not list(tmp_path.glob("*/checkpoints/model_last*"))


def test_the_page_has_the_table_of_the_results() -> None:
    record = json.loads(ablations.RESULTS.read_text())
    assert ablations.table(record["rows"]) in ablations.PAGE.read_text()


def test_train_and_test_take_the_same_ablations() -> None:
    options = ["--gate", "gelu", "--pwam_combine", "add"]
    asked = variant(parse_train(options))
    assert asked.changed() == {"gate": "gelu", "pwam_combine": "add"}
    taken = vars(parse_test([*options, "--resume", "a.pth"]))
    assert {name: taken[name] for name in CHOICES if name in taken} == asked.changed()
