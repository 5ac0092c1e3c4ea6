"""The report's numbers, its text, and what the script says of bad input."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.errors import InputError
from tests.record_files import Line, cc0_lines, rle, write_lines
from tests.refer_files import CC0_ROOT
from tools.report import __main__ as report
from tools.report import charts

IMAGES = CC0_ROOT / "images" / "mscoco" / "images"
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '<!--<script><img src=x onerror="window.hacked = 2"> ${hacked} $data {{x}}',
    "\"quotes' & &amp; \\ \u2028 \x00 \x1b[31m",
    "\U0001f992 left 左の犬 \u202eABC\u202c كلب على اليسار",
    "a lone \ud83d surrogate",
    "",
    "long " * 300,
)


class Reader(HTMLParser):
    """Collects a page's tags, scripts, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif data.strip():
            self.text.append(data.strip())

    @property
    def data(self) -> Any:
        """What the gallery is made of."""
        return json.loads(self.scripts[0])


def make(tmp_path: Path, lines: list[Line], *options: str, images: Path = IMAGES) -> Reader:
    """The report of some lines; options may begin with more files."""
    path = write_lines(tmp_path / "p.jsonl", lines)
    output = tmp_path / "out" / "report.html"
    given = ["--image_root", str(images), "--output", str(output)]
    # The last of an option counts, and files stand before all options.
    files = [option for option in options[:1] if option.endswith(".jsonl")]
    report.main([str(path), *files, *given, *options[len(files) :]])
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    return Reader(output.read_text(encoding="utf-8"))


def expected_row(lines: list[Line]) -> list[str]:
    """The metrics, computed anew."""
    inter = np.array([line["intersection"] for line in lines], float)
    union = np.array([line["union"] for line in lines], float)
    iou = np.where(union > 0, inter / np.maximum(union, 1), 0)
    values = [(iou >= k).mean() for k in (0.5, 0.6, 0.7, 0.8, 0.9)]
    values += [inter.sum() / union.sum(), iou.mean()]
    return [f"{100 * v:.2f}" for v in values] + [str(len(lines))]


def with_kinds() -> list[Line]:
    lines = cc0_lines()
    for i, line in enumerate(lines):
        line["kind"] = ("size", "location")[i % 2]
    return lines


def test_metrics_of_splits_and_kinds(tmp_path: Path) -> None:
    lines = with_kinds()
    text = make(tmp_path, lines).text
    for split in ("train", "val", "testA"):
        of_split = [line for line in lines if line["split"] == split]
        at = text.index(split, text.index("mIoU"))
        assert text[at + 1 : at + 9] == expected_row(of_split)
        for kind in {line["kind"] for line in of_split}:
            of_kind = [line for line in of_split if line["kind"] == kind]
            inner = text.index(f"kind: {kind}", at)
            assert text[inner + 1 : inner + 9] == expected_row(of_kind)


def test_empty_masks_only(tmp_path: Path) -> None:
    lines = cc0_lines()[:2]
    empty = rle(np.zeros(lines[0]["truth"]["size"], bool))
    for line in lines:
        line |= {"truth": empty, "segmentation": empty, "iou": 0, "intersection": 0, "union": 0}
    text = make(tmp_path, lines).text
    assert "-" in text  # oIoU, as the tables of test.py print it
    assert "nan" not in text


def test_protocol_is_named(tmp_path: Path) -> None:
    assert "Protocol: standard." in make(tmp_path, cc0_lines()).text
    odd = [line | {"protocol": "eval_mode=cat <b>"} for line in cc0_lines()]
    page = make(tmp_path, odd)
    assert "Not the standard protocol: eval_mode=cat <b>." in page.text
    assert page.text[page.text.index("val") + 1] == "[eval_mode=cat <b>]"
    assert ("b", {}) not in page.tags


def test_gallery_holds_every_sample_and_each_image_once(tmp_path: Path) -> None:
    lines = cc0_lines()
    page = make(tmp_path, lines, "--image_side", "100")
    columns, images = page.data["columns"], page.data["images"]
    for i, line in enumerate(lines):
        for name in ("sentence", "ref_id", "ann_ids", "intersection", "union", "sent_ids"):
            assert columns[name][i] == line[name]
        assert columns["category_names"][columns["category"][i]] == line["category"]
        assert columns["truth_masks"][columns["truth"][i]] == line["truth"]["counts"]
        assert columns["prediction"][i] == line["segmentation"]["counts"]
        assert images[columns["image"][i]]["file"] == line["file_name"]
    assert len(columns["truth_masks"]) == len({tuple(line["ann_ids"]) for line in lines})
    embedded = {
        a["id"]: s
        for (_, a), s in zip(_script_tags(page), page.scripts, strict=True)
        if (a.get("id") or "").startswith("image-")
    }
    assert len(embedded) == len(images) == 4
    for number, image_file in enumerate(images):
        with Image.open(io.BytesIO(base64.b64decode(embedded[f"image-{number}"]))) as small:
            assert (small.format, max(small.size)) == ("JPEG", 100)
            assert small.width / small.height == pytest.approx(
                image_file["width"] / image_file["height"], abs=0.02
            )


def _script_tags(page: Reader) -> list[tuple[str, dict[str, str | None]]]:
    return [(tag, attributes) for tag, attributes in page.tags if tag == "script"]


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    page = make(tmp_path, cc0_lines())
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base"), tag
        assert not {"src", "href", "action", "onclick", "onload"} & attributes.keys(), tag
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0]
    assert "@import" not in style
    assert "url(" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|innerHTML|import\(|eval)\b", page.scripts[-1])


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    lines = cc0_lines()
    plain = make(tmp_path, lines)
    for line, text in zip(lines, HOSTILE, strict=False):
        line |= {"sentence": text, "category": text, "kind": text[:60], "split": text[:30]}
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # surrogates escaped
    output = tmp_path / "out" / "report.html"
    report.main([str(path), "--image_root", str(IMAGES), "--output", str(output)])
    page = Reader(output.read_text(encoding="utf-8"))
    assert page.data["columns"]["sentence"][: len(HOSTILE)] == list(HOSTILE)
    assert _script_tags(page) == _script_tags(plain)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags} | {"label"}
    assert page.scripts[-1] == plain.scripts[-1]
    assert not any("onerror" in attributes for _, attributes in page.tags)


def copy_images(folder: Path) -> list[Path]:
    shutil.copytree(IMAGES / "train2014", folder)
    return sorted(folder.iterdir())


def test_missing_and_damaged_images_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = copy_images(tmp_path / "photos")
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:2000])
    page = make(tmp_path, cc0_lines(), images=tmp_path / "photos")
    assert "2 of 4 images cannot be shown: " in capsys.readouterr().out
    assert len(page.data["images"]) == 4
    assert len(page.scripts) == 2 + 2


def test_an_image_of_another_shape_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its masks would lie anywhere."""
    files = copy_images(tmp_path / "photos")
    with Image.open(files[0]) as image:
        cropped = image.crop((0, 0, image.width // 2, image.height))
    cropped.save(files[0])
    make(tmp_path, cc0_lines(), images=tmp_path / "photos")
    out = capsys.readouterr().out
    assert "1 of 4 images cannot be shown: " in out
    assert "it is another image, or cropped" in out


def test_images_are_found_as_in_training(tmp_path: Path) -> None:
    """Under another spelling, resized, and never outside of their folder."""
    files = copy_images(tmp_path / "photos")
    with Image.open(files[0]) as image:
        image.reduce(2).save(files[0].with_suffix(".JPG"))
    files[0].unlink()
    outside = files[3].rename(tmp_path / "outside.jpg")
    lines = cc0_lines()
    for line in lines:
        is_outside = line["file_name"] == files[3].name
        line["file_name"] = str(outside) if is_outside else "C:\\photos\\" + line["file_name"]
    page = make(tmp_path, lines, images=tmp_path / "photos")
    assert len(page.scripts) == 2 + 3


def test_limit_of_pixels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pixels, more than --max_pixels 50000 allows"):
        make(tmp_path, cc0_lines(), "--max_pixels", "50000")


def test_no_image_at_all(tmp_path: Path) -> None:
    for file in copy_images(tmp_path / "photos"):
        file.unlink()
    with pytest.raises(InputError, match=r"none of the 4 images can be read \(--image_root\)"):
        make(tmp_path, cc0_lines(), images=tmp_path / "photos")
    with pytest.raises(InputError, match="does not exist"):
        make(tmp_path, cc0_lines(), images=tmp_path / "nowhere")


def test_finds_images_below_a_data_root(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", cc0_lines())
    output = tmp_path / "r.html"
    root = ["--refer_data_root", str(CC0_ROOT), "--dataset", "refcoco+"]
    report.main([str(path), *root, "--output", str(output)])
    assert output.read_text(encoding="utf-8").count('id="image-') == 4


def test_max_samples_limits_the_gallery_only(tmp_path: Path) -> None:
    lines = cc0_lines()
    page = make(tmp_path, lines, "--max_samples", "5")
    assert page.data["columns"]["sentence"] == [lines[i]["sentence"] for i in (0, 5, 10, 15, 20)]
    assert any("5 of 25 samples" in text for text in page.text)
    val = [line for line in lines if line["split"] == "val"]
    at = page.text.index("val", page.text.index("mIoU"))
    assert page.text[at + 1 : at + 9] == expected_row(val)


def test_several_files_are_joined(tmp_path: Path) -> None:
    lines = cc0_lines()
    more = write_lines(tmp_path / "more.jsonl", lines[10:])
    page = make(tmp_path, lines[:10], str(more))
    assert page.data["columns"]["sentence"] == [line["sentence"] for line in lines]
    with pytest.raises(InputError, match="give one of them with --compare"):
        make(tmp_path, lines, str(more))
    other = [line | {"protocol": "text=sent"} for line in lines[10:]]
    write_lines(more, other)
    with pytest.raises(InputError, match="another protocol"):
        make(tmp_path, lines[:10], str(more))


def test_comparison(tmp_path: Path) -> None:
    ours, theirs = cc0_lines(0), cc0_lines(1)
    other = write_lines(tmp_path / "other.jsonl", theirs[3:][::-1])  # order does not matter
    page = make(tmp_path, ours, "--compare", str(other))
    delta = np.array([a["iou"] - b["iou"] for a, b in zip(ours[3:], theirs[3:], strict=True)])
    note = next(text for text in page.text if text.startswith("Compared with"))
    assert f"mean IoU {100 * delta.mean():+.2f} points" in note
    better, worse = int((delta > 0).sum()), int((delta < 0).sum())
    assert f"{better} better, {worse} worse, {len(delta) - better - worse} the same" in note
    assert better
    assert worse
    assert "Without a partner: 3 here, 0 there." in note
    columns = page.data["columns"]
    assert columns["other"][:4] == [None] * 3 + [theirs[3]["segmentation"]["counts"]]
    assert columns["other_pixels"][3] == [theirs[3]["intersection"], theirs[3]["union"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol": "text=sent"}, "protocol 'text=sent'"),
        ({"split": "elsewhere"}, "none of the samples"),
        ({"truth": cc0_lines()[0]["segmentation"]}, "another true mask of reference"),
    ],
)
def test_comparison_that_cannot_be(tmp_path: Path, change: Line, says: str) -> None:
    lines = cc0_lines(2)[:1]
    other = write_lines(tmp_path / "other.jsonl", [line | change for line in lines])
    with pytest.raises(InputError, match=says):
        make(tmp_path, lines, "--compare", str(other))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max_samples", "-1"], "--max_samples -1"),
        (["--image_side", "1"], "--image_side 1: give 32 to 4096"),
        (["--output", "/dev/null/r.html"], "the folder /dev/null"),
        (["--image_root", "/nowhere"], "/nowhere"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(tmp_path, cc0_lines()[:1], *options)


def test_bad_line_is_named(tmp_path: Path) -> None:
    lines = cc0_lines()[:3]
    lines[2]["file_name"] = "../secret.jpg"
    with pytest.raises(InputError, match=r"p\.jsonl, line 3: .* leads out of the image folder"):
        make(tmp_path, lines)


def test_spread() -> None:
    assert report.spread(3, 0) == report.spread(3, 9) == [0, 1, 2]
    assert report.spread(10, 4) == [0, 2, 5, 7]


def test_histogram_counts() -> None:
    iou = np.array([0, 0, 0.04, 0.05, 0.1, 0.15, 0.3, 0.6, 0.95, 1.0])
    titles = re.findall(r"IoU ([\d.]+) to \(?[^:]*: (\d+) of 10<", charts.histogram(iou))
    counts = {float(low): int(n) for low, n in titles}
    assert len(counts) == 20
    assert {k: n for k, n in counts.items() if n} == {
        0: 3,
        0.05: 1,
        0.1: 1,
        0.15: 1,
        0.3: 1,
        0.6: 1,
        0.95: 2,
    }


def test_precision_curve_passes_the_table_and_its_area_is_the_mean() -> None:
    iou = np.random.default_rng(0).random(500)
    curve = charts.precision(iou)
    assert curve[0] == 1
    assert [curve[k] for k in (50, 60, 70, 80, 90)] == [
        (iou >= k).mean() for k in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    area = (curve[1:] + curve[:-1]).mean() / 2
    assert area == pytest.approx(iou.mean(), abs=0.01)
    assert f"mIoU = {100 * iou.mean():.2f}" in charts.precision_curves({"<val>": iou})
    assert "<val>" not in charts.precision_curves({"<val>": iou})


@pytest.mark.parametrize(
    ("value", "top"),
    [(0, 4), (1, 4), (4, 4), (5, 8), (9, 12), (99, 100), (101, 120), (650, 800), (2345, 2400)],
)
def test_scale_ends_at_a_round_number(value: int, top: int) -> None:
    assert charts._round_up(value) == top
