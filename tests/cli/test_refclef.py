"""RefCLEF: other images, run lengths in place of polygons, five splits; from train to test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import test as test_script
import train as train_script
from refer import REFER
from refer.masks import run_lengths
from tests.refer_files import make_annotation, make_ref, write_root
from tests.scripts import Shapes
from tools.report.records import read_records

IMAGES = "images/saiapr_tc-12"
LABELS = {
    "unc": ("train",) * 8 + ("val", "testA", "testB", "testC"),
    "berkeley": ("train",) * 8 + ("val", "test", "test", "test"),
}
SPLITS = {"unc": ["val", "testA", "testB", "testC"], "berkeley": ["val", "test"]}


def drawn(number: int) -> np.ndarray:
    mask = np.zeros((30, 40), bool)
    mask[3 + number : 12 + number, 5 + number : 20 + number] = True
    return mask


def segmentation(number: int) -> Any:
    """The object's run lengths in each of the forms that such files have."""
    mask = drawn(number)
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=False))
    plain = {"size": [30, 40], "counts": np.diff([0, *edges, mask.size]).tolist()}
    packed = run_lengths(mask)
    return [[packed], packed, [plain], plain][number % 4]


@pytest.fixture(scope="module", params=["unc", "berkeley"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refclef") / request.param
    refs = [
        make_ref(i, 100 + i, 1 + i // 2, label, [f"the red square {i}", "left"])
        for i, label in enumerate(LABELS[request.param])
    ]
    instances = {
        "images": [
            {"id": i, "file_name": f"{i}000.jpg", "width": 40, "height": 30} for i in range(1, 7)
        ],
        "annotations": [
            make_annotation(100 + i, 1 + i // 2, segmentation(i)) for i in range(len(refs))
        ],
        "categories": [{"id": 1, "name": "sky"}, {"id": 2, "name": "man"}],
    }
    write_root(root, refs, instances, dataset="refclef", split_by=request.param, images=None)
    (root / IMAGES).mkdir(parents=True)
    for image in instances["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / IMAGES / image["file_name"])
    return root


def test_splits_and_masks(root: Path) -> None:
    refer = REFER(root, "refclef", root.name)
    assert refer.splits() == ["train", *SPLITS[root.name]]
    for i, ref in enumerate(refer.loadRefs()):
        np.testing.assert_array_equal(refer.getMask(ref)["mask"], drawn(i))
    assert refer.image_path(3) == root / IMAGES / "3000.jpg"
    labels = LABELS[root.name]
    for split in refer.splits():
        assert refer.getRefIds(split=split) == [i for i, x in enumerate(labels) if x == split]


def test_train_and_test(
    root: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--refer_data_root", str(root), "--dataset", "refclef", "--splitBy", root.name]
    train_script.main([*shapes.train_options, *data, "--epochs", "1"])
    splits = ",".join(SPLITS[root.name])
    resume = ["--resume", "checkpoints/model_best_lavt.pth", "--split", splits]
    test_script.main([*shapes.options, *data, *resume, "--predictions"])
    name = f"refclef_{root.name}_{splits.replace(',', '_')}"
    content = json.loads(Path(f"models/lavt/results_{name}.json").read_text())
    labels = LABELS[root.name]
    for split in SPLITS[root.name]:
        assert content["splits"][split]["all"]["samples"] == 2 * labels.count(split)
    samples = read_records(f"models/lavt/predictions_{name}.jsonl")
    assert [sample.ref_id for sample in samples] == [i for i in range(8, 12) for _ in range(2)]
    assert {sample.category for sample in samples} == {"sky", "man"}
    assert all(sample.truth.area == 9 * 15 for sample in samples)
    assert "RefCLEF" in Path(f"models/lavt/results_{name}.md").read_text()
