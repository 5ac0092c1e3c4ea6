"""Formats beyond the usual, and images whose size is not that of their annotations."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from bert.tokenizer import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import ShardedBatches, build_loader
from lib.errors import InputError
from lib.predictor import open_upright
from refer import REFER
from refer.images import open_rgb
from refer.rare_images import misfit
from tests.refer_files import TINY_BERT, write_root

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


@pytest.mark.parametrize(("ending", "feature"), [("avif", "avif"), ("jp2", "jpg_2000")])
def test_formats(tmp_path: Path, ending: str, feature: str) -> None:
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    path = tmp_path / f"x.{ending}"
    Image.new("RGB", (32, 16), (200, 100, 50)).save(path)
    path = path.rename(tmp_path / "x.jpg")  # the content decides, not the name
    image = open_rgb(path)
    assert (image.mode, image.size) == ("RGB", (32, 16))
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() < 12
    with pytest.raises(InputError, match="32x16 pixels, more than --max_pixels 500"):
        open_rgb(path, 500)
    with pytest.raises(InputError, match="32x16 pixels, more than --max_pixels 500"):
        open_upright(path, 500)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"x\.jpg .*(cannot be read|damaged)"):
        open_rgb(path)


def test_heic_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "x.heic").write_bytes(HEIC)
    with pytest.raises(InputError, match=r"x\.heic is HEIF .* install pillow-heif"):
        open_rgb(tmp_path / "x.heic")


def test_heic_is_read_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the plugin, registered as it registers itself."""

    class Heif(Image.Image):
        format = "HEIF"

    def register() -> None:
        def factory(file: object, name: object) -> Image.Image:
            return Image.new("RGB", (3, 2), (9, 8, 7))

        monkeypatch.setitem(Image.OPEN, "HEIF", (factory, lambda prefix: prefix[4:8] == b"ftyp"))

    plugin = SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)  # type: ignore[arg-type]
    (tmp_path / "x.heic").write_bytes(HEIC)
    assert np.asarray(open_rgb(tmp_path / "x.heic"))[1, 2].tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    ("size", "annotated", "words"),
    [
        ((640, 427), (640, 427), ""),
        ((320, 214), (640, 427), ""),
        ((320, 213), (640, 427), ""),
        ((2560, 1707), (640, 426), ""),
        ((500, 375), (640, 480), ""),
        ((427, 640), (640, 427), "turn it as it was annotated"),
        ((214, 320), (640, 427), "turn it as it was annotated"),
        ((639, 640), (640, 639), "turn it as it was annotated"),
        ((640, 480), (640, 427), "another image, or cropped"),
        ((640, 425), (640, 427), "another image, or cropped"),
        ((100, 100), (640, 427), "another image, or cropped"),
    ],
)
def test_shapes(size: tuple[int, int], annotated: tuple[int, int], words: str) -> None:
    reason = misfit(Image.new("L", size), *annotated)
    assert words in reason
    assert bool(words) == bool(reason)


def replace_image(refer: REFER, size: tuple[int, int], orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = refer.image_path(101)
    Image.effect_noise(size, 60).save(path, exif=exif)
    return path


def test_an_image_on_its_side(tmp_path: Path) -> None:
    refer = REFER(write_root(tmp_path))
    path = replace_image(refer, (12, 16), 6)
    with pytest.raises(InputError) as caught:
        refer.open_image(101)
    for words in (str(path), "12x16", "16x12", "EXIF orientation 6", "exif_transpose"):
        assert words in str(caught.value)
    replace_image(refer, (9, 9))
    with pytest.raises(InputError, match=r"has 9x9 pixels, .* of 16x12: it is another image"):
        refer.showMask(refer.Refs[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resized_copy_is_warned_of_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    refer = REFER(write_root(tmp_path))
    path = replace_image(refer, (32, 24))
    tokenizer = load_tokenizer(TINY_BERT)
    log = logging.getLogger("lavt")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    try:
        dataset = ReferDataset(refer, "train", tokenizer, 16, original_masks=True)
        batches = ShardedBatches(range(len(dataset)), 1)
        samples = [b for _ in range(2) for b in build_loader(dataset, batches, workers)]
    finally:
        log.removeHandler(handler)
    assert {tuple(sample["image"].shape) for sample in samples} == {(1, 3, 16, 16)}
    assert {(int(s["height"]), int(s["width"])) for s in samples} == {(12, 16)}
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    # Of two processes that read an image at the same moment, both may warn.
    assert len(warnings) in (1, max(1, workers))
    assert f"image {path} has 32x24 pixels, its annotations are of 16x12" in warnings[0]


def test_a_resized_copy_is_shown_at_the_annotated_size(tmp_path: Path) -> None:
    refer = REFER(write_root(tmp_path))
    replace_image(refer, (32, 24))
    ref = refer.Refs[1]
    assert refer.getMask(ref)["mask"].shape == (12, 16)
    shown = np.asarray(refer.showMask(ref)).astype(int)
    plain = np.asarray(refer.open_image(101).resize((16, 12))).astype(int)
    inside = refer.getMask(ref)["mask"] > 0
    np.testing.assert_array_equal(shown[~inside], plain[~inside])
    assert (shown[inside] != plain[inside]).any()
    assert refer.showRef(ref, "box").width == 16


def test_limit_of_the_reader(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    with pytest.raises(InputError, match=r"instances\.json: image 102 has 20x10 pixels, more than"):
        REFER(root, max_pixels=199)
    refer = REFER(root, max_pixels=200)
    replace_image(refer, (32, 24))
    with pytest.raises(InputError, match="32x24 pixels, more than --max_pixels 200"):
        refer.open_image(101)
