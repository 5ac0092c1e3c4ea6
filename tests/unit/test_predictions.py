"""Writing files of predictions by one process or several."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from lib.errors import InputError
from lib.evaluation.evaluator import SamplePrediction
from lib.evaluation.predictions import PredictionsFile, line
from refer.masks import run_lengths, shared_pixels
from tests.scripts import jsonl
from utils import DistInfo


def open_parts(path: Path, world: int) -> list[PredictionsFile]:
    """The file as each rank opens it."""
    cpu = torch.device("cpu")
    return [
        PredictionsFile(path, "standard", DistInfo(rank, world, cpu)).__enter__()
        for rank in range(world)
    ]


def close(files: list[PredictionsFile], error: type[Exception] | None = None) -> None:
    """Rank 0 merges the parts, so it comes last."""
    for file in reversed(files):
        file.__exit__(error, None, None)


def write(path: Path, places: list[list[int]]) -> None:
    """Write lines from as many ranks as there are lists of places."""
    files = open_parts(path, len(places))
    for file, own in zip(files, places, strict=True):
        for place in own:
            file.write(place, {"place": place, "sentence": "ä\u2028\ud800\n\t"})
    assert not path.exists()
    close(files)


@pytest.mark.parametrize(
    "places",
    [[[3, 0, 4, 1, 2]], [[0, 4, 1], [3, 2]], [[], [0, 3], [1, 2, 4]], [[2, 10, 100], [9, 11]]],
)
def test_one_file_in_order_from_any_number_of_ranks(
    places: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    write(path, places)
    assert [record["place"] for record in jsonl(path)] == sorted(chain(*places))
    assert jsonl(path)[0]["sentence"] == "ä\u2028\ud800\n\t"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_existing_file_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("old")
    (tmp_path / "p.jsonl.part7").write_text("of an earlier run that was killed")
    files = open_parts(path, 1)
    files[0].write(0, {"a": 1})
    assert path.read_text() == "old"
    close(files)
    assert jsonl(path) == [{"a": 1}]
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_after_an_error_no_part_is_left(tmp_path: Path) -> None:
    files = open_parts(tmp_path / "p.jsonl", 2)
    files[1].write(0, {"a": 1})
    close(files, RuntimeError)
    assert os.listdir(tmp_path) == []


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    info = DistInfo(0, 1, torch.device("cpu"))
    with PredictionsFile(None, "standard", info) as file:
        assert file.writer(None) is None  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_unwritable_paths_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*p\.jsonl"):
        open_parts(tmp_path / "file" / "p.jsonl", 1)
    path = tmp_path / "p.jsonl"
    files = open_parts(path, 2)
    (tmp_path / "p.jsonl.part1").unlink()
    with pytest.raises(InputError, match=r"p\.jsonl\.part1 is missing"):
        close(files)
    assert not path.exists()


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 7, 11)) < rng.random((2, 1, 1))
    return a, b


@pytest.mark.parametrize("seed", range(5))
def test_shared_pixels(seed: int) -> None:
    for a, b in (masks(seed), (masks(seed)[0], np.zeros((7, 11), bool))):
        result = shared_pixels(run_lengths(a), run_lengths(b))
        assert result == ((a & b).sum(), (a | b).sum())
        assert [type(n) for n in result] == [int, int]


def test_masks_of_two_sizes_share_nothing() -> None:
    with pytest.raises(ValueError, match="masks of"):
        shared_pixels(run_lengths(np.ones((2, 3), bool)), run_lengths(np.ones((3, 2), bool)))


def test_a_line(tmp_path: Path) -> None:
    """Its fields, and that pycocotools reads it as a detection."""
    mask, truth = masks(0)
    prediction = SamplePrediction(3, 2, 8, 0.123456789, run_lengths(mask), run_lengths(truth))
    about = {"image_id": 5, "category_id": 1, "kind": "size"}
    written = line(about, prediction, "text=sent")
    assert written == {
        **about,
        "iou": 0.25,
        "intersection": 2,
        "union": 8,
        "score": 0.123457,
        "segmentation": prediction.mask,
        "truth": prediction.ground_truth,
        "protocol": "text=sent",
    }
    assert line(about, prediction._replace(intersection=0, union=0), "standard")["iou"] == 0.0
    coco = COCO()
    images = [{"id": 5, "height": 7, "width": 11}]
    coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": []}
    coco.createIndex()
    (tmp_path / "r.json").write_text(json.dumps([written]))
    loaded = coco.loadRes(str(tmp_path / "r.json"))
    (annotation,) = loaded.loadAnns(loaded.getAnnIds(imgIds=5))
    np.testing.assert_array_equal(loaded.annToMask(annotation), mask)
