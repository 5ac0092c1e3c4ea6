"""Overlays, captions and contact sheets, by their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import visualize
from lib.errors import InputError
from lib.visualize import Tile, caption, contact_sheet, overlay, wrap, write_image

GRAY = (100, 100, 100)


def gray(width: int = 60, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), GRAY)


def box_mask() -> np.ndarray:
    """A 20 x 20 box in 40 x 60."""
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    return mask


def test_overlay_keeps_size_and_image() -> None:
    image_file = gray()
    before = image_file.tobytes()
    drawn = overlay(image_file, box_mask())
    assert drawn.size == image_file.size
    assert drawn.mode == "RGB"
    assert image_file.tobytes() == before


def test_overlay_tints_inside_dims_outside_and_draws_the_contour_between() -> None:
    pixels = np.asarray(overlay(gray(), box_mask(), color=(250, 0, 0))).astype(int)
    expected = [round(g + (c - g) * visualize.TINT) for g, c in zip(GRAY, (250, 0, 0), strict=True)]
    assert np.abs(pixels[20, 30] - expected).max() <= 1  # deep inside
    assert np.abs(pixels[2, 2] - 100 * (1 - visualize.SHADE)).max() <= 1  # far outside
    assert pixels[20, 20, 0] > 220
    assert pixels[20, 20, 1] < 60  # first column inside: the line
    assert pixels[20, 19].min() > 180  # last column outside: the rim


def test_overlay_of_empty_mask_is_the_image() -> None:
    assert overlay(gray(), np.zeros((40, 60))).tobytes() == gray().tobytes()


def test_overlay_of_full_mask_has_its_line_along_the_edge() -> None:
    pixels = np.asarray(overlay(gray(), np.ones((40, 60)), color=(250, 0, 0))).astype(int)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert edge[:, 0].min() > 200
    assert pixels[20, 30, 0] < 200


def test_overlay_shows_a_single_pixel() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5, 7] = True
    pixels = np.asarray(overlay(gray(), mask)).astype(int)
    assert np.abs(pixels[5, 7] - GRAY).max() > 50


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_overlay_takes_any_mode(mode: str) -> None:
    assert overlay(gray().convert(mode), box_mask()).mode == "RGB"


def test_overlay_refuses_a_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(60, 40\)"):
        overlay(gray(), box_mask().T)


def test_grow_and_shrink_by_hand() -> None:
    dot = np.zeros((7, 7), bool)
    dot[3, 3] = True
    plus = visualize._grow(dot, 1)
    assert plus.sum() == 5
    octagon = visualize._grow(dot, 2)  # a plus, grown by a square of 3
    assert octagon.sum() == 21
    assert not octagon[1, 1]
    assert (visualize._shrink(octagon, 2) == dot).all()
    assert visualize._shrink(np.ones((5, 5), bool), 1).sum() == 9


def test_expression_adds_a_band_below() -> None:
    plain, told = overlay(gray(300, 200), np.ones((200, 300))), "the box in the middle"
    drawn = overlay(gray(300, 200), np.ones((200, 300)), told)
    assert drawn.width == 300
    assert drawn.height > 200
    assert drawn.crop((0, 0, 300, 200)).tobytes() == plain.tobytes()
    band = np.asarray(drawn)[200:]
    assert band.min() < 60  # ink
    assert (band[-2:] == 255).all()  # and not cut off


@pytest.mark.parametrize(
    "text", ["", "word " * 3000, "x" * 20000, "two\nlines\ttab", "\ud800 half", "人 на 🙂", "\0"]
)
def test_caption_takes_any_text(text: str) -> None:
    drawn = caption(gray(200, 100), text)
    assert drawn.width == 200
    assert 100 < drawn.height < 300


def test_caption_of_a_tiny_image_is_legible() -> None:
    assert caption(gray(1, 1), "the one").width >= 100


def test_wrap_fits_keeps_every_word_and_marks_what_is_cut() -> None:
    text = "the second red star from the left behind the blue square"
    lines = wrap(text, 14, 120)
    assert len(lines) > 2
    assert " ".join(lines) == text
    assert all(visualize.font(14).getlength(line) <= 120 for line in lines)
    cut = wrap(text, 14, 120, max_lines=2)
    assert len(cut) == 2
    assert cut[-1].endswith("…")
    assert "".join(wrap("x" * 100, 14, 120, max_lines=99)) == "x" * 100


def test_contact_sheet_geometry() -> None:
    wide, high = Image.new("RGB", (80, 40), "red"), Image.new("RGB", (20, 60), "blue")
    sheet = contact_sheet([[Tile(wide, "a"), None], [Tile(high), Tile(wide, "b")]], side=100)
    pixels = np.asarray(sheet).astype(int)
    red = (pixels == (255, 0, 0)).all(-1)
    blue = (pixels == (0, 0, 255)).all(-1)
    assert red.sum() == 2 * 100 * 50  # scaled to fit 100 x 100
    assert blue.sum() == 33 * 100
    assert sheet.width > 200
    taller = contact_sheet([[Tile(wide)]], ["left", "right"], 100, footer="a note")
    assert taller.height > contact_sheet([[Tile(wide)]], side=100).height


def test_contact_sheet_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([[None]])


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "deep/er/a.bmp", "a.tiff"])
def test_write_image_by_ending(tmp_path: Path, name: str) -> None:
    write_image(gray(), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.size == (60, 40)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_write_image_leaves_the_old_file_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    write_image(gray(), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot write"):
        write_image(Image.new("RGB", (70000, 1)), path)  # more than JPEG can hold
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_write_image_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_image(gray(), tmp_path / "file" / "a.png")
