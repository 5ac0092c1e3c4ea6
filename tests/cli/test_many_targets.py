"""train.py and test.py on gRefCOCO, Ref-ZOM and the remote-sensing datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import test as test_script
import train as train_script
from lib.predictor import Predictor
from refer import refcoco_m
from tests.by_hand import Sample, by_hand_zero, by_table
from tests.many_targets import (
    CC0_IMAGES,
    write_grefcoco,
    write_ref_zom,
    write_refcoco_m,
    write_rrsisd,
    write_txt,
)
from tests.scripts import Shapes, jsonl, one_line_error
from tools import score

LAST = "checkpoints/model_last_lavt.pth"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(root: Path, name: str) -> list[str]:
    return ["--refer_data_root", str(root), "--dataset", name]


def train(shapes: Shapes, *words: str) -> None:
    train_script.main([*shapes.train_options, "--epochs", "2", *words])


def evaluate(shapes: Shapes, split: str, *words: str) -> tuple[dict[str, Any], list[Any]]:
    out = ["--results", "r.json", "--predictions", "p.jsonl", "--split", split]
    test_script.main([*shapes.options, *out, "--resume", LAST, *words])
    return json.loads(Path("r.json").read_text()), jsonl(Path("p.jsonl"))


def samples(lines: list[Any], least: int | None = None) -> list[Sample]:
    """From the masks; the decision from their pixels, or as written."""
    result = []
    for line in lines:
        mask, truth = (coco_mask.decode(line[k]).astype(bool) for k in ("segmentation", "truth"))
        none = line["predicted_no_target"] if least is None else bool(mask.sum() < least)
        assert none == line["predicted_no_target"]
        assert line["no_target"] == (line["ann_ids"] == []) == (not truth.any())
        counts = int((mask & truth).sum()), int((mask | truth).sum())
        assert counts == (line["intersection"], line["union"])
        result.append((*counts, line["no_target"], none))
    return result


def agrees(found: dict[str, Any], row: dict[str, float]) -> None:
    flat = {f"P@{k}": v for k, v in found["precision"].items()} | found
    for name, value in row.items():
        if np.isnan(value):
            assert flat[name] is None, name
        else:
            assert flat[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("head", [True, False])
def test_grefcoco(
    head: bool, shapes: Shapes, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_grefcoco(here / "data", ".p" if head else ".json")
    flags = ["--no_target_head"] if head else ["--no_target_pixels", "50"]
    train(shapes, *data(root, "grefcoco"), *flags)
    printed = capsys.readouterr().out
    assert "8 samples, 2 steps per epoch" in printed
    assert ("no_target 0." in printed) == head
    assert "cIoU" in printed
    records = jsonl(Path("models/lavt/metrics.jsonl"))
    steps = [r for r in records if r["kind"] == "step"]
    assert all(set(r["losses"]) == ({"dice", "no_target"} if head else {"dice"}) for r in steps)
    (*_, epoch) = [r for r in records if r["kind"] == "epoch"]
    assert {"cIoU", "gIoU", "N_acc", "T_acc"} <= epoch["val"].keys()
    label = f"img_size=56 no_target_pixels={'head' if head else 50}"
    assert epoch["protocol"] == f"val_expressions=one {label}"
    # At the image's size masks give the counts again.
    content, lines = evaluate(shapes, "val", *data(root, "grefcoco"), "--eval_size", "original")
    assert content["protocol"]["label"] == f"eval_size=original {label}"
    assert content["args"]["no_target_head"] is head
    agrees(content["splits"]["val"]["all"], by_table(samples(lines, None if head else 50)))
    for ending in ("md", "tex", "csv"):
        text = Path(f"r.{ending}").read_text().replace("\\_", "_")
        assert label in text
        assert "gIoU" in text
    printed = capsys.readouterr().out
    assert "gIoU = " in printed
    assert "mIoU" not in printed
    # At the model's size, of two splits; the last has no sample without target.
    content, lines = evaluate(shapes, "testA,testB", *data(root, "grefcoco"))
    for split in ("testA", "testB"):
        part = [x for x in lines if x["split"] == split]
        row = [
            (x["intersection"], x["union"], x["no_target"], x["predicted_no_target"]) for x in part
        ]
        agrees(content["splits"][split]["all"], by_table(row))
    assert content["splits"]["testB"]["all"]["N_acc"] is None
    score.main(["p.jsonl", "--json", "s.json"])
    assert json.loads(Path("s.json").read_text())["splits"] == content["splits"]
    predictor = Predictor.from_checkpoint(LAST, "cpu")
    assert predictor.settings["no_target_head"] is head
    assert predictor.predict(next(CC0_IMAGES.iterdir()), "the eye")[0].mask.any() in (True, False)


def test_a_head_may_be_left_aside(shapes: Shapes, here: Path) -> None:
    root = write_grefcoco(here / "data")
    train(shapes, *data(root, "grefcoco"), "--no_target_head", "--epochs", "1")
    words = [*data(root, "grefcoco"), "--no_target_pixels", "0", "--eval_size", "original"]
    content, lines = evaluate(shapes, "val", *words)
    agrees(content["splits"]["val"]["all"], by_table(samples(lines, 1)))
    assert "no_target_pixels=0" in content["protocol"]["label"]
    assert content["protocol"]["standard"] is False
    # The published network's weights start a run with a head, and a head is not lost in silence.
    train(shapes, *data(root, "grefcoco"), "--epochs", "1", "--model_id", "plain")
    start = ["--init_from", "checkpoints/model_last_plain.pth", "--model_id", "new"]
    train(shapes, *data(root, "grefcoco"), "--epochs", "1", *start, "--no_target_head")
    words = [*shapes.train_options, *data(root, "grefcoco"), "--resume", LAST, "--epochs", "3"]
    assert "--no_target_head" in one_line_error(train_script.main, words)


def test_ref_zom(shapes: Shapes, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_ref_zom(here / "data")
    words = [*data(root, "ref-zom"), "--val_split", "test", "--spread_no_target"]
    train(shapes, *words)
    printed = capsys.readouterr().out
    assert "10 samples, 2 steps per epoch" in printed
    content, lines = evaluate(shapes, "test", *data(root, "ref-zom"), "--eval_size", "original")
    assert content["args"]["splitBy"] == "final"
    assert content["protocol"]["label"] == "eval_size=original img_size=56"
    agrees(content["splits"]["test"]["all"], by_hand_zero(samples(lines, 1)))
    assert "Acc = " in capsys.readouterr().out
    assert "| Acc |" in Path("r.md").read_text()
    message = one_line_error(train_script.main, [*shapes.train_options, *data(root, "ref-zom")])
    assert "has no split 'val'; choose from train, test" in message


@pytest.mark.parametrize("name", ["grefcoco", "ref-zom"])
def test_a_resumed_run_is_the_same_to_the_bit(name: str, shapes: Shapes, here: Path) -> None:
    if name == "grefcoco":
        words = [*data(write_grefcoco(here / "data"), name), "--no_target_head", "--loss", "ce"]
    else:
        words = [*data(write_ref_zom(here / "data"), name), "--val_split", "test"]
        words += ["--spread_no_target"]
    train(shapes, *words, "--model_id", "whole")
    train(shapes, *words, "--model_id", "parts", "--stop_after", "1")
    last = "checkpoints/model_last_{}.pth"
    train(shapes, *words, "--model_id", "parts", "--resume", last.format("parts"))
    first, second = (torch.load(last.format(run), weights_only=True) for run in ("whole", "parts"))
    assert first["epoch"] == second["epoch"] == 1
    assert first["best_oIoU"] == second["best_oIoU"]
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key
    states = first["optimizer"]["state"], second["optimizer"]["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.equal(v, states[1][number][k]) for k, v in state.items())


@pytest.mark.parametrize("name", ["rrsisd", "refsegrs", "risbench"])
def test_remote_sensing(name: str, shapes: Shapes, here: Path) -> None:
    root = write_rrsisd(here / "data") if name == "rrsisd" else write_txt(here / "data", name)
    train(shapes, *data(root, name), "--workers", "1")
    content, lines = evaluate(shapes, "val,test", *data(root, name))
    assert content["protocol"]["label"] == "img_size=56"
    assert [len(lines), *(content["splits"][s]["all"]["samples"] for s in ("val", "test"))] == [
        *(5, 3, 2)
    ]
    assert "no_target" not in lines[0]
    assert {"oIoU", "mIoU", "precision"} <= content["splits"]["val"]["all"].keys()
    assert "published" not in Path("r.md").read_text()  # this is another, smaller split


def test_refcoco_m_is_for_evaluation(shapes: Shapes, here: Path) -> None:
    pytest.importorskip("pyarrow")
    root = write_refcoco_m(write_rrsisd(here / "data"))
    train(shapes, *data(root, "rrsisd"), "--epochs", "1")
    words = [*shapes.options, *data(root, "refcoco-m"), "--resume", LAST, "--split", "val"]
    assert "image folder" in one_line_error(test_script.main, words)
    refcoco_m.unpack(root)
    content, lines = evaluate(shapes, "val", *data(root, "refcoco-m"))
    assert content["splits"]["val"]["all"]["samples"] == len(lines) == 24


def test_flags_that_have_no_meaning(shapes: Shapes, here: Path) -> None:
    words = [*shapes.train_options, "--spread_no_target"]
    assert "--spread_no_target: every sample of refcoco(unc) train has a target" in one_line_error(
        train_script.main, words
    )
