"""The REFER API: queries, masks, files of strangers."""

from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lib.errors import InputError
from refer import REFER
from refer.instances import whole
from refer.masks import draw_components
from refer.pickles import load_refs
from refer.refer import in_split
from tests.refer_files import (
    CC0_ROOT,
    OVERLAPPING,
    REAL_ROOT,
    SQUARE,
    default_instances,
    default_refs,
    make_annotation,
    make_ref,
    write_root,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("refer"))


@pytest.fixture(scope="module")
def refer(root: Path) -> REFER:
    return REFER(root, "refcoco", "unc")


def fails(*args: Any, **kwargs: Any) -> str:
    """The one-line error of REFER."""
    with pytest.raises(InputError) as caught:
        REFER(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Queries


def test_ids(refer: REFER) -> None:
    assert refer.getRefIds() == [1, 2, 3, 4]
    assert refer.getRefIds(image_ids=101) == refer.getRefIds(image_ids=[101]) == [1, 2]
    assert refer.getRefIds(cat_ids=[2]) == [1, 3]
    assert refer.getRefIds(ref_ids=[3, 1]) == [1, 3]
    assert refer.getRefIds(image_ids=101, cat_ids=2, split="train") == [1]
    assert refer.getAnnIds() == [11, 12, 13, 14]
    assert refer.getAnnIds(image_ids=102, cat_ids=2) == [13]
    assert refer.getAnnIds(ref_ids=[2, 4]) == [12, 14]
    assert refer.getImgIds() == [101, 102]
    assert refer.getImgIds(ref_ids=[1, 2]) == [101]
    assert sorted(refer.getCatIds()) == [1, 2]


def test_records(refer: REFER) -> None:
    assert [ref["ref_id"] for ref in refer.loadRefs([3, 1])] == [3, 1]
    assert len(refer.loadRefs()) == 4
    assert refer.loadRefs([]) == []
    assert refer.loadAnns(13)[0]["image_id"] == 102
    assert refer.loadImgs([101])[0]["width"] == 16
    assert refer.loadCats([2, 1]) == ["thing", "square"]
    assert refer.getRefBox(1) == [2.0, 2.0, 6.0, 6.0]


def test_indices_agree(refer: REFER) -> None:
    for ref_id, ref in refer.Refs.items():
        assert refer.refToAnn[ref_id]["id"] == ref["ann_id"]
        assert refer.annToRef[ref["ann_id"]] is ref
        assert ref in refer.imgToRefs[ref["image_id"]]
        assert ref in refer.catToRefs[ref["category_id"]]
        for sentence in ref["sentences"]:
            assert refer.sentToRef[sentence["sent_id"]] is ref
            assert refer.Sents[sentence["sent_id"]] is sentence
            assert refer.sentToTokens[sentence["sent_id"]] == sentence["tokens"]
    assert [ann["id"] for ann in refer.imgToAnns[101]] == [11, 12]


@pytest.mark.parametrize("method", ["loadRefs", "loadAnns", "loadImgs", "loadCats", "getRefBox"])
def test_unknown_id(refer: REFER, method: str) -> None:
    with pytest.raises(InputError, match=r"has no .* 999"):
        getattr(refer, method)(999)


@pytest.mark.parametrize(
    ("label", "belongs"),
    [
        ("train", {"train"}),
        ("val", {"val"}),
        ("test", {"test"}),
        ("testA", {"test", "testA"}),
        ("testB", {"test", "testB"}),
        ("testAB", {"test", "testA", "testB"}),
        ("testBC", {"test", "testB", "testC"}),
    ],
)
def test_split_rules(label: str, belongs: set[str]) -> None:
    names = ["train", "val", "test", "testA", "testB", "testC"]
    assert {name for name in names if in_split(label, name)} == belongs


def test_splits(refer: REFER) -> None:
    assert refer.splits() == ["train", "val", "testA", "testB"]
    assert refer.getRefIds(split="testA") == refer.getRefIds(split="testB") == [4]
    assert refer.getRefIds(split="test") == [4]
    with pytest.raises(InputError, match="no split 'tset'; choose from train, val, testA, testB"):
        refer.getRefIds(split="tset")


@pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "refcocog", "refclef"])
def test_every_dataset(tmp_path: Path, dataset: str) -> None:
    write_root(tmp_path, dataset=dataset, split_by="x", images=None)
    refer = REFER(tmp_path, dataset, "x")
    assert len(refer.Refs) == 4
    folder = "saiapr_tc-12" if dataset == "refclef" else "train2014"
    assert refer.IMAGE_DIR.name == folder


def test_cc0_fixture() -> None:
    for dataset, split_by in [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]:
        refer = REFER(CC0_ROOT, dataset, split_by)
        assert len(refer.getRefIds(split="train")) == 7
        for ref in refer.loadRefs():
            assert refer.getMask(ref)["area"] > 0
            assert refer.open_image(ref["image_id"]).mode == "RGB"


@pytest.mark.skipif(not REAL_ROOT.is_dir(), reason="no real subset beside the checkout")
def test_real_subset() -> None:
    refer = REFER(REAL_ROOT, "refcoco", "unc")
    for ref in refer.loadRefs():
        ann, image = refer.refToAnn[ref["ref_id"]], refer.Imgs[ref["image_id"]]
        rles = coco_mask.frPyObjects(ann["segmentation"], image["height"], image["width"])
        expected = coco_mask.decode(rles).sum(axis=2)
        np.testing.assert_array_equal(refer.getMask(ref)["mask"], expected)


# Masks


def draw(segmentation: Any, height: int = 12, width: int = 16) -> np.ndarray:
    return draw_components(segmentation, height, width, "it")


def test_polygons_are_summed(refer: REFER) -> None:
    one = refer.getMask(refer.Refs[1])
    assert one["mask"].dtype == np.uint8
    assert one["mask"].shape == (12, 16)
    assert one["area"] == 36
    assert one["mask"][2:8, 2:8].all()
    two = refer.getMask(refer.Refs[2])["mask"]
    assert (two == 1).sum() == 36 + 36 - 2 * 4
    assert (two[6:8, 6:8] == 2).all()


def test_overlap_as_measured_on_the_release() -> None:
    """traps.json of the golden files: two polygons of 900 pixels share 100."""
    squares = [[10, 10, 40, 10, 40, 40, 10, 40], [30, 30, 60, 30, 60, 60, 30, 60]]
    mask = draw(squares, 80, 80)
    assert ((mask > 0).sum(), (mask > 1).sum(), (mask == 1).sum()) == (1700, 100, 1600)


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2).tolist()
    expected = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    if seed == 4:
        expected[:] = 1
    packed = coco_mask.encode(np.asfortranarray(expected))
    flat = expected.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    runs = np.diff([0, *edges, flat.size]).tolist()
    for counts in (packed["counts"], packed["counts"].decode(), runs):
        for wrap in (lambda rle: rle, lambda rle: [rle]):
            drawn = draw(wrap({"size": [height, width], "counts": counts}), height, width)
            np.testing.assert_array_equal(drawn, expected)


def test_many_components_do_not_wrap_around() -> None:
    assert draw([SQUARE] * 300).max() == 255


def test_a_line_is_no_box() -> None:
    """pycocotools alone takes four numbers for a bounding box."""
    mask = draw([[2.0, 2.0, 8.0, 8.0], SQUARE])
    np.testing.assert_array_equal(mask, draw([SQUARE]))


def test_run_lengths_as_people_write_them() -> None:
    plain = draw({"counts": [100, 20, 72], "size": [12, 16]})
    assert plain.sum() == 20
    for number in (float, str, "{}.0".format):
        loose = {"counts": [number(n) for n in (100, 20, 72)], "size": [number(12), number(16)]}
        np.testing.assert_array_equal(draw(loose), plain)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no polygons"),
        ([], "no polygons"),
        ("abc", "no polygons"),
        ([[]], "of 0 numbers"),
        ([[1, 2, 3]], "of 3 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "of 7 numbers"),
        ([["a", "b", "c", "d"]], "not a list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "of 6 numbers"),
        ([[1, 2, 3, float("nan"), 5, 6]], "far outside"),
        ([[0, 0, 1e300, 0, 5, float("inf")]], "far outside"),
        ([[0, 0, 1e9, 0, 5, 5]], "far outside"),
        ([[0, 0, 10**400, 0, 5, 5]], "not a list of numbers"),
        ([7], "of 1 numbers"),
        ({}, "do not fit"),
        ({"counts": [1, 2]}, "do not fit"),
        ({"counts": [-1, 193]}, "do not fit"),
        ({"counts": [1.5, 190.5]}, "do not fit"),
        ({"counts": "o" * 100}, "damaged"),
        ({"counts": "\xff"}, "damaged"),
        ({"counts": [192], "size": [16, 12]}, "do not fit"),
        ({"counts": [192], "size": 5}, "do not fit"),
    ],
)
def test_bad_segmentation(segmentation: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(segmentation)


def test_annotation_without_polygons_names_it(tmp_path: Path) -> None:
    instances = default_instances()
    del instances["annotations"][0]["segmentation"]
    refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
    with pytest.raises(InputError, match=r"refcoco\(unc\): annotation 11 of reference 1 has no po"):
        refer.getMask(refer.Refs[1])


def test_box_without_bbox(tmp_path: Path) -> None:
    instances = default_instances()
    del instances["annotations"][0]["bbox"]
    refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
    assert refer.getRefBox(1) == [2.0, 2.0, 6.0, 6.0]


def test_box_that_is_none(tmp_path: Path) -> None:
    for bbox in (5, [1, 2], ["a", 1, 2, 3]):
        instances = default_instances()
        instances["annotations"][0]["bbox"] = bbox
        refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
        assert refer.getRefBox(1) == [2.0, 2.0, 6.0, 6.0]


def test_drawings(refer: REFER) -> None:
    ref = refer.Refs[1]
    img = np.asarray(refer.open_image(101)).astype(int)
    tinted = np.asarray(refer.showMask(ref)).astype(int)
    inside = refer.getMask(ref)["mask"] > 0
    np.testing.assert_array_equal(tinted[~inside], img[~inside])
    assert (tinted[inside][:, 1] >= img[inside][:, 1]).all()
    assert (tinted != img).any()
    for seg_box in ("seg", "box"):
        sheet = refer.showRef(ref, seg_box)
        assert sheet.width == 16
        assert sheet.height > 12


# Images


@pytest.mark.parametrize("folder", ["images/mscoco/images/train2014", "images/train2014"])
def test_usual_image_folders(tmp_path: Path, folder: str) -> None:
    refer = REFER(write_root(tmp_path, images=folder), "refcoco", "unc")
    assert tmp_path / folder == refer.IMAGE_DIR
    assert refer.open_image(101).size == (16, 12)


def test_the_images_of_a_dataset_of_ones_own_come_first(tmp_path: Path) -> None:
    for dataset in ("mydata", "refcoco"):
        write_root(tmp_path, dataset=dataset)
        assert tmp_path / "images/mscoco/images/train2014" == REFER(tmp_path, dataset).IMAGE_DIR
        write_root(tmp_path, dataset=dataset, images=f"{dataset}/images")
    assert tmp_path / "mydata/images" == REFER(tmp_path, "mydata").IMAGE_DIR
    assert tmp_path / "images/mscoco/images/train2014" == REFER(tmp_path, "refcoco").IMAGE_DIR
    inner = tmp_path / "coco" / "train2014"
    inner.mkdir(parents=True)
    assert inner == REFER(tmp_path, "mydata", image_root=inner.parent).IMAGE_DIR


@pytest.mark.parametrize("option", ["coco/train2014", "coco"])
def test_image_root(tmp_path: Path, option: str) -> None:
    write_root(tmp_path, images="coco/train2014")
    refer = REFER(tmp_path, "refcoco", "unc", image_root=tmp_path / option)
    assert refer.open_image(102).size == (20, 10)


def test_endless_image_name(tmp_path: Path) -> None:
    instances = default_instances()
    instances["images"][0]["file_name"] = "a" * 5000
    refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
    with pytest.raises(InputError, match="does not exist"):
        refer.open_image(101)


def test_missing_images(tmp_path: Path) -> None:
    assert "nowhere" in fails(write_root(tmp_path), image_root=tmp_path / "nowhere")
    refer = REFER(tmp_path)
    refer.image_path(101).unlink()
    with pytest.raises(InputError, match=r"image .*train2014/COCO_\w+101.jpg .* refer/README.md"):
        refer.open_image(101)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"image folder .* does not exist.*--image_root"):
        refer.open_image(101)


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "", "C:/x", "a\0b"])
def test_image_names_stay_inside(tmp_path: Path, name: str) -> None:
    instances = default_instances()
    instances["images"][0]["file_name"] = name
    refer = REFER(write_root(tmp_path, instances=instances), "refcoco", "unc")
    with pytest.raises(InputError, match="leads out of the image folder"):
        refer.open_image(101)


# Missing and damaged files


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "data folder" in fails(tmp_path / "no", "refcoco", "unc")
    assert "no folder 'refcoco'" in fails(tmp_path, "refcoco", "unc")
    message = fails(tmp_path, "refcocoo", "unc")
    assert "has no folder 'refcocoo' (--dataset); it has no dataset at all" in message
    assert "refcoco, refcoco+, refcocog, refclef" in message
    write_root(tmp_path, split_by="google")
    write_root(tmp_path, split_by="umd")
    message = fails(tmp_path, "refcoco", "unc")
    assert "refs(unc).p does not exist; there is google, umd (--splitBy)" in message
    (tmp_path / "refcoco" / "instances.json").unlink()
    assert "instances.json does not exist" in fails(tmp_path, "refcoco", "umd")


@pytest.mark.parametrize("dataset", ["", ".", "..", "../refcoco", "/etc", "a\0", "a" * 5000])
def test_dataset_names_stay_inside(root: Path, dataset: str) -> None:
    message = fails(root / "images", dataset, "unc")
    assert "--dataset" in message


@pytest.mark.parametrize("split_by", ["", "../unc", "un*", "unc\n", "a" * 5000])
def test_odd_split_by(root: Path, split_by: str) -> None:
    assert "there is unc (--splitBy)" in fails(root, "refcoco", split_by)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"images": 1, "annotations": []}',
        '{"images": [1], "annotations": []}',
        '{"images": [{"id": "1"}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a", "width": 0, "height": 5}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a", "width": -2, "height": -5}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a", "width": 1e9, "height": 5}], "annotations": []}',
        '{"images": [], "annotations": [{"id": 1}]}',
        '{"images": [], "annotations": [{"id": 1, "image_id": 1, "category_id": []}]}',
        '{"images": [], "annotations": [], "categories": [{}]}',
        '{"images": [{"id": ' + "9" * 5000 + "}]}",
    ],
)
def test_bad_instances(tmp_path: Path, text: str) -> None:
    assert "instances.json" in fails(write_root(tmp_path, instances=text), "refcoco", "unc")


def test_references_that_dangle(tmp_path: Path) -> None:
    refs = [make_ref(1, 99, 101, "train", ["x"])]
    message = fails(write_root(tmp_path, refs), "refcoco", "unc")
    assert "reference 1 is of annotation 99" in message
    refs = [make_ref(1, 11, 99, "train", ["x"])]
    assert "reference 1 is in image 99" in fails(write_root(tmp_path, refs), "refcoco", "unc")


def test_duplicate_ids(tmp_path: Path) -> None:
    refs = default_refs()
    refs[1]["ref_id"] = 1
    message = fails(write_root(tmp_path, refs), "refcoco", "unc")
    assert "two different references have the id 1" in message
    instances = default_instances()
    instances["annotations"].append(make_annotation(11, 101, [OVERLAPPING]))
    message = fails(write_root(tmp_path, instances=instances), "refcoco", "unc")
    assert "two different annotations have the id 11" in message
    instances = default_instances()
    instances["annotations"].append(instances["annotations"][0])
    assert len(REFER(write_root(tmp_path, instances=instances)).Anns) == 4


# Numbers as people write them


def loosely(value: Any, write: Any, keys: str) -> Any:
    """A copy in which the numbers of some keys are written otherwise."""
    if isinstance(value, list):
        return [loosely(v, write, keys) for v in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, v in value.items():
        if key in keys.split():
            result[key] = [write(i) for i in v] if isinstance(v, list) else write(v)
        else:
            result[key] = loosely(v, write, keys)
    return result


IDS = "id ref_id image_id ann_id ann_ids category_id sent_id width height"


@pytest.mark.parametrize("write", [float, str, "{:03}".format], ids=["12.0", "12", "012"])
def test_numbers_as_people_write_them(tmp_path: Path, write: Any) -> None:
    plain = REFER(write_root(tmp_path / "plain"))
    refs, instances = default_refs(), default_instances()
    both = REFER(
        write_root(tmp_path / "both", loosely(refs, write, IDS), loosely(instances, write, IDS))
    )
    half = REFER(write_root(tmp_path / "half", refs, loosely(instances, write, IDS)))
    for refer in (both, half):
        for name in ("Refs", "Anns", "Imgs", "Cats", "Sents"):
            # Equal is not enough: 12 == 12.0.
            assert repr(getattr(refer, name)) == repr(getattr(plain, name))
        assert refer.getMask(refer.Refs[2])["area"] == plain.getMask(plain.Refs[2])["area"]
        assert refer.arrays.ann_id.tolist() == [11, 12, 13, 14]


def test_lists_of_ids_as_people_write_them(tmp_path: Path) -> None:
    refs: Any = default_refs()
    refs[0] |= {"ann_ids": ["11", 12.0, 11], "category_id": ["2", 1]}
    refs[1] |= {"ann_id": "-1"}
    refer = REFER(write_root(tmp_path, refs))
    assert refer.Refs[1]["ann_ids"] == [11, 12]
    assert refer.Refs[1]["category_id"] == 2
    assert refer.Refs[2]["ann_ids"] == []


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (12, 12),
        (12.0, 12),
        ("12", 12),
        ("-12", -12),
        ("012", 12),
        ("12.0", 12),
        (-3.0, -3),
        (2.0**53, 2**53),
    ],
)
def test_whole_numbers(value: Any, result: int) -> None:
    assert whole(value) == result
    assert type(whole(value)) is int


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        1e300,
        float("nan"),
        float("inf"),
        True,
        None,
        [1],
        {},
        "",
        "1.5",
        " 1",
        "1\n",
        "+1",
        "--1",
        "1_0",
        "x",
        "\u0663",
        "9" * 30,
    ],
)
def test_not_certainly_whole_numbers(value: Any) -> None:
    assert whole(value) is value


# Pickles


def load_bytes(tmp_path: Path, data: bytes) -> list[dict[str, Any]]:
    path = tmp_path / "refs(x).p"
    path.write_bytes(data)
    return load_refs(path)


def python2_bytes(value: Any) -> bytes:
    """What Python 2's cPickle writes for str, int, list and dict: opcodes of byte strings."""
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    if isinstance(value, str):
        data = value.encode("utf-8")
        return pickle.SHORT_BINSTRING + bytes([len(data)]) + data
    if isinstance(value, bytes):
        return pickle.SHORT_BINSTRING + bytes([len(value)]) + value
    if isinstance(value, list):
        items = b"".join(python2_bytes(v) for v in value)
        return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
    pairs = b"".join(python2_bytes(k) + python2_bytes(v) for k, v in value.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def expected() -> list[Any]:
    return [ref | {"ann_ids": [ref["ann_id"]]} for ref in default_refs()]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    assert load_bytes(tmp_path, pickle.dumps(default_refs(), protocol)) == expected()


def test_pickle_of_python_2(tmp_path: Path) -> None:
    data = b"\x80\x02" + python2_bytes(default_refs()) + b"."
    assert load_bytes(tmp_path, data) == expected()


def as_bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [as_bytes(v) for v in value]
    if isinstance(value, dict):
        return {as_bytes(k): as_bytes(v) for k, v in value.items()}
    return value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_bytes(tmp_path: Path, protocol: int) -> None:
    """Python 3 writes bytes in old protocols as calls, the only ones that are let through."""
    data = pickle.dumps(as_bytes(default_refs()), protocol)
    assert load_bytes(tmp_path, data) == expected()


def test_pickle_text_of_mixed_encodings(tmp_path: Path) -> None:
    refs: Any = default_refs()
    refs[0]["sentences"][0]["raw"] = "caf\xe9".encode()
    refs[0]["sentences"][1]["raw"] = "caf\xe9".encode("latin-1")
    loaded = load_bytes(tmp_path, b"\x80\x02" + python2_bytes(refs) + b".")
    assert [s["raw"] for s in loaded[0]["sentences"][:2]] == ["caf\xe9", "caf\xe9"]


def test_missing_texts_are_derived(tmp_path: Path) -> None:
    refs = default_refs()
    del refs[0]["file_name"], refs[0]["sent_ids"]
    refs[0]["sentences"] = [{"sent_id": 5, "raw": "A Cat"}, {"sent_id": 6, "sent": "a dog"}]
    loaded = load_bytes(tmp_path, pickle.dumps(refs))[0]
    assert loaded["sent_ids"] == [5, 6]
    assert loaded["sentences"] == [
        {"sent_id": 5, "raw": "A Cat", "sent": "a cat", "tokens": ["a", "cat"]},
        {"sent_id": 6, "raw": "a dog", "sent": "a dog", "tokens": ["a", "dog"]},
    ]


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def fan_out(levels: int, width: int = 100) -> bytes:
    """Each level is a list that holds the level below many times over."""
    out = io.BytesIO()
    out.write(b"\x80\x02]q\x00")
    for level in range(1, levels):
        out.write(b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * width + b"e")
    return out.getvalue() + b"."


HOSTILE = {
    "os.system": pickle.dumps(Evil(os.system, "touch pwned"), 2),
    "os.system, protocol 0": pickle.dumps([Evil(os.system, "touch pwned")], 0),
    "os.system, protocol 4": pickle.dumps({"refs": Evil(os.system, "touch pwned")}, 4),
    "eval": pickle.dumps(Evil(eval, "open('pwned', 'w')"), 2),
    "inst": b"(S'touch pwned'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch pwned'\no.",
    "chain": pickle.dumps(Evil(getattr, Evil(__import__, "os"), "system"), 2),
    "codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "behind a codec": b"\x80\x02c_codecs\nencode\n0cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "build": b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00aK\x01sb.",
    "persistent": b"Pabc\n.",
    "extension": b"\x80\x02\x82\x01.",
    "numpy function": pickle.dumps(Evil(np.zeros, 3), 2),
    "numpy dates": pickle.dumps([np.datetime64(3, "s")], 2),
    "numpy, cut": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0i8\x85R"
    b"U\3abc\x86R.",
    "numpy, an address": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0O8\x85R"
    b"U\x08abcdefgh\x86R.",
    "numpy, a list of types": b"\x80\x02cnumpy\ndtype\n]X\2\0\0\0O8a\x85R.",
    "set": pickle.dumps({1, 2}, 4),
    "object": pickle.dumps(Path("a"), 4),
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo, text": b"]p99999999999\n.",
    "memo, negative": b"]p-5\n.",
    "long string": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "wide number": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "many digits": b"I" + b"9" * 100_000 + b"\n.",
    "deep": nested(1_000_000),
    "fan-out": fan_out(8),
    "fan-out, deep": fan_out(200),
    "itself": b"\x80\x02]q\x00h\x00a.",
    "empty": b"",
    "cut": pickle.dumps(default_refs(), 2)[:-40],
    "text": b"not a pickle",
    "stack": b"\x80\x020.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",
    "protocol": b"\x80\xff].",
    "zeros": bytes(1000),
    "a number": pickle.dumps(3),
    "a dict": pickle.dumps({}),
    "a list of numbers": pickle.dumps([1]),
    "unhashable": b"\x80\x02}]K\x01s.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_bytes(tmp_path, HOSTILE[name])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_id": "1a"}, "reference 0 needs 'ref_id' as int but has a str"),
        ({"ref_id": True}, "reference 0 needs 'ref_id' as int but has a bool"),
        ({"image_id": 1.5}, "reference 0 needs 'image_id' as int but has a float"),
        ({"image_id": float("nan")}, "reference 0 needs 'image_id' as int but has a float"),
        ({"sentences": [{"sent_id": "x", "raw": "a"}]}, "needs 'sent_id' as int but has a str"),
        ({"ann_id": None}, "needs 'ann_id' as int"),
        ({"split": 3}, "needs 'split' as str"),
        ({"sentences": {}}, "needs 'sentences' as list"),
        ({"sentences": [3]}, "reference 0, sentence 0 is of type int"),
        ({"sentences": [{"sent_id": 1}]}, "sentence 0 needs 'raw' as str but has none"),
        ({"sentences": [{"sent_id": 1, "raw": "a", "sent": 2}]}, "needs 'sent' as str"),
    ],
)
def test_bad_references(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refs = default_refs()
    refs[0] |= change
    with pytest.raises(InputError, match=message):
        load_bytes(tmp_path, pickle.dumps(refs, 2))


def test_pickle_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_refs(tmp_path / "none.p")
    with pytest.raises(InputError, match="not a file"):
        load_refs(tmp_path)


# The one line


def test_input_error_is_one_line() -> None:
    assert str(InputError("a\nb")) == "a b"
    report = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1, in f\n    raise InputError("y")\n'
        "lib.errors.InputError: image a: b is broken\n"
    )
    assert str(InputError(report)) == "image a: b is broken"
    assert str(pickle.loads(pickle.dumps(InputError("x")))) == "x"
