"""Reading files of predictions: what is taken, and what is refused with its line number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lib.errors import InputError
from tests.record_files import Line, cc0_lines, write_lines
from tools.report.records import read_records

SIZE = {"height": 4, "width": 5}


def sample(**changes: Any) -> Line:
    """A small valid line: 2 of the mask's 20 pixels are right, 3 wrong or left out."""
    runs = {"size": [4, 5], "counts": "24>"}  # 2 outside, 4 inside, 14 outside
    return {
        "split": "val",
        **{"ref_id": 1, "ann_ids": [2], "image_id": 3, "category_id": 4, "sent_ids": [5]},
        **{"sentence": "left dog", "category": "dog", "file_name": "a/b.jpg"},
        **SIZE,
        **{"same_category": 1, "iou": 0.4, "intersection": 2, "union": 5, "score": 0.5},
        **{"segmentation": runs, "truth": runs, "protocol": "standard"},
    } | changes


def test_reads_every_field(tmp_path: Path) -> None:
    lines = cc0_lines()
    lines[3]["kind"] = "location"
    result = read_records(write_lines(tmp_path / "p.jsonl", lines))
    assert len(result) == len(lines) == 25
    for line, read in zip(lines, result, strict=True):
        for name in line.keys() - {"ann_ids", "sent_ids", "segmentation", "truth"}:
            assert getattr(read, name) == line[name]
        assert list(read.ann_ids) == line["ann_ids"]
        assert list(read.sent_ids) == line["sent_ids"]
        for name in ("segmentation", "truth"):
            rle = getattr(read, name)
            assert rle.as_coco == line[name]
            assert rle.area == coco_mask.area(line[name])
            assert coco_mask.decode(rle.as_coco).shape == (line["height"], line["width"])
    assert [r.kind for r in result[2:5]] == [None, "location", None]


def test_order_blank_lines_unknown_fields_and_odd_text_are_kept(tmp_path: Path) -> None:
    text = "a\u2028b </script> \U0001f600 \u202eabc"  # \u2028 ends a line for str.splitlines
    lines = [sample(), sample(sent_ids=[6], sentence=text, new_field=[1]), sample(split="testA")]
    path = write_lines(tmp_path / "p.jsonl", lines)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\n"))
    result = read_records(path)
    assert [r.key for r in result] == [("val", 1, (5,)), ("val", 1, (6,)), ("testA", 1, (5,))]
    assert result[1].sentence == text
    assert result[0].object == result[1].object != result[2].object


def test_empty_masks(tmp_path: Path) -> None:
    nothing = {"size": [4, 5], "counts": coco_mask.encode(np.zeros((4, 5), np.uint8, order="F"))}
    nothing["counts"] = nothing["counts"]["counts"].decode()
    line = sample(segmentation=nothing, truth=nothing, iou=0, intersection=0, union=0, score=0)
    read = read_records(write_lines(tmp_path / "p.jsonl", [line]))[0]
    assert (read.truth.area, read.iou) == (0, 0.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ref_id": None}, "'ref_id' is not an integer"),
        ({"ref_id": True}, "'ref_id' is not an integer"),
        ({"ref_id": 2**60}, "'ref_id' is not an integer"),
        ({"sent_ids": []}, "'sent_ids' is not a list of integers"),
        ({"sent_ids": ["5"]}, "'sent_ids' is not a list of integers"),
        ({"sentence": 3}, "'sentence' is not a string"),
        ({"kind": 3}, "'kind' is not a string"),
        ({"height": 0}, "'height' is not an integer of 1 or more"),
        ({"height": 10**5, "width": 10**5}, "more than 2147483647 pixels"),
        ({"same_category": -1}, "'same_category' is not an integer of 0 or more"),
        ({"iou": float("nan")}, "'iou' is not a number from 0 to 1"),
        ({"score": 1.5}, "'score' is not a number from 0 to 1"),
        ({"iou": 0.9}, "'iou' is not 'intersection' / 'union'"),
        ({"intersection": 6}, "'intersection' is more than 'union'"),
        ({"file_name": "../../etc/passwd"}, "leads out of the image folder"),
        ({"file_name": "a\\..\\..\\b.jpg"}, "leads out of the image folder"),
        ({"file_name": "\ud83d.jpg"}, "leads out of the image folder"),
        ({"file_name": ""}, "leads out of the image folder"),
        ({"truth": "24>"}, "'truth' is not"),
        ({"truth": {"size": [4, 5], "counts": [2, 4, 14]}}, "'truth' is not"),
        ({"truth": {"size": [5, 4], "counts": "24>"}}, "size of 'truth' is not the image's, 4 x 5"),
        ({"truth": {"size": [4, 5], "counts": "24"}}, "of 'truth' do not fill 4 x 5 pixels"),
        ({"truth": {"size": [4, 5], "counts": "2oN"}}, "of 'truth' do not fill 4 x 5 pixels"),
        ({"segmentation": {"size": [4, 5], "counts": "24\x7f"}}, "damaged run lengths"),
        ({"segmentation": {"size": [4, 5], "counts": "24é"}}, "'segmentation'"),
        ({"protocol": "eval_mode=cat"}, "that of the first line is 'standard'"),
        ({"sent_ids": [5]}, "the same sample as line 1"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, changes: Line, says: str) -> None:
    lines = [sample(), sample(sent_ids=[6]), sample(sent_ids=[7]) | changes]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # ASCII
    with pytest.raises(InputError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert says in str(error.value)


@pytest.mark.parametrize("name", sorted(sample()))
def test_missing_field_is_named(tmp_path: Path, name: str) -> None:
    line = sample()
    del line[name]
    path = write_lines(tmp_path / "p.jsonl", [line])
    with pytest.raises(InputError, match=f"line 1: '{name}' is missing"):
        read_records(path)


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        (b'{"split": "va', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"split": "\xff"}', "not UTF-8"),
    ],
)
def test_line_that_is_no_object(tmp_path: Path, tail: bytes, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(sample()).encode() + b"\n\n" + tail)
    with pytest.raises(InputError, match=f"line 3: {says}"):
        read_records(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, says in (("empty.jsonl", "no sample"), ("none", "does not exist"), (".", "cannot")):
        with pytest.raises(InputError, match=says):
            read_records(tmp_path / name)
