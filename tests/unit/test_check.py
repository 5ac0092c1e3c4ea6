"""The data doctor: what it finds, what it lets pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bert.tokenizer import load_tokenizer
from lib.errors import InputError
from refer import check
from refer.datasets import DATASETS, published_counts
from tests.refer_files import (
    CC0_ROOT,
    REAL_ROOT,
    SQUARE,
    TINY_BERT,
    default_instances,
    make_annotation,
    make_ref,
    write_root,
)
from tests.scripts import REPO

Refs = list[dict[str, Any]]
Tables = dict[str, list[dict[str, Any]]]


def sound_refs() -> Refs:
    """References without any fault, of `default_instances`."""
    return [
        make_ref(1, 11, 101, "train", ["left square", "the red one"]),
        make_ref(2, 12, 101, "train", ["right square"]),
        make_ref(3, 13, 102, "val", ["Round, and small!"]),
        make_ref(4, 14, 102, "val", ["small one"]),
    ]


def sound_instances() -> Tables:
    """`default_instances` without polygons that overlap."""
    instances: Tables = default_instances()
    instances["annotations"][1]["segmentation"] = [SQUARE]
    return instances


def examine(root: Path, **options: Any) -> check.Report:
    return check.examine(check.CheckedREFER(root, "refcoco", "unc"), **options)


def result(report: check.Report, damage: bool) -> dict[str, int]:
    """Number of findings of the checks that have some."""
    return {c.name: len(c.found) for c in report.checks if c.found and c.damage == damage}


def test_sound_data(tmp_path: Path) -> None:
    report = examine(write_root(tmp_path, sound_refs(), sound_instances()), decode=True)
    assert report.sound
    assert result(report, True) == result(report, False) == {}
    assert len({c.name for c in report.checks}) == len(report.checks)
    text = check.as_text(report)
    assert "refcoco(unc) is sound" in text
    assert "DAMAGE" not in text


@pytest.mark.parametrize("root", [CC0_ROOT, REAL_ROOT], ids=["cc0", "real"])
@pytest.mark.parametrize(
    ("dataset", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]
)
def test_real_subsets_are_sound(root: Path, dataset: str, split_by: str) -> None:
    if not root.is_dir():
        pytest.skip("no real subset beside the checkout")
    report = check.examine(check.CheckedREFER(root, dataset, split_by), decode=True)
    assert report.sound, check.as_text(report)
    assert "a subset, or data of your own" in check.as_text(report)


Break = Callable[[Refs, Tables], object]


def _twin(records: list[dict[str, Any]], **changes: Any) -> None:
    records.append({**records[0], **changes})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda r, i: _twin(r), {"repeated_ref_id": 1}),
        (lambda r, i: _twin(r, split="val"), {"repeated_ref_id": 1}),
        (lambda r, i: _twin(i["annotations"], image_id=102), {"repeated_annotation_id": 1}),
        (lambda r, i: _twin(i["images"], width=17), {"repeated_image_id": 1}),
        (lambda r, i: r[1]["sentences"][0].update(sent_id=10), {"repeated_sent_id": 1}),
        (lambda r, i: r[0].update(ann_id=99), {"no_annotation": 1}),
        (lambda r, i: i["annotations"].clear(), {"no_annotation": 4}),
        (lambda r, i: r[3].update(image_id=999), {"no_image_record": 1}),
        (lambda r, i: i["images"].pop(), {"no_image_record": 2}),
        (lambda r, i: i["annotations"][0].update(image_id=102), {"other_image": 1}),
        (lambda r, i: r[2]["sentences"][0].update(raw=" "), {"empty_expression": 1}),
        (lambda r, i: i["images"][0].update(file_name="x.jpg"), {"missing_picture": 1}),
        (lambda r, i: i["images"][0].update(file_name="../x.jpg"), {"missing_picture": 1}),
        (lambda r, i: i["images"][1].update(width=10, height=20), {"picture_shape": 1}),
    ],
)
def test_damaged_records(tmp_path: Path, damage: Break, expected: dict[str, int]) -> None:
    refs, instances = sound_refs(), sound_instances()
    damage(refs, instances)
    report = examine(write_root(tmp_path, refs, instances), decode=True)
    assert result(report, True) == expected
    assert not report.sound
    assert "refcoco(unc) is damaged: 1 of" in check.as_text(report)


def test_the_same_record_twice_does_no_harm(tmp_path: Path) -> None:
    instances = sound_instances()
    _twin(instances["images"])
    _twin(instances["annotations"])
    assert examine(write_root(tmp_path, sound_refs(), instances)).sound


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (None, "bad_outline"),
        ([], "bad_outline"),
        ([[1.0, 2.0, 3.0]], "bad_outline"),
        ([["x"] * 8], "bad_outline"),
        ([[*SQUARE[:-1], float("nan")]], "bad_outline"),
        ([[*SQUARE[:-1], 1e12]], "bad_outline"),
        ({"size": [12, 16], "counts": [5, 5]}, "bad_outline"),
        ([[*SQUARE[:-1], 14.0]], "outside"),
        ([SQUARE, [-2.0, 3.0, 5.0, 3.0, 5.0, 5.0]], "outside"),
        ([[3.0, 3.0] * 4], "empty_mask"),
        ([[2.0, 2.0, 8.0, 8.0]], "empty_mask"),
        ([SQUARE, SQUARE], "empty_mask"),
        ({"size": [12, 16], "counts": [192]}, "empty_mask"),
        ([[*SQUARE[:-1], 8.5]], ""),
        ([[2.0, 2.0, 16.5, 2.0, 8.0, 12.0]], ""),
        ({"size": [12, 16], "counts": [92, 100]}, ""),
    ],
)
def test_outlines(tmp_path: Path, segmentation: Any, expected: str) -> None:
    instances = sound_instances()
    instances["annotations"][0]["segmentation"] = segmentation
    report = examine(write_root(tmp_path, sound_refs(), instances))
    assert result(report, True) == ({expected: 1} if expected else {})
    if expected:
        (line,) = next(c.found for c in report.checks if c.name == expected)
        assert "annotation 11 of reference 1" in line


def test_pixels_lost_to_overlaps_are_a_note(tmp_path: Path) -> None:
    report = examine(write_root(tmp_path, sound_refs(), default_instances()))
    assert report.sound
    (note,) = [c for c in report.checks if c.name == "overlap"]
    assert note.found == ["annotation 12 of reference 2: 4 of 68 pixels"]
    assert note.remark == "4 of 176 pixels count as background"


def test_counting_runs_equals_painting(tmp_path: Path) -> None:
    """The fast count of pixels is the mask's, whatever the number of polygons."""
    rng = np.random.default_rng(0)
    instances = sound_instances()
    instances["annotations"] = [
        make_annotation(
            number,
            101,
            [
                (rng.uniform(0, (16, 12), (int(rng.integers(3, 9)), 2))).ravel().tolist()
                for _ in range(1 + number % 4)
            ],
        )
        for number in range(100)
    ]
    refs = [make_ref(number, number, 101, "train", ["it"]) for number in range(100)]
    refer = check.CheckedREFER(write_root(tmp_path, refs, instances), "refcoco", "unc")
    lost = 0
    for ref in refer.sound:
        mask = refer.getMask(ref)["mask"]
        segmentation = refer.refToAnn[ref["ref_id"]]["segmentation"]
        polygons, size = check.polygons_of(segmentation), mask.shape
        assert len(polygons) == 1 + ref["ref_id"] % 4
        painted = (np.count_nonzero(mask), np.count_nonzero(mask > 1))
        assert check._count_pixels(refer, segmentation, *size, polygons, "x") == painted
        assert check._count_pixels(refer, segmentation, *size, [], "x") == painted
        lost += painted[1]
    assert lost > 0


def test_images(tmp_path: Path) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances())
    first, second = sorted(root.rglob("*.jpg"))
    first.write_bytes(first.read_bytes()[:300])
    Image.new("L", (10, 20)).save(second)  # width and height changed over
    assert examine(root).sound  # without decoding, existence is all that is asked for
    report = examine(root, decode=True)
    assert result(report, True) == {"bad_picture": 1, "picture_shape": 1}
    assert "has 10x20 pixels, but its annotations are of 20x10" in check.as_text(report)


def test_resized_copies_are_a_note(tmp_path: Path) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances())
    Image.new("L", (10, 5)).save(max(root.rglob("*.jpg")))
    report = examine(root, decode=True)
    assert report.sound
    assert result(report, False) == {"picture_size": 1}
    assert "10x5 instead of 20x10" in check.as_text(report)


def test_limit_of_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances())
    run(root, "--images", "--max_pixels", "200")
    with pytest.raises(InputError, match="image 102 has 20x10 pixels, more than --max_pixels 199"):
        run(root, "--images", "--max_pixels", "199")


def test_no_image_folder(tmp_path: Path) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances(), images=None)
    report = examine(root, decode=True)
    assert result(report, True) == {"missing_picture": 2}
    assert "--image_root" in check.as_text(report)


def test_notes_do_not_fail(tmp_path: Path) -> None:
    refs = [
        *sound_refs(),
        make_ref(5, 11, 101, "val", ["one " * 30, "two " * 18, "three " * 19]),
        make_ref(6, 12, 101, "val", []),
    ]
    report = examine(write_root(tmp_path, refs, sound_instances()))
    assert report.sound
    expected = {"no_expression": 1, "long_expression": 2, "shared_image": 1}
    assert result(report, False) == expected
    (shared,) = [c for c in report.checks if c.name == "shared_image"]
    assert shared.remark == "train, val: 1"


@pytest.mark.parametrize(("max_tokens", "expected"), [(3, 5), (4, 2), (5, 2), (9, 0)])
def test_tokens_are_counted(tmp_path: Path, max_tokens: int, expected: int) -> None:
    """Ids 'a' and '[UNK]' of the small vocabulary: one a word and sign, and two around them."""
    refs = sound_refs()
    texts = iter(["a a", "a a", "a a", "a, a a!", "a a a a"])
    for ref in refs:
        for sentence in ref["sentences"]:
            sentence["raw"] = next(texts)
    tokenizer = load_tokenizer(TINY_BERT)
    root = write_root(tmp_path, refs, sound_instances())
    report = examine(root, tokenizer=tokenizer, max_tokens=max_tokens)
    (note,) = [c for c in report.checks if c.name == "long_expression"]
    assert len(note.found) == expected


# Counts


def test_counts_stand_beside_the_published(tmp_path: Path) -> None:
    refs = [*sound_refs(), make_ref(5, 11, 101, "testAB", ["x"]), make_ref(6, 11, 101, "dev", [])]
    report = examine(write_root(tmp_path, refs, sound_instances()))
    rows = {split.name: split for split in report.splits}
    assert list(rows) == ["train", "val", "testA", "testB", "dev", "all"]
    assert rows["train"].found == check.Counts(2, 3, 1)
    assert rows["train"].published == check.Counts(42404, 120624, 16994)
    assert rows["train"].as_published is False
    assert rows["testA"].found == rows["testB"].found == check.Counts(1, 1, 1)
    assert rows["dev"].as_published is None
    assert rows["all"].found == check.Counts(6, 6, 2)


def test_counts_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances())
    published = {"train": check.Counts(2, None, 1), "all": check.Counts(4, 5, 2)}
    monkeypatch.setattr(check, "published_counts", lambda *_: published)
    report = examine(root)
    assert [s.as_published for s in report.splits] == [True, None, True]
    assert "All counts are as published." in check.as_text(report)


def test_an_unverified_count_is_not_held_against_the_data() -> None:
    published = published_counts("refcocog", "google")["val"]
    counts = check.Counts(published.refs, 1, published.images)
    assert check.Split("val", counts, published, verified=False).as_published
    assert not check.Split("val", counts, published).as_published


def test_published_counts_add_up() -> None:
    for dataset, splits in ((d, s) for d, i in DATASETS.items() for s in i.counts.values()):
        if "all" in splits:
            parts = [counts for name, counts in splits.items() if name != "all"]
            for field in ("refs", "sentences", "images"):
                known = [getattr(part, field) for part in parts]
                whole = getattr(splits["all"], field)
                if dataset == "grefcoco":  # the other splits' counts are not verified
                    assert field != "sentences" or known == [209344] < [whole]
                elif dataset != "risbench":  # of which the whole is published alone
                    assert whole == (None if None in known else sum(known)), (dataset, field)


def test_readme_has_the_same_counts() -> None:
    lines = (REPO / "refer" / "README.md").read_text(encoding="utf-8").splitlines()
    names = ["train", "val", "test", "testA", "testB"]
    for dataset, split_by, splits in (
        (info.name, split_by, splits)
        for info in DATASETS.values()
        for split_by, splits in info.counts.items()
        if info.name.startswith("refcoco") and info.name != "refcoco-m"  # docs/datasets.md
    ):
        (row,) = [line for line in lines if line.startswith(f"| {dataset}, {split_by} |")]
        cells = dict(zip(names, row.split("|")[2:-1], strict=True))
        for name in names:
            numbers = [int(n) for n in re.findall(r"\d+", cells[name].replace("¹", ""))]
            counts = splits.get(name)
            told = [counts.refs, counts.sentences, counts.images] if counts else []
            assert numbers == [n for n in told if n is not None], (dataset, split_by, name)


# The command


def run(root: Path, *options: str) -> None:
    check.main(["--refer_data_root", str(root), *options])


def test_json_has_every_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refs = sound_refs()
    refs += [make_ref(10 + i, 99, 101, "train", ["\x1b[31mred\ud800 " * 9]) for i in range(5)]
    root = write_root(tmp_path, refs, sound_instances())
    with pytest.raises(SystemExit) as caught:
        run(root, "--json", str(tmp_path / "out" / "report.json"), "--max_tokens", "5")
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert "and 2 more" in printed
    assert "\x1b" not in printed
    assert r"\x1b[31mred\ud800" in printed
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["sound"] is False
    checks = {c["name"]: c for c in content["checks"]}
    assert checks["no_annotation"]["count"] == len(checks["no_annotation"]["found"]) == 5
    assert checks["no_annotation"]["verdict"] == "damage"
    assert checks["long_expression"]["verdict"] == "note"
    assert content["splits"][0]["published"]["refs"] == 42404


def test_sound_data_exit_as_usual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances(), dataset="mine", split_by="me")
    run(root, "--dataset", "mine", "--splitBy", "me", "--images")
    printed = capsys.readouterr().out
    assert "mine(me) is sound" in printed
    assert "No counts are published" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "nothing"], ["nothing", "it has refcoco"]),
        (["--splitBy", "umd"], ["umd", "unc"]),
        (["--image_root", "nowhere"], ["nowhere", "--image_root"]),
        (["--bert_tokenizer", "nowhere/bert"], ["nowhere/bert"]),
        (["--max_tokens", "0"], ["--max_tokens 0"]),
        (["--max_pixels", "0"], ["--max_pixels 0"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--json", "/dev/null/x.json"], ["/dev/null"]),
    ],
)
def test_wrong_usage(tmp_path: Path, options: list[str], words: list[str]) -> None:
    root = write_root(tmp_path, sound_refs(), sound_instances())
    with pytest.raises(InputError) as caught:
        run(root, *options)
    assert all(word in str(caught.value) for word in words)


def test_no_references_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no references"):
        run(write_root(tmp_path, []))


def test_a_split_per_reference(tmp_path: Path) -> None:
    """A pickle whose splits are nonsense is counted in bounded time and space."""
    refs = [make_ref(i, 11, 101, f"part {i}", ["it"]) for i in range(1000)]
    report = examine(write_root(tmp_path, refs, sound_instances()))
    assert len(report.splits) == check.MAX_SPLITS + 1
    assert report.splits[-1].found.refs == 1000
