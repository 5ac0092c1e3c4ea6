"""Tables from test.py's results, and the figure of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from lib import checkpoint
from lib.errors import InputError
from lib.evaluation.metrics import Metrics, summarise
from lib.segmentation import build_model
from refer.refer import REFER
from tests.refer_files import CC0_ROOT, TINY_BERT
from tools import quickstart_report as report


def metrics(*ious: int) -> Metrics:
    """Of samples with these IoUs, percent."""
    return summarise(np.array(ious), np.full(len(ious), 100))


def rows() -> dict[str, Metrics]:
    return {
        "all": metrics(80, 60),
        "kind: colour": metrics(80),
        "kind: place": metrics(60),
        report.RIGHT: metrics(80, 60),
        report.WRONG: metrics(10, 5),
    }


def content(splits: dict[str, dict[str, Metrics]], **args: Any) -> dict[str, Any]:
    table = {s: {name: m.as_dict() for name, m in r.items()} for s, r in splits.items()}
    return {"splits": table, "args": args}


def test_tables_hold_splits_control_and_kinds() -> None:
    plain = {"all": metrics(50), "kind: place": metrics(50)}  # a split without a control
    lines = report.report({"val": rows(), "testA": plain}).splitlines()
    result = {line.split("  ")[0]: line.split() for line in lines}
    assert result["val"][-3:] == ["70.00", "70.00", "2"]
    assert result["testA"][-1] == "1"
    assert result["val, difference"][-2] == "62.50"
    assert result["val, another object's"][-2] == "7.50"
    assert result["colour"] == ["colour", "80.00", "(1)", "-"]
    assert result["place"] == ["place", "60.00", "(1)", "50.00", "(1)"]
    assert not any(line.startswith("testA, ") for line in lines)


def test_tables_without_control_and_kinds() -> None:
    text = report.report({"val": {"all": metrics(50)}})
    assert "sentence" not in text
    assert "kind" not in text


def test_results_come_back_as_written(tmp_path: Path) -> None:
    empty = summarise(np.array([0]), np.array([0]))  # its overall IoU is nan
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content({"val": rows(), "test": {"all": empty}}, ape=28)))
    splits, args = report.read_results(path)
    assert splits["val"] == rows()
    assert np.isnan(splits["test"]["all"].oIoU)
    assert args == {"ape": 28}


BAD = ["", "[]", "{}", '{"splits": {}, "args": {}}', '{"splits": {"val": {}}, "args": {}}']


@pytest.mark.parametrize("text", [*BAD, '{"splits": {"val": {"all": {"mIoU": 1}}}, "args": {}}'])
def test_results_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"is not what test\.py writes"):
        report.read_results(tmp_path / "r.json")


def test_results_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist: run test\.py"):
        report.main(["--results", str(tmp_path / "r.json")])
    with pytest.raises(InputError, match="--results"):
        report.main([])


def test_chooses_two_objects_of_an_image() -> None:
    dataset = ReferDataset(REFER(CC0_ROOT, "refcoco"), "train", load_tokenizer(TINY_BERT), 56)
    chosen = report.choose(dataset, 2)
    assert 1 <= len(chosen) <= 2
    for samples in chosen:
        records = [dataset.records[i] for i in samples]
        assert len({r.image_id for r in records}) == 1
        assert len({r.ann_ids for r in records}) == len(records)
    images = [dataset.records[samples[0]].image_id for samples in chosen]
    assert len(set(images)) == len(images)


def test_draws_with_the_options_of_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build_model("lavt", swin_type="micro", window_size=7, text_config=TINY_BERT)
    weights = tmp_path / "w.pth"
    checkpoint.write_checkpoint(model.to_published(), weights)
    evaluated: dict[str, Any] = {
        "swin_type": "micro",
        "img_size": 56,
        "ck_bert": str(TINY_BERT),
        "bert_tokenizer": str(TINY_BERT),
        "refer_data_root": "elsewhere",
        "resume": str(weights),
        "split": "val,train",
        "device": "cpu",
    }
    results = tmp_path / "r.json"
    results.write_text(json.dumps(content({"val": rows()}, **evaluated)))
    argv = ["--results", str(results), "--output", str(tmp_path / "out")]
    report.main([*argv, "--refer_data_root", str(CC0_ROOT), "--pictures", str(tmp_path / "no.png")])
    with Image.open(tmp_path / "out" / "predictions.png") as image:
        assert image.width > 600
    printed = capsys.readouterr().out
    assert "val, difference" in printed
    assert f"image: {tmp_path / 'out' / 'predictions.png'}\n" in printed
    assert "no.png (missing)" in printed
