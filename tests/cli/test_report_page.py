"""The report in a real browser: it is used as a person would, and its pixels are looked at."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lib.visualize import GROUND_TRUTH, PREDICTION
from tests.browser import Page, find_browser, open_browser
from tests.record_files import Line, cc0_lines, write_lines
from tests.refer_files import CC0_ROOT
from tools.report import __main__ as report

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no chromium or google-chrome on PATH"
)

IMAGES = CC0_ROOT / "images" / "mscoco" / "images" / "train2014"
MISSING = "COCO_train2014_000000900002.jpg"  # this image is left out: a grey box
GREY, WHITE, STRIPES = 150, 255, (0.6, 0.25)
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2"> it\'s "<b>bold</b>" &lt;',
    "\u202eleft \u0643\u0644\u0628 \U0001f992 \u2028 end",
)


def sentence_lines() -> list[Line]:
    """25 samples of 4 images; two kinds; three hostile expressions."""
    lines = cc0_lines()
    for i, line in enumerate(lines):
        line["kind"] = ("size", "<u>kind</u>")[i % 2]
    for line, text in zip(lines, HOSTILE, strict=False):
        line["sentence"] = text
    return lines


LINES = sentence_lines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the report and one that compares."""
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(IMAGES, root / "photos")
    (root / "photos" / MISSING).unlink()
    write_lines(root / "a.jsonl", LINES)
    theirs = zip(LINES, cc0_lines(9), strict=True)
    write_lines(root / "b.jsonl", [b | {"sentence": a["sentence"]} for a, b in theirs])
    base = [str(root / "a.jsonl"), "--image_root", str(root / "photos"), "--output"]
    report.main([*base, str(root / "report.html")])
    report.main([*base, str(root / "compare.html"), "--compare", str(root / "b.jsonl")])
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        page.look(1300, 900)
        yield page


Open = Callable[..., Page]


@pytest.fixture
def page(browser: Page, folder: Path) -> Iterator[Page]:
    """The report, freshly loaded; it must end without errors or requests."""
    browser.problems.clear()
    browser.open(folder / "report.html")
    yield browser
    assert browser.problems == []
    assert browser.requests == []
    assert browser.run("window.hacked === undefined")


def shown(page: Page) -> list[int]:
    """Samples of the cards, in order."""
    return page.run("[...document.querySelectorAll('.card')].map((c) => Number(c.dataset.sample))")


def where(condition: Callable[[Line], bool], lines: Sequence[Line] = LINES) -> list[int]:
    return [i for i, line in enumerate(lines) if condition(line)]


def pixels(page: Page, selector: str) -> npt.NDArray[np.int64]:
    """(H, W, 3) of a canvas, once it is drawn."""
    canvas = f"document.querySelector({json.dumps(selector)})"
    page.run(f"{canvas}.scrollIntoView()")
    page.wait(f"{canvas}.dataset.drawn !== undefined")
    packed = page.run(f"{canvas}.toDataURL('image/png')").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(packed))) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


def expected_mask(rle: dict[str, Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    """A mask at another size, by pycocotools and numpy: the nearest pixel."""
    mask = coco_mask.decode(rle).astype(bool)
    rows = np.floor((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
    columns = np.floor((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
    return mask[np.ix_(rows, columns)]


def near(image: npt.NDArray[np.int64], color: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Where an image has a colour."""
    return (np.abs(image - np.array(color)) <= 1).all(-1)


def filled(image: npt.NDArray[np.int64], color: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Where a colour is drawn over grey, as one of the two kinds of stripe."""
    tints = [[GREY + (c - GREY) * share for c in color] for share in STRIPES]
    kinds = [near(image, tint) for tint in tints]
    assert all(kind.sum() > 0.2 * sum(k.sum() for k in kinds) for kind in kinds)
    return kinds[0] | kinds[1]


def test_metrics_and_hostile_text_are_seen(page: Page) -> None:
    table = page.run("document.querySelector('#metrics').innerText")
    for split in ("train", "val", "testA"):
        lines = [line for line in LINES if line["split"] == split]
        ious = np.array([line["intersection"] / line["union"] for line in lines])
        overall = sum(x["intersection"] for x in lines) / sum(x["union"] for x in lines)
        precision = [(ious >= k).mean() for k in (0.5, 0.6, 0.7, 0.8, 0.9)]
        cells = [f"{100 * v:.2f}" for v in [*precision, overall, ious.mean()]] + [str(len(lines))]
        assert "\t".join([split, *cells]) in table
    assert "kind: <u>kind</u>" in table
    texts = page.run("[...document.querySelectorAll('.expression')].map((e) => e.textContent)")
    assert texts == [line["sentence"] for line in LINES]


def test_filters_work_together(page: Page) -> None:
    assert page.run("document.querySelector('#count').value") == "25 of 25 samples"
    page.type("#text", "the CUP")
    result = where(lambda x: "the" in x["sentence"].lower() and "cup" in x["sentence"].lower())
    assert shown(page) == result != []
    page.type("#text", f"#{LINES[7]['ref_id']}")
    assert shown(page) == where(lambda x: x["ref_id"] == LINES[7]["ref_id"])
    page.type("#text", "<img src")
    assert shown(page) == [1]
    page.type("#text", "no such thing")
    assert page.run("document.querySelector('#count').value") == "0 of 25 samples"
    assert "No sample" in page.run("document.querySelector('#cards').innerText")
    page.type("#text", "")
    page.type("#low", "0.2")
    page.type("#high", "0.8")
    middle = where(lambda x: 0.2 <= x["iou"] < 0.8)
    assert shown(page) == middle
    assert 0 < len(middle) < 25
    for name in ("split", "kind", "category"):
        value = LINES[middle[0]][name]
        choose(page, name, value)
        middle = [i for i in middle if LINES[i][name] == value]
        assert shown(page) == middle, name


def choose(page: Page, name: str, text: str) -> None:
    """Pick the option of a list whose label begins so."""
    page.run(
        f"(() => {{ const s = document.querySelector('#{name}');"
        f"s.value = [...s.options].find((o) => o.text.startsWith({json.dumps(text)})).value;"
        "s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("failures", 0, 0.1), ("near", 0.4, 0.5), ("successes", 0.9, 2)]
)
def test_presets(page: Page, preset: str, low: float, high: float) -> None:
    page.click(f"#presets button[value={preset}]")
    assert shown(page) == where(lambda x: low <= x["iou"] < high)
    page.click("#presets button[value=all]")
    assert len(shown(page)) == 25


def test_order(page: Page) -> None:
    choose(page, "sort", "lowest")
    assert shown(page) == sorted(range(25), key=lambda i: LINES[i]["iou"])
    choose(page, "sort", "highest")
    assert shown(page) == sorted(range(25), key=lambda i: -LINES[i]["iou"])
    choose(page, "sort", "by reference")
    assert shown(page) == sorted(range(25), key=lambda i: LINES[i]["ref_id"])


def test_charts_open_their_samples(page: Page) -> None:
    page.click('.charts:not([hidden]) .bin[data-bin="location:3"]')  # none, any, left, right
    right = where(lambda x: "right" in x["sentence"])
    assert shown(page) == right != []
    assert page.run("document.querySelector('#bin').textContent") == "Location words: right ✕"
    page.click("#bin")
    assert len(shown(page)) == 25
    page.click('.charts:not([hidden]) .bin[data-bin^="iou:0.00"]')
    assert shown(page) == where(lambda x: x["iou"] < 0.05)
    page.run(
        "(() => { const s = document.querySelector('#charts-split select'); s.value = 'val';"
        "s.dispatchEvent(new Event('input')); })()"
    )
    page.click('.charts:not([hidden]) .bin[data-bin="location:1"]')
    words = ("left", "right", "bottom", "middle")
    in_val = where(lambda x: x["split"] == "val" and any(w in x["sentence"] for w in words))
    assert shown(page) == in_val


@pytest.mark.parametrize("layer", ["truth", "prediction", "both", "none"])
def test_masks_are_drawn_where_they_are(page: Page, layer: str) -> None:
    page.click(f"#filters .overlay button[value={layer}]")
    sample = next(i for i in where(lambda x: x["file_name"] == MISSING and 0.1 < x["iou"] < 0.9))
    image = pixels(page, f'.card[data-sample="{sample}"] canvas')
    line, size = LINES[sample], image.shape[:2]
    truth, result = (expected_mask(line[k], *size) for k in ("truth", "segmentation"))
    plain = near(image, [GREY] * 3)
    if layer == "none":
        assert plain.all()
        return
    marked = {"truth": truth, "prediction": result, "both": truth | result}[layer]
    # What is neither grey nor the white rim just outside is the mask, to the pixel.
    coloured = ~plain & ~near(image, [WHITE] * 3)
    if layer != "both":
        assert (coloured == marked).all()
        color = GROUND_TRUTH if layer == "truth" else PREDICTION
        assert (near(image, color) | filled(image, color) == marked).all()
        assert filled(image, color).sum() > 0.5 * marked.sum()
    else:
        assert near(image, GROUND_TRUTH).any()
        assert not near(image, GROUND_TRUTH)[~truth].any()
        assert filled(image, PREDICTION).any()
        assert not filled(image, PREDICTION)[~result].any()


def test_image_is_behind_the_masks(page: Page) -> None:
    sample = where(lambda x: x["file_name"] != MISSING)[0]
    page.click("#filters .overlay button[value=none]")
    image = pixels(page, f'.card[data-sample="{sample}"] canvas')
    with Image.open(IMAGES / LINES[sample]["file_name"]) as image_file:
        small = np.asarray(
            image_file.convert("RGB").resize(image.shape[1::-1], Image.Resampling.LANCZOS)
        )
    assert np.abs(image - small.astype(int)).mean() < 6


def test_large_view_and_keys(page: Page) -> None:
    page.click('.card[data-sample="1"]')
    assert page.run("document.querySelector('#large').open")
    assert page.run("document.querySelector('#large h3').textContent") == HOSTILE[1]
    assert page.run("document.querySelector('#large-place').textContent") == "2 of 25"
    facts = page.run("document.querySelector('#large dl').innerText")
    assert LINES[1]["file_name"] in facts
    assert f"{LINES[1]['iou']:.4f}" in facts
    page.key("ArrowRight")
    assert page.run("document.querySelector('#large h3').textContent") == HOSTILE[2]
    same = where(lambda x: x["ref_id"] == LINES[2]["ref_id"])
    buttons = page.run("document.querySelectorAll('#siblings button').length")
    assert buttons == len(same) - 1
    page.key("t")
    assert (near(pixels(page, "#large canvas"), GROUND_TRUTH)).any()
    page.key("Escape")
    assert not page.run("document.querySelector('#large').open")
    assert page.run("document.activeElement.dataset.sample") == "2"
    page.key("/")
    page.call("Input.insertText", text="zzz")
    assert shown(page) == []


def test_comparison(browser: Page, folder: Path) -> None:
    browser.problems.clear()
    browser.open(folder / "compare.html")
    other = [json.loads(line) for line in (folder / "b.jsonl").read_bytes().splitlines()]
    delta = [a["iou"] - b["iou"] for a, b in zip(LINES, other, strict=True)]
    browser.click("#presets button[value=worse]")
    assert shown(browser) == sorted(
        (i for i in range(25) if delta[i] < 0), key=lambda i: (delta[i], i)
    )
    browser.click("#presets button[value=all]")
    choose(browser, "sort", "as recorded")
    browser.click("#filters .overlay button[value=other]")
    sample = where(lambda x: x["file_name"] == MISSING)[0]
    image = pixels(browser, f'.card[data-sample="{sample}"] canvas')
    result = expected_mask(other[sample]["segmentation"], *image.shape[:2])
    assert not filled(image, PREDICTION)[~result].any()
    assert browser.problems == []


def test_pages_of_many_samples(browser: Page, folder: Path) -> None:
    browser.problems.clear()
    many = [x | {"ref_id": 1000 * k + x["ref_id"]} for k in range(4) for x in LINES]
    path = write_lines(folder / "many.jsonl", many)
    output = folder / "many.html"
    images = ["--image_root", str(folder / "photos")]
    report.main([str(path), *images, "--output", str(output)])
    browser.open(output)
    assert browser.run("document.querySelector('#page').textContent") == "Page 1 of 3"
    assert shown(browser) == list(range(48))
    browser.click("#next")
    assert shown(browser) == list(range(48, 96))
    browser.key("ArrowRight")
    assert shown(browser) == list(range(96, 100))
    assert browser.run("document.querySelector('#next').disabled")
    browser.key("ArrowLeft")
    assert shown(browser) == list(range(48, 96))
    # Cards far below the window are not drawn until they are near.
    assert browser.run("document.querySelectorAll('.card canvas:not([data-drawn])').length") > 0
    assert browser.problems == []


@pytest.mark.parametrize("width", [390, 1300])
def test_nothing_is_wider_than_the_window(browser: Page, folder: Path, width: int) -> None:
    browser.look(width, 800, dark=width == 390)
    browser.open(folder / "report.html")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.click('.card[data-sample="0"]')
    assert browser.run("document.querySelector('#large').scrollWidth") <= width
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (width == 1300)
    browser.look(1300, 900)
