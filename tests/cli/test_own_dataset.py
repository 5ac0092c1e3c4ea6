"""A dataset of one's own, in REFER's layout, works under its folder's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from refer import REFER, check
from tests.scripts import Shapes, run


@pytest.fixture(scope="module")
def own(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    root = tmp_path_factory.mktemp("own") / "data"
    shutil.copytree(shapes.root, root)
    (root / "refcoco").rename(root / "mydata")
    return Shapes(root)


def test_train_and_test(own: Shapes, tmp_path: Path) -> None:
    name = ["--dataset", "mydata"]
    done = run(tmp_path, "train.py", *own.train_options, *name, "--epochs", "1", "--model_id", "a")
    assert done.returncode == 0, done.stderr
    resume = ["--resume", "checkpoints/model_best_a.pth", "--results", "r.json"]
    done = run(tmp_path, "test.py", *own.options, *name, *resume, "--split", "val,testA")
    assert done.returncode == 0, done.stderr
    assert "mydata" in done.stdout
    assert "refcoco" not in done.stdout.lower()
    assert json.loads((tmp_path / "r.json").read_text())["args"]["dataset"] == "mydata"


def test_check(own: Shapes, capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["--refer_data_root", str(own.root), "--dataset", "mydata"])
    assert "mydata" in capsys.readouterr().out


def test_reader(own: Shapes) -> None:
    assert REFER(own.root, "mydata", "unc").getRefIds(split="train")


def test_a_missing_dataset_is_one_line(own: Shapes, tmp_path: Path) -> None:
    done = run(tmp_path, "train.py", *own.train_options, "--dataset", "nowhere", "--model_id", "a")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr
