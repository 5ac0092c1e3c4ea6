"""A checkpoint alone is enough: every tool gives the same masks, without a flag of the model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import demo_inference
import test as test_script
import train
from data.refshapes.generate import generate
from lib.predictor import Predictor
from tests.scripts import Shapes, jsonl, one_line_error
from tools import quickstart_report
from tools.export import __main__ as export
from tools.report import __main__ as report

UNUSUAL = ["--mha", "2-1-4-2", "--pwam_norm", "layer", "--gate", "sigmoid", "--max_tokens", "12"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a trained model whose BERT folder is gone."""
    folder = tmp_path_factory.mktemp("door")
    root = folder / "data"
    generate(root, level="easy", seed=3, scenes=8, val_scenes=3, test_scenes=2)
    options = [*Shapes(root).train_options, *UNUSUAL, "--model_id", "odd", "--epochs", "1"]
    with _chdir(folder):
        train.main([*options, "--output_dir", "checkpoints"])
    (root / "bert").rename(folder / "moved")
    return folder


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


CHECKPOINT = "checkpoints/model_best_odd.pth"
DATA = ["--refer_data_root", "data", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def predictions(here: Path) -> list[dict[str, Any]]:
    """Of test.py on the validation split."""
    with _chdir(here):
        argv = ["--resume", CHECKPOINT, "--split", "val", "--predictions", "p.jsonl", *DATA]
        test_script.main([*argv, "--results", "r.json"])
    return jsonl(here / "p.jsonl")


def masks_of(records: list[dict[str, Any]]) -> list[np.ndarray]:
    return [coco.decode(r["segmentation"]).astype(bool) for r in records]


def image_of(record: dict[str, Any]) -> Path:
    return next(Path("data/images").rglob(record["file_name"]))


def test_test_evaluates_as_trained(predictions: list[dict[str, Any]]) -> None:
    content = json.loads(Path("r.json").read_text())
    args = content["args"]
    assert (args["model"], args["swin_type"], args["mha"]) == ("lavt", "micro", "2-1-4-2")
    assert (args["img_size"], args["max_tokens"]) == (56, 12)
    assert content["protocol"]["label"] == "img_size=56 max_tokens=12"
    assert len(predictions) == content["splits"]["val"]["all"]["samples"] > 5
    assert any(0 < mask.mean() < 1 for mask in masks_of(predictions))


def test_the_predictor_gives_the_same_masks(predictions: list[dict[str, Any]]) -> None:
    predictor = Predictor.from_checkpoint(CHECKPOINT, "cpu")
    pairs = [(image_of(r), r["sentence"]) for r in predictions]
    for record, mask, (found,) in zip(
        predictions, masks_of(predictions), predictor.predict_batch(pairs), strict=True
    ):
        assert np.array_equal(found.mask, mask)
        assert found.score == pytest.approx(record["score"], abs=1e-6)


def test_the_demo_gives_the_same_masks(predictions: list[dict[str, Any]]) -> None:
    record, mask = predictions[0], masks_of(predictions)[0]
    argv = ["--image", str(image_of(record)), "--sentence", record["sentence"], "--mask"]
    demo_inference.main([*argv, "--resume", CHECKPOINT, "--output", "d/o.png", "--device", "cpu"])
    assert np.array_equal(np.asarray(Image.open("d/o.mask.png")) > 0, mask)


def test_the_folder_gives_the_same_numbers(predictions: list[dict[str, Any]]) -> None:
    to = ["--format", "pretrained", "--output", "shared"]
    export.main(["--resume", CHECKPOINT, *to, "--results", "r.json"])
    card = Path("shared/README.md").read_text()
    row = json.loads(Path("r.json").read_text())["splits"]["val"]["all"]
    assert f"| {row['oIoU']:.2f} | {row['mIoU']:.2f} | {row['samples']} |" in card
    assert "refcoco (unc), protocol: img_size=56 max_tokens=12" in card
    assert "| mha | 2-1-4-2 |" in card
    argv = ["--resume", "shared", "--split", "val", "--predictions", "p2.jsonl", *DATA]
    test_script.main([*argv, "--results", "r2.json"])
    assert jsonl(Path("p2.jsonl")) == predictions
    found = Predictor.from_pretrained("shared", device="cpu").predict(
        image_of(predictions[0]), predictions[0]["sentence"]
    )
    assert np.array_equal(found[0].mask, masks_of(predictions)[0])
    wrong = json.loads(Path("r.json").read_text())
    wrong["checkpoint"]["sha256"] = "0"
    Path("wrong.json").write_text(json.dumps(wrong))
    message = one_line_error(
        export.main, ["--resume", CHECKPOINT, *to[:-1], "other", "--results", "wrong.json"]
    )
    assert "are of another checkpoint" in message
    assert not Path("other").exists()


def test_reports_need_no_flag_of_the_model(predictions: list[dict[str, Any]]) -> None:
    argv = ["--resume", CHECKPOINT, "--refer_data_root", "data", "--split", "val"]
    report.main([*argv, "--output", "page/report.html"])
    assert jsonl(Path("page/report.jsonl")) == predictions
    assert "<html" in Path("page/report.html").read_text()
    for wrong in (["--split", "val", "p.jsonl"], ["--resume", CHECKPOINT, "p.jsonl"], []):
        one_line_error(report.main, wrong)
    with pytest.raises(SystemExit) as ended:
        report.main(["--resume", "nowhere.pth", "--refer_data_root", "data"])
    assert ended.value.code == 2
    with contextlib.redirect_stdout(io.StringIO()):
        quickstart_report.main(["--results", "r.json", "--resume", CHECKPOINT, "--output", "q"])
    assert Image.open("q/predictions.png").width > 100


def test_another_size_is_told_and_in_the_label(
    predictions: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--resume", CHECKPOINT, "--split", "val", "--img_size", "480", "--max_tokens", "20"]
    test_script.main([*argv, *DATA, "--results", "r3.json"])
    said = "".join(capsys.readouterr())
    assert "warning: --img_size 480: the checkpoint was trained with 56" in said
    assert "warning: --max_tokens 20: the checkpoint was trained with 12" in said
    protocol = json.loads(Path("r3.json").read_text())["protocol"]
    assert protocol["label"] == "trained_img_size=56 trained_max_tokens=12"
    assert not protocol["standard"]
    assert "NOT the standard protocol: trained_img_size=56" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mha", "1-1-1-1"], "--mha 1-1-1-1 contradicts .*--mha 2-1-4-2"),
        (["--window12"], "--window12 contradicts"),
        (["--swin_type", "base"], "--swin_type base contradicts .*--swin_type micro"),
        (["--pwam_norm", "instance"], "--pwam_norm instance contradicts .*layer"),
    ],
)
def test_a_contradiction_is_one_line_in_every_script(
    flags: list[str], says: str, predictions: list[dict[str, Any]]
) -> None:
    common = ["--resume", CHECKPOINT, *flags, "--device", "cpu"]
    demo = ["--image", str(image_of(predictions[0])), "--sentence", "red", "--output", "never"]
    for main, argv in ((test_script.main, DATA), (demo_inference.main, demo)):
        assert re.search(says, one_line_error(main, [*common, *argv]))
    assert not Path("never").exists() or not list(Path("never").iterdir())
