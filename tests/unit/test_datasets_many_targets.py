"""gRefCOCO and Ref-ZOM: none, one or several targets, read from their published files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from bert import load_tokenizer
from data.dataset_refer_bert import OtherObjectExpressions, ReferDataset
from data.loaders import RandomExpressionSampler
from data.spread import spreader
from lib.errors import InputError
from refer import REFER, check
from refer.grefcoco import drawn_part
from refer.masks import draw_components
from refer.refer import image_folder
from tests.many_targets import GREFS, grefs, instances, masks, write_grefcoco, write_ref_zom
from tests.refer_files import TINY_BERT


def union(anns: Iterable[int], image: int) -> np.ndarray:
    drawn = masks()
    size = next((i["height"], i["width"]) for i in instances()["images"] if i["id"] == image)
    return np.any([np.zeros(size, bool), *(drawn[ann] for ann in anns)], axis=0)


def dataset(root: Path, name: str, split: str) -> ReferDataset:
    return ReferDataset(REFER(root, name), split, load_tokenizer(TINY_BERT), 56)


@pytest.mark.parametrize("ending", [".json", ".p"])
def test_grefcoco_from_both_forms(ending: str, tmp_path: Path) -> None:
    refer = REFER(write_grefcoco(tmp_path, ending), "grefcoco")
    assert refer.splitBy == "unc"
    assert refer.splits() == ["train", "val", "testA", "testB"]
    for ref, (split, image, anns, texts) in zip(refer.loadRefs(), GREFS, strict=True):
        assert (ref["split"], ref["image_id"]) == (split, image)
        assert ref["ann_ids"] == [a for a in anns if a != -1]
        assert [s["raw"] for s in ref["sentences"]] == texts
    val = dataset(tmp_path, "grefcoco", "val")
    assert val.no_target.tolist() == [False, False, False, False, True, True, True]
    for i, record in enumerate(val.records):
        np.testing.assert_array_equal(val.mask(i), union(record.ann_ids, record.image_id))
        assert val.describe(i)["no_target"] == (not record.ann_ids) == (not val.target(i).any())
    val.check_images()


def test_the_pickle_wins_and_neither_is_one_line(tmp_path: Path) -> None:
    root = write_grefcoco(tmp_path, ".p")
    (root / "grefcoco/grefs(unc).json").write_text("[]")
    assert len(REFER(root, "grefcoco").loadRefs()) == len(GREFS)
    for path in (root / "grefcoco").glob("grefs*"):
        path.unlink()
    with pytest.raises(InputError, match=r"neither .*grefs\(unc\)\.p nor grefs\(unc\)\.json"):
        REFER(root, "grefcoco")


def test_bare_numbers_and_missing_categories(tmp_path: Path) -> None:
    root = write_grefcoco(tmp_path)
    records = grefs()
    for record in records:
        if len(record["ann_id"]) == 1:
            record["ann_id"], record["category_id"] = record["ann_id"][0], record["category_id"][0]
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(records))
    refer = REFER(root, "grefcoco")
    found = [ref["ann_ids"] for ref in refer.loadRefs()]
    assert found == [[a for a in anns if a != -1] for _, _, anns, _ in GREFS]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not readable JSON"), ("{}", "holds a dict"), ('[{"ref_id": "x"}]', "'ref_id' as int")],
)
def test_damaged_references(content: str, message: str, tmp_path: Path) -> None:
    root = write_grefcoco(tmp_path)
    (root / "grefcoco/grefs(unc).json").write_text(content)
    with pytest.raises(InputError, match=message):
        REFER(root, "grefcoco")


def test_what_is_drawn_of_an_annotation() -> None:
    square, line, odd = [1, 1, 5, 1, 5, 5, 1, 5], [1, 1, 5, 5], [1, 1, 5, 1, 5, 5, 1]
    kept = drawn_part({"segmentation": [line, square, odd]}, [8, 9])
    assert kept == [square]
    for empty in (
        {"segmentation": [square], "iscrowd": 1},
        {"segmentation": [line, odd], "iscrowd": 0},
        {"segmentation": {"size": [8, 9], "counts": [10, 62]}, "iscrowd": 1},
    ):
        assert draw_components(drawn_part(empty, [8, 9]), 8, 9, "it").sum() == 0
    rle = {"size": [8, 9], "counts": [10, 62]}
    assert drawn_part({"segmentation": rle}, [8, 9]) == rle


@pytest.mark.parametrize("name", ["refs(final).p", "Ref-ZOM(final).p"])
def test_ref_zom(name: str, tmp_path: Path) -> None:
    refer = REFER(write_ref_zom(tmp_path, name), "ref-zom")
    assert (refer.splitBy, refer.splits()) == ("final", ["train", "test"])
    assert tmp_path / "images/trainval2014" == refer.IMAGE_DIR
    test = dataset(tmp_path, "ref-zom", "test")
    test.check_images()  # of train2014 and val2014
    for i, record in enumerate(test.records):
        np.testing.assert_array_equal(test.mask(i), union(record.ann_ids, record.image_id))
    train = dataset(tmp_path, "ref-zom", "train")
    assert [len(s) for s in train.training_samples] == [1] * len(train) == [1] * 10
    of_references = dataset(write_grefcoco(tmp_path / "g"), "grefcoco", "train").training_samples
    assert [len(s) for s in of_references] == [2, 1, 1, 2, 1, 1, 1, 1]


def test_zero_means_no_target_whatever_the_annotation(tmp_path: Path) -> None:
    root = write_ref_zom(tmp_path)
    path = root / "ref-zom/Ref-ZOM(final).p"
    refs = pickle.loads(path.read_bytes())
    for ref in refs:
        if ref["source"] == "zero":
            ref["ann_id"] = 1
            del ref["category_id"]
    path.write_bytes(pickle.dumps(refs))
    found = {ref["source"]: ref["ann_ids"] for ref in REFER(root, "ref-zom").loadRefs()}
    assert found["zero"] == []
    assert len(found["many"]) == 2


@pytest.mark.parametrize("name", ["grefcoco", "ref-zom"])
def test_check_finds_them_sound(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grefcoco(tmp_path) if name == "grefcoco" else write_ref_zom(tmp_path)
    check.main(["--refer_data_root", str(tmp_path), "--dataset", name, "--images"])
    printed = capsys.readouterr().out
    assert "is sound" in printed
    assert "references without an object" in printed
    assert ("259859" in printed) == (name == "grefcoco")
    for unverified in ("16870", "18712", "14933"):
        assert unverified not in printed


@pytest.mark.parametrize(
    "habit", ["images/mscoco/images/train2014", "images/train2014", "elsewhere/train2014"]
)
def test_folders_of_images(habit: str, tmp_path: Path) -> None:
    write_grefcoco(tmp_path, images=habit)
    given = tmp_path / "elsewhere" if habit.startswith("elsewhere") else None
    assert image_folder(tmp_path, "grefcoco", given) == tmp_path / habit


def test_the_control_has_a_target_on_both_sides(tmp_path: Path) -> None:
    val = dataset(write_grefcoco(tmp_path), "grefcoco", "val")
    others = OtherObjectExpressions(val)
    assert others.indices
    assert not val.no_target[others.indices].any()
    assert not val.no_target[[val.other_object(i) for i in others.indices]].any()


def test_samples_without_target_are_spread_evenly(tmp_path: Path) -> None:
    train = dataset(write_ref_zom(tmp_path), "ref-zom", "train")
    spread = spreader(train)
    drawn = np.random.default_rng(0).permutation(len(train)).tolist()
    order = spread(drawn)
    assert sorted(order) == list(range(10))
    assert train.no_target[order].tolist() == [False, False, True] * 3 + [False]  # floor(7 / 3)
    for kind in (True, False):  # the drawn order within both kinds
        of_kind = [i for i in drawn if train.no_target[i] == kind]
        assert [i for i in order if train.no_target[i] == kind] == of_kind
    halves = [
        RandomExpressionSampler(train.training_samples, 2, 0, rank, 2, reorder=spread)
        for rank in (0, 1)
    ]
    whole = RandomExpressionSampler(train.training_samples, 4, 0, reorder=spread)
    joined = [a + b for a, b in zip(*halves, strict=True)]
    assert joined == list(whole)
    assert [train.no_target[i] for batch in whole for i in batch].count(True) == 2


def test_nothing_to_spread(tmp_path: Path) -> None:
    data = dataset(write_grefcoco(tmp_path), "grefcoco", "testB")
    with pytest.raises(InputError, match="--spread_no_target: every sample of"):
        spreader(data)
