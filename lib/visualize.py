"""Draw masks over images: overlays, captions, contact sheets. PIL and numpy only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lib.errors import InputError

Color = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]

PREDICTION: Color = (233, 0, 128)
GROUND_TRUTH: Color = (0, 140, 230)
DARK: Color = (0, 0, 0)
RIM: Color = (255, 255, 255)
PAPER: Color = (255, 255, 255)
INK: Color = (25, 25, 30)
FAINT: Color = (120, 120, 130)

TINT = 0.30  # opacity of the colour inside a mask
SHADE = 0.30  # opacity of black outside it
MAX_CAPTION_LINES = 6
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def overlay(
    image: Image.Image,
    mask: npt.NDArray[np.generic],
    expression: str | None = None,
    color: Color = PREDICTION,
) -> Image.Image:
    """Tint a mask over an image, trace its contour and dim the rest; an empty mask draws nothing.

    The contour is a coloured line inside the mask and a white rim outside, which is visible on
    any background. At the image's edge it follows the edge.

    Args:
        image: any mode; not changed.
        mask: (H, W) of the image's height and width, non-zero = object.
        expression: written on a band below the image; None for no band.
        color: of tint and contour.

    Returns:
        RGB, of the image's size, plus the height of the band.

    Raises:
        ValueError: mask and image differ in size.
    """
    inside = np.asarray(mask) != 0
    if inside.shape != (image.height, image.width):
        raise ValueError(f"a mask of {inside.shape} for an image of {(image.height, image.width)}")
    drawn = image.convert("RGB")
    if drawn is image:
        drawn = image.copy()
    if inside.any():
        width = _line_width(image.size)
        rim = max(1, round(0.7 * width))
        top, left, part = _crop(inside, rim + 1)
        _stamp(drawn, ~inside, (0, 0), DARK, SHADE)
        _stamp(drawn, part, (left, top), color, TINT)
        _stamp(drawn, _grow(part, rim) & ~part, (left, top), RIM, 1.0)
        _stamp(drawn, part & ~_shrink(part, width), (left, top), color, 1.0)
    return drawn if expression is None else caption(drawn, expression)


def _line_width(size: tuple[int, int]) -> int:
    return min(16, max(1, round(np.hypot(*size) / 220)))


def _crop(mask: Mask, margin: int) -> tuple[int, int, Mask]:
    """The mask's box (first row, first column, content), grown by ``margin`` inside the image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    part = mask[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]
    return int(top), int(left), part


def _grow(mask: Mask, steps: int) -> Mask:
    """Dilate by ``steps`` pixels; neighbourhoods of 4 and 8 take turns, which is an octagon."""
    for i in range(steps):
        rows = mask.copy()
        rows[1:] |= mask[:-1]
        rows[:-1] |= mask[1:]
        source = rows if i % 2 else mask
        out = rows.copy()
        out[:, 1:] |= source[:, :-1]
        out[:, :-1] |= source[:, 1:]
        mask = out
    return mask


def _shrink(mask: Mask, steps: int) -> Mask:
    """Erode by ``steps`` pixels; outside the image counts as outside the mask."""
    padded = np.pad(mask, 1)
    return ~_grow(~padded, steps)[1:-1, 1:-1]


def _stamp(
    image: Image.Image, region: Mask, corner: tuple[int, int], color: Color, opacity: float
) -> None:
    alpha = Image.fromarray(region.astype(np.uint8) * np.uint8(255))
    if opacity == 1.0 and min(region.shape) > 2:
        alpha = alpha.filter(ImageFilter.GaussianBlur(0.4))  # smooths the line
    image.paste(color, corner, alpha.point([round(v * opacity) for v in range(256)]))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font, of a size in pixels."""
    return ImageFont.load_default(size=size)


def printable(text: str) -> str:
    """A text on one line, without lone surrogates, which no font and no file has."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def wrap(text: str, size: int, width: float, max_lines: int = MAX_CAPTION_LINES) -> list[str]:
    """Break a text into lines.

    Args:
        text: any; line breaks in it count as spaces.
        size: of the font, pixels.
        width: of a line, pixels; a word that is longer is broken.
        max_lines: upper limit; the rest is cut, and the last line ends in '…'.

    Returns:
        Lines, at least one.
    """
    lines = [""]
    for word in _pieces(printable(text).split(" "), size, width):
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == max_lines:
            lines[-1] += " …"
            break
        else:
            lines.append(word)
    return lines


def _pieces(words: Sequence[str], size: int, width: float) -> Iterator[str]:
    """The words, those wider than a line cut into pieces that fit."""
    for word in words:
        while len(word) > 1 and font(size).getlength(word) > width:
            fitting = [
                n
                for n in range(1, min(len(word), int(width)))
                if font(size).getlength(word[:n]) <= width
            ]
            cut = max(fitting, default=1)
            yield word[:cut]
            word = word[cut:]
        yield word


def caption(image: Image.Image, text: str) -> Image.Image:
    """Write a text on a white band below an image.

    Args:
        image: RGB.
        text: wrapped to the image's width.

    Returns:
        A new image; wider than the given one only if that is too narrow for a few letters.
    """
    size = max(12, round(min(image.width, 1.6 * image.height) / 28))
    pad = round(0.6 * size)
    width = max(image.width, 10 * size)
    lines = wrap(text, size, width - 2 * pad)
    step = round(1.3 * size)
    sheet = Image.new("RGB", (width, image.height + step * len(lines) + 2 * pad - size // 3), PAPER)
    sheet.paste(image, ((width - image.width) // 2, 0))
    _write(sheet, lines, (pad, image.height + pad - size // 8), size, INK)
    return sheet


def _write(
    sheet: Image.Image, lines: Sequence[str], corner: tuple[int, int], size: int, ink: Color
) -> None:
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((corner[0], corner[1] + i * round(1.3 * size)), line, font=font(size), fill=ink)


@dataclass(frozen=True)
class Tile:
    """An image of a contact sheet and the text below it."""

    image: Image.Image
    text: str = ""


def contact_sheet(
    rows: Sequence[Sequence[Tile | None]],
    header: Sequence[str] = (),
    side: int = 220,
    footer: str = "",
) -> Image.Image:
    """Lay images out in a grid, each with its text below.

    Args:
        rows: tiles by row; None is an empty place.
        header: titles of the columns.
        side: of the square that each image is scaled to fit into, pixels.
        footer: a note below all.

    Returns:
        RGB.

    Raises:
        ValueError: no tile at all.
    """
    columns = max((len(row) for row in rows), default=0)
    if not any(tile for row in rows for tile in row):
        raise ValueError("a contact sheet needs at least one image")
    gap, size = max(6, side // 16), max(12, side // 14)
    width = gap + columns * (side + gap)
    strips = [_strip(row, side, gap, size, width) for row in rows]
    if header:
        strips.insert(0, _header(header, side, gap, size, width))
    if footer:
        lines = wrap(footer, size, width - 2 * gap)
        strip = Image.new("RGB", (width, round(1.3 * size) * len(lines) + gap), PAPER)
        _write(strip, lines, (gap, 0), size, FAINT)
        strips.append(strip)
    sheet = Image.new("RGB", (width, gap + sum(strip.height for strip in strips)), PAPER)
    y = gap
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def _header(titles: Sequence[str], side: int, gap: int, size: int, width: int) -> Image.Image:
    strip = Image.new("RGB", (width, round(1.3 * size) + gap // 2), PAPER)
    for i, title in enumerate(titles):
        _write(strip, wrap(title, size, side, 1), (gap + i * (side + gap), 0), size, FAINT)
    return strip


def _strip(row: Sequence[Tile | None], side: int, gap: int, size: int, width: int) -> Image.Image:
    """One row of a contact sheet; as high as its highest image and longest text."""
    fitted = [_fit(tile.image, side) if tile else None for tile in row]
    texts = [wrap(tile.text, size, side, 3) if tile and tile.text else [] for tile in row]
    high = max((image.height for image in fitted if image), default=0)
    text_high = round(1.3 * size) * max((len(lines) for lines in texts), default=0)
    strip = Image.new("RGB", (width, high + text_high + round(1.6 * gap)), PAPER)
    for i, (image, lines) in enumerate(zip(fitted, texts, strict=True)):
        left = gap + i * (side + gap)
        if image:
            strip.paste(image, (left + (side - image.width) // 2, high - image.height))
        _write(strip, lines, (left, high + gap // 3), size, INK)
    return strip


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def write_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image atomically, in the format of the file's ending.

    Raises:
        InputError: it cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    partial = path.with_name(path.name + ".partial")
    quality = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, kind, **quality)
        os.replace(partial, path)
    except (OSError, ValueError) as e:  # ValueError: more pixels than the format can hold
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"cannot write {path} ({reason}): change --output") from e
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # not a folder: nothing was written
        return
