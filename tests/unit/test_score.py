"""Scoring and comparing files of predictions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lib.evaluation.metrics import summarise
from tests.record_files import Line, cc0_lines, rle, write_lines
from tests.scripts import one_line_error
from tools import score
from tools.report.records import read_records


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    return cc0_lines()


def written(name: str) -> dict:
    return json.loads(Path(name).read_text())


def table_of(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(name).read_text(encoding="utf-8"))))


def test_score_is_that_of_the_counts(
    lines: list[Line], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts, not rounded IoUs, decide; here they are not even those of the masks."""
    for i, changed in enumerate(lines := [dict(line) for line in lines]):
        changed |= {
            "intersection": i,
            "union": 7 * i + 1,
            "iou": i / (7 * i + 1),
            "kind": "ab"[i % 2],
        }
    score.main([str(write_lines(here / "a.jsonl", lines)), "--json", "s.json", "--csv", "s.csv"])
    splits = written("s.json")["splits"]
    assert list(splits) == list(dict.fromkeys(line["split"] for line in lines))
    for split, rows in splits.items():
        for name, kind in (("all", None), ("kind: a", "a"), ("kind: b", "b")):
            chosen = [
                x for x in lines if x["split"] == split and (kind is None or x["kind"] == kind)
            ]
            counts = np.array([(x["intersection"], x["union"]) for x in chosen]).T
            assert rows[name].items() >= summarise(*counts).as_dict().items()
        objects = {tuple(x["ann_ids"]) for x in lines if x["split"] == split}
        assert rows["all"]["objects"] == len(objects)
    assert written("s.json")["protocol"] == "standard"
    printed = capsys.readouterr().out
    assert f"{splits['val']['all']['mIoU']:.2f}" in printed
    assert "NOT" not in printed
    table = table_of("s.csv")
    assert [row["row"] for row in table] == ["measured", "low", "high"] * len(splits)


def test_score_from_masks(
    lines: list[Line], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [{**line, "intersection": 0, "union": 1, "iou": 0.0} for line in lines]
    path = write_lines(here / "a.jsonl", changed)
    score.main([str(path), "--from_masks", "--json", "s.json"])
    for split, rows in written("s.json")["splits"].items():
        counts = []
        for line in lines:
            if line["split"] == split:
                a, b = (coco_mask.decode(line[k]).astype(bool) for k in ("segmentation", "truth"))
                counts.append((int((a & b).sum()), int((a | b).sum())))
        expected = summarise(*np.array(counts).T).as_dict()
        assert rows["all"].items() >= expected.items()
        assert expected["oIoU"] > 0
    assert written("s.json")["protocol"] == "eval_size=original"
    assert "NOT the standard protocol: eval_size=original" in capsys.readouterr().out


def one_object_each(gains: list[int], ann_ids: list[int] | None = None) -> list[list[Line]]:
    """Two files of samples with a union of 100, whose intersections differ by the gains."""
    mask = rle(np.ones((4, 5), bool))
    about = {"split": "val", "image_id": 1, "category_id": 1, "sentence": "x", "category": "c"}
    about |= {"file_name": "a.jpg", "height": 4, "width": 5, "same_category": 0, "score": 0.5}
    about |= {"segmentation": mask, "truth": mask, "protocol": "standard"}
    files: list[list[Line]] = [[], []]
    for i, gain in enumerate(gains):
        ids = {"ref_id": i, "ann_ids": [ann_ids[i] if ann_ids else i], "sent_ids": [i]}
        for file, inter in zip(files, (40, 40 + gain), strict=True):
            counts = {"intersection": inter, "union": 100, "iou": inter / 100}
            file.append({**about, **ids, **counts})
    return files


def compared(here: Path, files: list[list[Line]], *options: str) -> dict:
    paths = [
        str(write_lines(here / f"{name}.jsonl", f)) for name, f in zip("ab", files, strict=True)
    ]
    score.main([*paths, "--json", "c.json", "--csv", "c.csv", *options])
    return written("c.json")


def test_comparison_by_hand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five objects better by different amounts: both exact tests give 2 / 2**5."""
    result = compared(here, one_object_each([5, 10, 15, 20, 30]))
    val = result["splits"]["val"]
    assert val["samples"] == val["objects"] == {"better": 5, "worse": 0, "equal": 0}
    assert val["wilcoxon_p"] == pytest.approx(2 / 32)
    assert val["sign_test_p"] == pytest.approx(2 / 32)
    assert val["b"]["mIoU"] - val["a"]["mIoU"] == pytest.approx(16)
    low, high = val["difference_bootstrap_95"]["mIoU"]
    assert 5 <= low < 16 < high <= 30
    printed = capsys.readouterr().out
    assert "samples: 5 better, 0 worse, 0 equal" in printed
    assert "p = 0.0625" in printed
    assert "worse in B: none" in printed


def test_signs_cancel(here: Path) -> None:
    result = compared(here, one_object_each([10, -10, 0, 0]))["splits"]["val"]
    assert result["samples"] == {"better": 1, "worse": 1, "equal": 2}
    assert result["sign_test_p"] == 1.0
    low, high = result["difference_bootstrap_95"]["mIoU"]
    assert low < 0 < high


def test_nothing_changed(here: Path) -> None:
    result = compared(here, one_object_each([0, 0, 0]))["splits"]["val"]
    assert (result["wilcoxon_p"], result["sign_test_p"]) == (1.0, 1.0)
    assert result["samples"] == {"better": 0, "worse": 0, "equal": 3}
    assert set(map(tuple, result["difference_bootstrap_95"].values())) == {(0.0, 0.0)}


def test_tests_are_over_objects(here: Path) -> None:
    """Five expressions of one object are one observation, not five."""
    result = compared(here, one_object_each([5, 10, 15, 20, 30, -10], [1] * 5 + [2]))
    val = result["splits"]["val"]
    assert val["samples"] == {"better": 5, "worse": 1, "equal": 0}
    assert val["objects"] == {"better": 1, "worse": 1, "equal": 0}
    assert val["sign_test_p"] == val["wilcoxon_p"] == 1.0


def test_changes_are_ranked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = one_object_each([0, 30, -40, 10, -5])
    files[0][2]["sentence"] = files[1][2]["sentence"] = 'the "\x1b[31mred\n, one' + 90 * "x"
    compared(here, files, "--top", "1")
    rows = table_of("c.csv")
    assert [float(row["gain"]) for row in rows] == pytest.approx([-40, -5, 0, 10, 30])
    assert rows[0]["sentence"] == files[0][2]["sentence"]
    assert (rows[0]["ref_id"], rows[0]["sent_ids"]) == ("2", "2")
    printed = capsys.readouterr().out
    assert "-40.00" in printed
    assert "+30.00" in printed
    assert "-5.00  " not in printed
    assert "\x1b" not in printed


def test_samples_of_one_file_only_are_reported(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = one_object_each([10, 10, 10, 10])
    result = compared(here, [a[:3], b[1:][::-1]])
    assert (result["only_in_a"], result["only_in_b"]) == (1, 1)
    assert result["splits"]["val"]["samples"]["better"] == 2
    assert "2 samples in both; not compared: 1 only in A, 1 only in B" in capsys.readouterr().out


def test_other_protocols_and_other_data_are_refused(here: Path) -> None:
    a, b = one_object_each([10, 20])
    paths = [str(write_lines(here / "a.jsonl", a)), str(here / "b.jsonl")]
    for change, words in (
        ({"protocol": "eval_mode=cat"}, ["eval_mode=cat", "standard", "--force"]),
        ({"truth": rle(np.zeros((4, 5), bool))}, ["2 of 2", "true mask", "--force"]),
    ):
        write_lines(here / "b.jsonl", [line | change for line in b])
        line = one_line_error(score.main, paths)
        assert all(word in line for word in words), line
        score.main([*paths, "--force"])
    write_lines(here / "b.jsonl", [line | {"ref_id": 99 + i} for i, line in enumerate(b)])
    assert "no sample in common" in one_line_error(score.main, [*paths, "--force"])


def test_from_masks_makes_sizes_comparable(here: Path) -> None:
    """One was counted at the model's size and the other at the image's: masks are at both."""
    a, b = one_object_each([10, 20])
    a = [line | {"protocol": "img_size=56"} for line in a]
    b = [line | {"protocol": "eval_size=original img_size=56"} for line in b]
    result = compared(here, [a, b], "--from_masks")
    assert result["protocols"] == ["eval_size=original img_size=56"]
    assert result["splits"]["val"]["samples"] == {"better": 0, "worse": 0, "equal": 2}
    assert result["splits"]["val"]["b"]["mIoU"] == 100


def _cut(text: str) -> str:
    return text[:-40]


def _wrong_counts(text: str) -> str:
    head, _, last = text.rstrip("\n").rpartition("\n")
    changed = json.loads(last)
    changed["segmentation"]["counts"] = "zzz"
    return f"{head}\n{json.dumps(changed)}\n"


@pytest.mark.parametrize("damage", [_cut, _wrong_counts])
def test_damage_names_file_and_line(
    damage: Callable[[str], str], lines: list[Line], here: Path
) -> None:
    path = write_lines(here / "bad.jsonl", lines)
    path.write_text(damage(path.read_text()))
    for argv in (["bad.jsonl"], ["bad.jsonl", "bad.jsonl"]):
        line = one_line_error(score.main, argv)
        assert f"bad.jsonl, line {len(lines)}" in line


def test_options(lines: list[Line], here: Path) -> None:
    path = str(write_lines(here / "a.jsonl", lines))
    assert "3 files" in one_line_error(score.main, [path] * 3)
    assert "--top -1" in one_line_error(score.main, [path, path, "--top", "-1"])
    assert "nowhere" in one_line_error(score.main, ["nowhere.jsonl"])
    (here / "file").write_text("")
    assert "cannot make" in one_line_error(score.main, [path, "--json", "file/s.json"])


def test_a_file_against_itself(lines: list[Line], here: Path) -> None:
    path = str(write_lines(here / "a.jsonl", lines))
    score.main([path, path, "--json", "c.json"])
    splits = written("c.json")["splits"]
    assert sum(s["samples"]["equal"] for s in splits.values()) == len(read_records(path))
