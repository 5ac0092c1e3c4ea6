"""Samples: what they hold, and that they depend on their index alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from bert import encode, load_tokenizer
from bert.tokenizer import Tokenizer
from data.dataset_refer_bert import OtherObjectExpressions, ReferDataset
from data.transforms import normalize
from lib.errors import InputError
from refer import REFER
from tests.refer_files import (
    CC0_ROOT,
    REAL_ROOT,
    TINY_BERT,
    default_instances,
    default_refs,
    make_ref,
    write_root,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY_BERT)


@pytest.fixture
def refer(tmp_path: Path) -> REFER:
    return REFER(write_root(tmp_path), "refcoco", "unc")


def test_samples_in_order(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(refer, "train", tokenizer, 32)
    assert len(dataset) == 4
    assert [list(samples) for samples in dataset.samples_of_ref] == [[0, 1, 2], [3]]
    assert [record.expression for record in dataset.records] == [
        "Left square",
        "the RED one",
        "a",
        "right square",
    ]
    assert [record.sent_ids for record in dataset.records] == [(10,), (11,), (12,), (20,)]
    assert dataset.records[3].ann_ids == (12,)
    assert dataset.records[3].file_name == "COCO_train2014_000000000101.jpg"


def test_sample(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(refer, "train", tokenizer, 32, max_tokens=6)
    sample = dataset[1]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.uint8
    assert sample["target"].shape == (32, 32)
    assert sample["target"].dtype == torch.uint8
    assert sample["target"].unique().tolist() == [0, 1]
    ids, mask = encode(tokenizer, ["the RED one"], 6)
    assert torch.equal(sample["input_ids"], ids[0])
    assert torch.equal(sample["attention_mask"], mask[0])
    assert sample["index"] == 1
    again = dataset[1]
    assert all(torch.equal(again[k], sample[k]) for k in ("image", "target", "input_ids"))


def test_target_matches_the_image(refer: REFER, tokenizer: Tokenizer) -> None:
    """At the image's original width nearest and bilinear are the identity along x."""
    dataset = ReferDataset(refer, "train", tokenizer, 16)
    expected = dataset.mask(0)
    assert expected.sum() == 36
    target = dataset[0]["target"].bool().numpy()
    np.testing.assert_array_equal(target.any(axis=0), expected.any(axis=0))


def test_overlap_is_background_unless_asked(refer: REFER, tokenizer: Tokenizer) -> None:
    published = ReferDataset(refer, "train", tokenizer, 16)
    union = ReferDataset(refer, "train", tokenizer, 16, union_masks=True)
    assert published.mask(3).sum() == 64
    assert union.mask(3).sum() == 68
    assert not published.mask(3)[6:8, 6:8].any()
    assert union.mask(3)[6:8, 6:8].all()


def test_empty_and_punctuation_expressions(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(refer, "val", tokenizer, 16)
    assert dataset[0]["attention_mask"].sum() == 5  # [CLS] ! ! ! [SEP]
    assert dataset[1]["input_ids"][:3].tolist() == [2, 3, 0]
    assert dataset[1]["attention_mask"].sum() == 2


def test_refs_without_expressions_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    refs = [make_ref(1, 11, 101, "train", []), make_ref(2, 12, 101, "train", ["a"])]
    refer = REFER(write_root(tmp_path, refs), "refcoco", "unc")
    dataset = ReferDataset(refer, "train", tokenizer, 16)
    assert [list(samples) for samples in dataset.samples_of_ref] == [[0]]
    assert dataset.records[0].ref_id == 2


def test_unknown_split(refer: REFER, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="choose from train, val, testA, testB"):
        ReferDataset(refer, "testC", tokenizer, 16)


def test_missing_images(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(refer, "train", tokenizer, 16)
    dataset.check_images()
    path = refer.image_path(101)
    path.unlink()
    with pytest.raises(InputError, match=r"1 of 1 images of .*train are missing: image .*101.jpg"):
        dataset.check_images()
    with pytest.raises(InputError, match=str(path)):
        dataset[0]


def test_one_pixel_image(tmp_path: Path, tokenizer: Tokenizer) -> None:
    instances = default_instances()
    instances["images"][0] |= {"width": 1, "height": 1}
    refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
    Image.new("L", (1, 1), 9).save(refer.image_path(101))
    sample = ReferDataset(refer, "train", tokenizer, 16)[0]
    assert (sample["image"] == 9).all()
    assert not sample["target"].any()


def test_kinds(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(refer, "train", tokenizer, 16)
    assert dataset.kinds() == {}
    path = refer.DATA_DIR / "kinds.json"
    path.write_text(json.dumps({"10": "location", "11": "attribute"}))
    assert dataset.kinds() == {10: "location", 11: "attribute"}
    for text in ("[]", "{", '{"a": "b"}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"kinds\.json"):
            dataset.kinds()


def joined(refer: REFER, tokenizer: Tokenizer, split: str = "train", **options: Any) -> Any:
    return ReferDataset(refer, split, tokenizer, 32, **options)


def test_joined_expressions(refer: REFER, tokenizer: Tokenizer) -> None:
    """One sample per reference, its expressions joined, then cut like any other."""
    dataset = joined(refer, tokenizer, eval_mode="cat")
    assert len(dataset) == 2
    assert dataset.expression_count == 4
    assert [list(samples) for samples in dataset.samples_of_ref] == [[0], [1]]
    assert [r.expression for r in dataset.records] == ["Left square the RED one a", "right square"]
    assert dataset.records[0].sent_ids == (10, 11, 12)
    ids, mask = encode(tokenizer, ["Left square the RED one a"], 20)
    assert torch.equal(dataset[0]["input_ids"], ids[0])
    assert torch.equal(dataset[0]["attention_mask"], mask[0])
    short = joined(refer, tokenizer, eval_mode="cat", max_tokens=4)
    assert torch.equal(short[0]["input_ids"], ids[0, :4])


def test_expressions_side_by_side(refer: REFER, tokenizer: Tokenizer) -> None:
    """One sample per reference, one row per expression and unused rows below."""
    dataset = joined(refer, tokenizer, eval_mode="mean")
    assert len(dataset) == 2
    assert dataset.records[0].expression == "Left square | the RED one | a"
    ids, mask = encode(tokenizer, ["Left square", "the RED one", "a"], 20)
    assert torch.equal(dataset[0]["input_ids"], ids)
    assert torch.equal(dataset[0]["attention_mask"], mask)
    assert dataset[0]["expressions"] == 3
    assert dataset[1]["expressions"] == 1
    assert dataset[1]["input_ids"].shape == (3, 20)
    assert not dataset[1]["input_ids"][1:].any()
    control = OtherObjectExpressions(dataset)
    assert control.indices == [0, 1]
    assert control[1]["expressions"] == 3
    assert torch.equal(control[1]["input_ids"], ids)
    assert torch.equal(control[1]["target"], dataset[1]["target"])


def test_cleaned_text(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = joined(refer, tokenizer, text="sent")
    assert [record.expression for record in dataset.records][:2] == ["left square", "the red one"]


@pytest.mark.parametrize("union", [False, True])
def test_masks_of_original_size(refer: REFER, tokenizer: Tokenizer, union: bool) -> None:
    dataset = joined(refer, tokenizer, original_masks=True, union_masks=union)
    sample = dataset[3]
    assert (sample["height"], sample["width"]) == (12, 16)
    decoded = coco_mask.decode({"size": [12, 16], "counts": sample["original_mask"]})
    np.testing.assert_array_equal(decoded, dataset.mask(3))
    assert "original_mask" not in joined(refer, tokenizer)[3]


def test_kinds_of_samples(refer: REFER, tokenizer: Tokenizer) -> None:
    assert joined(refer, tokenizer).sample_kinds() == [None] * 4
    path = refer.DATA_DIR / "kinds.json"
    path.write_text(json.dumps({"10": "size", "11": "size", "12": "location"}))
    assert joined(refer, tokenizer).sample_kinds() == ["size", "size", "location", "unknown"]
    assert joined(refer, tokenizer, eval_mode="cat").sample_kinds() == ["mixed", "unknown"]


def test_description_of_a_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    instances = default_instances()
    instances["annotations"][1]["category_id"] = instances["annotations"][0]["category_id"]
    refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
    assert joined(refer, tokenizer).describe(1) == {
        "split": "train",
        "ref_id": 1,
        "ann_ids": [11],
        "image_id": 101,
        "category_id": 2,
        "sent_ids": [11],
        "sentence": "the RED one",
        "category": "thing",
        "file_name": "COCO_train2014_000000000101.jpg",
        "height": 12,
        "width": 16,
        "same_category": 1,
    }
    assert joined(refer, tokenizer, "val").describe(0)["same_category"] == 0


def test_other_object(refer: REFER, tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(refer, "train", tokenizer, 16)
    assert [dataset.other_object(i) for i in range(3)] == [3, 3, 3]
    assert dataset.other_object(3) in (0, 1, 2)
    assert dataset.other_object(3) == dataset.other_object(3)
    assert ReferDataset(refer, "val", tokenizer, 16).other_object(0) is None


def test_other_object_is_not_another_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    refs = default_refs()
    refs[1]["ann_id"] = 11  # a second reference of the same object
    refer = REFER(write_root(tmp_path, refs), "refcoco", "unc")
    control = OtherObjectExpressions(ReferDataset(refer, "train", tokenizer, 16))
    assert control.indices == []


def test_control_swaps_the_expression_only(tokenizer: Tokenizer) -> None:
    dataset = ReferDataset(REFER(CC0_ROOT, "refcoco", "unc"), "train", tokenizer, 24)
    control = OtherObjectExpressions(dataset)
    assert len(control) == len(dataset)
    assert control.indices
    for i in control.indices:
        other = dataset.other_object(i)
        assert other is not None
        assert dataset.records[other].image_id == dataset.records[i].image_id
        assert dataset.records[other].ann_ids != dataset.records[i].ann_ids
    i = control.indices[0]
    other = dataset.other_object(i)
    assert other is not None
    right, wrong = dataset[i], control[i]
    assert wrong["index"] == i
    assert torch.equal(right["image"], wrong["image"])
    assert torch.equal(right["target"], wrong["target"])
    assert torch.equal(wrong["input_ids"], dataset[other]["input_ids"])


def several_objects(folder: Path, key: str = "ann_id") -> REFER:
    """References of 0, 1 and 3 annotations of image 101, 0 written in two ways."""
    instances = default_instances()
    third = {"id": 15, "image_id": 101, "category_id": 2}
    third["segmentation"] = [[10, 1, 14, 1, 14, 4, 10, 4], [12, 1, 15, 1, 15, 4, 12, 4]]
    instances["annotations"].append(third)
    targets: list[Any] = [[], 11, [11, 12, 15], [-1]]
    refs = []
    for i, ids in enumerate(targets, 1):
        ref = make_ref(i, 0, 101, "train", [f"expression {i}"])
        del ref["ann_id"]
        refs.append(ref | {key: ids, "category_id": 2 if ids not in ([], [-1]) else -1})
    return REFER(write_root(folder, refs, instances), "refcoco", "unc")


@pytest.mark.parametrize("key", ["ann_id", "ann_ids"])
def test_references_of_0_1_and_3_annotations(
    tmp_path: Path, tokenizer: Tokenizer, key: str
) -> None:
    refer = several_objects(tmp_path, key)
    lists = [[], [11], [11, 12, 15], []]
    assert [ref["ann_ids"] for ref in refer.loadRefs()] == lists
    assert [[a["id"] for a in refer.refToAnns[i]] for i in (1, 2, 3, 4)] == lists
    assert list(refer.refToAnn) == [2]
    assert refer.getAnnIds(ref_ids=[1, 2]) == [11]
    assert refer.getAnnIds(ref_ids=3) == [11, 12, 15]
    assert refer.getMask(refer.Refs[1])["mask"].sum() == 0
    assert refer.getRefBox(1) == [0.0, 0.0, 0.0, 0.0]
    for union in (False, True):
        dataset = joined(refer, tokenizer, union_masks=union, original_masks=True)
        assert [r.ann_ids for r in dataset.records] == [tuple(ids) for ids in lists]
        parts = []
        for ann_id in (11, 12, 15):
            alone = make_ref(1, ann_id, 101, "train", ["a"])
            root = write_root(tmp_path / f"{union}{ann_id}", [alone], refer_instances(refer))
            parts.append(joined(REFER(root), tokenizer, union_masks=union))
        for index, ids in enumerate(lists):
            chosen = [part for part, i in zip(parts, (11, 12, 15), strict=True) if i in ids]
            expected = np.any([p.mask(0) for p in chosen] or [np.zeros((12, 16), bool)], axis=0)
            np.testing.assert_array_equal(dataset.mask(index), expected)
            targets = [p.target(0).bool() for p in chosen] or [torch.zeros(32, 32).bool()]
            sample = dataset[index]
            assert torch.equal(sample["target"].bool(), torch.stack(targets).any(0))
            decoded = coco_mask.decode({"size": [12, 16], "counts": sample["original_mask"]})
            np.testing.assert_array_equal(decoded, expected)
            assert dataset.describe(index)["ann_ids"] == ids
    assert dataset.describe(0)["category"] == ""
    # Another object's expression is of a reference that shares no annotation.
    assert [dataset.other_object(i) is None for i in range(4)] == [False] * 4
    assert dataset.other_object(1) in (0, 3)


def refer_instances(refer: REFER) -> dict[str, Any]:
    return {k: refer.data[k] for k in ("images", "annotations", "categories")}


def test_annotation_ids_of_the_wrong_kind(tmp_path: Path) -> None:
    for ids in ("11, 12", None, [11, True], 1.5, {"a": 1}, math.nan, ""):
        refs = default_refs()
        refs[0]["ann_id"] = ids
        with pytest.raises(InputError, match="needs 'ann_id' as int or list of int"):
            REFER(write_root(tmp_path, refs), "refcoco", "unc")
    refs[0]["ann_id"] = [11, 99]
    with pytest.raises(InputError, match="is of annotation 99"):
        REFER(write_root(tmp_path, refs), "refcoco", "unc")


@pytest.mark.skipif(not REAL_ROOT.is_dir(), reason="no real subset beside the checkout")
def test_real_subset(tokenizer: Tokenizer) -> None:
    refer = REFER(REAL_ROOT, "refcoco", "unc")
    sizes: Counter[str] = Counter()
    for split in ("train", "val", "testA", "testB"):
        dataset = ReferDataset(refer, split, tokenizer, 32)
        dataset.check_images()
        sizes[split] = len(dataset.samples_of_ref)
        assert dataset[len(dataset) - 1]["target"].max() <= 1
    assert sizes == {"train": 212, "val": 1, "testA": 10, "testB": 4}


def test_normalize_in_every_mode() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    with torch.inference_mode():
        inside = normalize(pixels).clone()
    outside = normalize(pixels)
    assert outside.dtype == torch.float32
    assert torch.equal(inside, outside)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (normalize(pixels) * weight).sum().backward()
    assert weight.grad is not None


def test_samples_grouped_by_image(refer: REFER, tokenizer: Tokenizer) -> None:
    data = ReferDataset(refer, "train", tokenizer, 32)
    images = [r.image_id for r in data.records]
    order = list(range(len(data)))[::2] + list(range(len(data)))[1::2]
    together = data.group_by_image(order)
    assert sorted(together) == list(range(len(data)))
    grouped = [images[i] for i in together]
    changes = sum(a != b for a, b in pairwise(grouped))
    assert changes == len(set(images)) - 1
    for image in set(images):  # within an image, the given order
        of_image = [i for i in order if images[i] == image]
        assert [i for i in together if images[i] == image] == of_image
