"""A dataset of one's own, in REFER's layout, works under its folder's name, as people write it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

import test as test_script
import train as train_script
from refer import REFER, check
from tests.scripts import Shapes, jsonl, one_line_error, run
from tools.report import __main__ as report

IMAGES = "images/aerial/JPEGImages"


@pytest.fixture(scope="module")
def own(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """Files named as on Windows, ids as text; some images were halved."""
    root = tmp_path_factory.mktemp("own") / "data"
    shutil.copytree(shapes.root, root)
    (root / "refcoco").rename(root / "aerial")
    (root / IMAGES).parent.mkdir()
    (root / "images/mscoco/images/train2014").rename(root / IMAGES)
    path = root / "aerial" / "instances.json"
    instances = json.loads(path.read_text())
    for record in instances["images"]:
        record |= {"id": str(record["id"]), "width": float(record["width"])}
        record["file_name"] = "C:\\data\\JPEGImages\\" + record["file_name"].replace("jpg", "JPG")
    for annotation in instances["annotations"]:
        annotation["image_id"] = float(annotation["image_id"])
    path.write_text(json.dumps(instances))
    for image in sorted((root / IMAGES).iterdir())[::2]:
        with Image.open(image) as whole:
            whole.reduce(2).save(image)
    return Shapes(root)


def named(own: Shapes) -> list[str]:
    return ["--dataset", "aerial", "--image_root", str(own.root / IMAGES)]


def test_the_whole_road(own: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--epochs", "1", "--model_id", "a", "--workers", "2"]
    done = run(tmp_path, "train.py", *own.train_options, *named(own), *few)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("a resized copy") == 1
    resume = ["--resume", "checkpoints/model_best_a.pth"]
    files = ["--results", "r.json", "--predictions", "p.jsonl", "--eval_size", "original"]
    done = run(
        tmp_path, "test.py", *own.options, *named(own), *resume, *files, "--split", "val,testA"
    )
    assert done.returncode == 0, done.stderr
    assert "aerial" in done.stdout
    assert "refcoco" not in done.stdout.lower()
    assert json.loads((tmp_path / "r.json").read_text())["args"]["dataset"] == "aerial"
    page = tmp_path / "report.html"
    report.main([str(tmp_path / "p.jsonl"), *named(own), "--output", str(page)])
    assert "cannot be shown" not in capsys.readouterr().out
    image = next((own.root / IMAGES).iterdir())
    ask = ["--image", str(image), "--sentence", "it", "--output", "o.png"]
    done = run(tmp_path, "demo_inference.py", *own.options, *named(own), *resume, *ask)
    assert done.returncode == 0, done.stderr
    with Image.open(image) as seen, Image.open(tmp_path / "o.png") as drawn:
        assert seen.size == drawn.size
    done = run(tmp_path, "demo_inference.py", *own.options, *resume, *ask, "--max_pixels", "99")
    assert done.returncode == 2
    assert "--max_pixels 99" in done.stderr


def test_expressions_of_nothing(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes.root, root)
    (root / "refcoco").rename(root / "mydata")
    path = root / "mydata" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    for split in ("train", "val"):
        next(ref for ref in refs if ref["split"] == split)["ann_id"] = []
    path.write_bytes(pickle.dumps(refs))
    own = Shapes(root)
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "mydata", "--model_id", "a"]
    error = one_line_error(train_script.main, [*own.train_options, *data, "--no_target_head"])
    assert "--no_target_head is for --dataset grefcoco" in error
    train_script.main([*own.train_options, *data, "--epochs", "1"])
    words = ["--resume", "checkpoints/model_best_a.pth", "--split", "val,testA"]
    test_script.main([*own.options, *words, "--results", "r.json", "--predictions", "p.jsonl"])
    splits = {k: v["all"] for k, v in json.loads(Path("r.json").read_text())["splits"].items()}
    lines = [line for line in jsonl(Path("p.jsonl")) if line["split"] == "val"]
    without = [line for line in lines if line["no_target"]]
    empty = [line for line in without if line["predicted_no_target"]]
    assert without
    assert splits["val"]["Acc"] == pytest.approx(100 * len(empty) / len(without))
    assert splits["val"]["targets"] == len(lines) - len(without)
    assert splits["testA"]["Acc"] is None  # every expression there has a target
    assert "| Acc |" in Path("r.md").read_text()


def test_check(own: Shapes, capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--refer_data_root", str(own.root), *named(own), "--images"])
    assert "aerial(unc) is sound" in capsys.readouterr().out


def test_reader(own: Shapes) -> None:
    assert REFER(own.root, "aerial", "unc").getRefIds(split="train")


def test_a_missing_dataset_is_one_line(own: Shapes, tmp_path: Path) -> None:
    done = run(tmp_path, "train.py", *own.train_options, "--dataset", "nowhere", "--model_id", "a")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("limit", ["0", "-5", "100", "1e6", "99999999999"])
def test_limits_of_pixels(
    own: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*own.train_options, *named(own), "--max_pixels", limit]
    assert "--max_pixels" in one_line_error(train_script.main, options)
