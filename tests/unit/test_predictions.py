"""Writing files of predictions by one process or several."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from lib.errors import InputError
from lib.evaluation.evaluator import SamplePrediction
from lib.evaluation.predictions import Part, line, merge_parts
from refer.masks import run_lengths, shared_pixels
from tests.scripts import jsonl


@pytest.mark.parametrize(
    "shares", [[[0, 1, 2, 3, 4]], [[0, 1, 4], [2, 3]], [[], [0, 3], [1, 2, 4]]]
)
def test_one_file_in_order_from_any_number_of_processes(
    shares: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    for number, places in enumerate(shares):
        part = Part(path, number)
        for place in places:
            part.write(place, {"place": place, "sentence": "ä\u2028\ud800\n\t"})
        assert not path.exists()
        part.close()
    merge_parts(path, len(shares))
    assert [record["place"] for record in jsonl(path)] == [0, 1, 2, 3, 4]
    assert jsonl(path)[0]["sentence"] == "ä\u2028\ud800\n\t"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_stood_there_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("old")
    (tmp_path / "p.jsonl.part7").write_text("of an earlier run that was killed")
    part = Part(path, 0)
    part.write(0, {"a": 1})
    assert path.read_text() == "old"
    part.close()
    merge_parts(path, 1)
    assert jsonl(path) == [{"a": 1}]
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_places_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for number, places in enumerate(([2, 10, 100], [9, 11])):
        part = Part(path, number)
        for place in places:
            part.write(place, {"place": place})
        part.close()
    merge_parts(path, 2)
    assert [record["place"] for record in jsonl(path)] == [2, 9, 10, 11, 100]


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*p\.jsonl"):
        Part(tmp_path / "file" / "p.jsonl", 0)
    path = tmp_path / "p.jsonl"
    Part(path, 0).close()
    with pytest.raises(InputError, match=r"p\.jsonl\.part1 is missing"):
        merge_parts(path, 2)
    assert not path.exists()


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 7, 11)) < rng.random((2, 1, 1))
    return a, b


@pytest.mark.parametrize("seed", range(5))
def test_shared_pixels(seed: int) -> None:
    for a, b in (masks(seed), (masks(seed)[0], np.zeros((7, 11), bool))):
        found = shared_pixels(run_lengths(a), run_lengths(b))
        assert found == ((a & b).sum(), (a | b).sum())
        assert [type(n) for n in found] == [int, int]


def test_masks_of_two_sizes_share_nothing() -> None:
    with pytest.raises(ValueError, match="masks of"):
        shared_pixels(run_lengths(np.ones((2, 3), bool)), run_lengths(np.ones((3, 2), bool)))


def test_a_line(tmp_path: Path) -> None:
    """Its fields, and that pycocotools reads it as a detection."""
    mask, truth = masks(0)
    answer = SamplePrediction(3, 2, 8, 0.123456789, run_lengths(mask), run_lengths(truth))
    about = {"image_id": 5, "category_id": 1, "kind": "size"}
    found = line(about, answer, "text=sent")
    assert found == {
        **about,
        "iou": 0.25,
        "intersection": 2,
        "union": 8,
        "score": 0.123457,
        "segmentation": answer.mask,
        "truth": answer.truth,
        "protocol": "text=sent",
    }
    assert line(about, answer._replace(intersection=0, union=0), "standard")["iou"] == 0.0
    coco = COCO()
    images = [{"id": 5, "height": 7, "width": 11}]
    coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": []}
    coco.createIndex()
    (tmp_path / "r.json").write_text(json.dumps([found]))
    loaded = coco.loadRes(str(tmp_path / "r.json"))
    (annotation,) = loaded.loadAnns(loaded.getAnnIds(imgIds=5))
    np.testing.assert_array_equal(loaded.annToMask(annotation), mask)
