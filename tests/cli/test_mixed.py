"""Training on several datasets at once, and what checkpoints tell of their training images."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import test as test_script
import train as train_script
from args import dataset_options, parse_train
from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from refer import REFER
from tests.many_targets import write_grefcoco
from tests.refer_files import CC0_ROOT
from tests.scripts import Shapes, one_line_error

MIXED = ["--dataset", "refcoco,refcoco+,refcocog", "--splitBy", "unc,unc,umd"]
LAST = "checkpoints/model_last_lavt.pth"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CC0 datasets, where an image that refcoco and refcoco+ train on is refcocog's val."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    shutil.copytree(CC0_ROOT, root)
    path = root / "refcocog/refs(umd).p"
    refs = pickle.loads(path.read_bytes())
    for ref in refs:
        if ref["image_id"] == 900003:
            ref["split"] = "val"
    path.write_bytes(pickle.dumps(refs))
    return root


def train(shapes: Shapes, root: Path, *words: str) -> None:
    options = [*shapes.train_options, "--refer_data_root", str(root), "--batch-size", "2"]
    train_script.main([*options, *words])


def evaluate(shapes: Shapes, root: Path, *words: str) -> dict[str, Any]:
    out = ["--results", "r.json", "--refer_data_root", str(root)]
    test_script.main([*shapes.options, *out, *words])
    return json.loads(Path("r.json").read_text())


def test_images_of_other_splits_are_left_out(
    shapes: Shapes, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(shapes, root, *MIXED, "--epochs", "2", "--model_id", "whole")
    printed = capsys.readouterr().out
    # 900001 has four references and nine expressions in each dataset, 900003 three and six.
    assert "18 references, 39 expressions, 2 images before leaving out images" in printed
    assert "12 references, 27 expressions, 1 images after leaving out images" in printed
    assert "12 samples, 6 steps per epoch" in printed
    recorded = json.loads(Path("models/whole/args.json").read_text())
    assert recorded["mixed"]["after"] == {"references": 12, "expressions": 27, "images": 1}
    content = torch.load("checkpoints/model_last_whole.pth", weights_only=True)
    assert {k: v.tolist() for k, v in content["seen_images"].items()} == {"COCO": [900001]}

    train(shapes, root, *MIXED, "--epochs", "2", "--stop_after", "1")
    train(shapes, root, *MIXED, "--epochs", "2", "--resume", LAST)
    resumed = torch.load(LAST, weights_only=True)
    assert all(torch.equal(v, resumed["model"][k]) for k, v in content["model"].items())

    where = ["--resume", LAST, "--refer_data_root", str(root), "--split", "val"]
    error = one_line_error(test_script.main, [*shapes.options, *where])
    assert "several datasets, refcoco,refcoco+,refcocog: give one of them by --dataset" in error
    assert "several datasets, refcoco,refcoco+,refcocog: give one" in one_line_error(
        test_script.main, [*shapes.options, *where, *MIXED]
    )
    result = evaluate(
        shapes,
        root,
        "--resume",
        LAST,
        "--dataset",
        "refcocog",
        "--splitBy",
        "umd",
        "--split",
        "val",
    )
    assert result["trained_on_images"] == {"val": 0}
    result = evaluate(
        shapes, root, "--resume", LAST, "--dataset", "refcoco", "--split", "train,val"
    )
    assert result["trained_on_images"] == {"train": 1, "val": 0}
    for ending in ("md", "tex", "csv"):
        assert Path(f"r.{ending}").read_text().count("trained on 1 of its images") == 1
    assert "train [trained on 1 of its images; img_size=56]" in capsys.readouterr().out


def test_a_checkpoint_knows_the_images_of_all_its_training(shapes: Shapes, root: Path) -> None:
    refs = ["--dataset", "refcocog", "--splitBy", "umd", "--epochs", "1"]
    train(shapes, root, *refs)
    result = evaluate(
        shapes, root, "--resume", LAST, "--dataset", "refcoco", "--split", "train,val"
    )
    assert result["trained_on_images"] == {"train": 1, "val": 0}
    path = root / "refcoco/refs(unc).p"
    others = [ref for ref in pickle.loads(path.read_bytes()) if ref["image_id"] != 900001]
    path.write_bytes(pickle.dumps(others))
    words = ["--model_id", "second", "--init_from", LAST, "--epochs", "1"]
    train(shapes, root, "--dataset", "refcoco", "--splitBy", "unc", *words)
    content = torch.load("checkpoints/model_last_second.pth", weights_only=True)
    assert content["seen_images"]["COCO"].tolist() == [900001, 900003]
    # A file that does not tell is not taken to be innocent; one that is damaged is refused.
    torch.save({k: v for k, v in content.items() if k != "seen_images"}, "silent.pth")
    words = ["--dataset", "refcoco", "--splitBy", "unc", "--split", "val"]
    result = evaluate(shapes, root, "--resume", "silent.pth", *words)
    assert result["trained_on_images"] == {"val": None}
    torch.save(content | {"seen_images": {"COCO": "all"}}, "damaged.pth")
    error = one_line_error(
        test_script.main,
        [*shapes.options, "--resume", "damaged.pth", "--refer_data_root", str(root), *words],
    )
    assert "damaged.pth: its list of training images (seen_images) is damaged" in error


def test_images_of_another_source_have_ids_of_their_own(shapes: Shapes, root: Path) -> None:
    own = root / "mydata"
    shutil.copytree(root / "refcoco", own)
    shutil.copytree(root / "images/mscoco/images/train2014", own / "images")
    train(shapes, root, "--dataset", "refcocog,mydata", "--splitBy", "umd,unc", "--epochs", "1")
    seen = torch.load(LAST, weights_only=True)["seen_images"]
    assert {k: v.tolist() for k, v in seen.items()} == {
        "COCO": [900001],
        "mydata": [900001, 900003],
    }


@pytest.mark.parametrize("order", [0, 1])
def test_each_part_has_masks_of_its_own_mode(
    order: int, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_grefcoco(tmp_path / "data")
    shutil.copytree(CC0_ROOT / "refcoco", root / "refcoco")
    names = ["refcoco", "grefcoco"][:: 1 - 2 * order]
    train(shapes, root, "--dataset", ",".join(names), "--splitBy", "unc,unc", "--epochs", "1")
    content = torch.load(LAST, weights_only=True)
    assert content["args"]["mask_mode"] == "release"
    result = evaluate(shapes, root, "--resume", LAST, "--dataset", "refcoco", "--split", "val")
    assert result["protocol"]["label"] == "img_size=56"
    result = evaluate(shapes, root, "--resume", LAST, "--dataset", "grefcoco", "--split", "val")
    assert result["protocol"]["mask_mode"] == "union"
    args = parse_train(["--dataset", ",".join(names), "--splitBy", "unc,unc"])
    options = {**dataset_options(args), "img_size": 56}
    tokenizer = load_tokenizer(str(shapes.root / "bert"))
    for name in names:
        dataset = ReferDataset(REFER(root, name), "train", tokenizer, **options)
        assert dataset.union_masks == (name == "grefcoco")


@pytest.mark.parametrize(
    ("dataset", "split_by", "expected"),
    [
        ("refcoco,refcocog", "unc", "give one splitBy for each dataset"),
        ("refcoco,", "unc,unc", "give one splitBy for each dataset"),
        ("refcoco,refcoco", "unc,unc", "a dataset is named twice"),
        ("refcoco,ref-zom", "unc,umd", "--splitBy umd: ref-zom has final alone"),
        ("refcoco,other", "unc,unc", "has no folder 'other'"),
    ],
)
def test_wrong_lists(
    dataset: str, split_by: str, expected: str, shapes: Shapes, root: Path
) -> None:
    words = [*shapes.train_options, "--refer_data_root", str(root)]
    words += ["--dataset", dataset, "--splitBy", split_by]
    assert expected in one_line_error(train_script.main, words)
    assert not Path("models").exists()


def test_nothing_left_to_train_on(shapes: Shapes, root: Path) -> None:
    path = root / "refcocog/refs(umd).p"
    refs = pickle.loads(path.read_bytes())
    for ref in refs:
        ref["split"] = "val"
    path.write_bytes(pickle.dumps([*refs, refs[0] | {"ref_id": 10**6, "split": "train"}]))
    words = [*shapes.train_options, "--refer_data_root", str(root), *MIXED]
    assert "no reference is left to train on" in one_line_error(train_script.main, words)
