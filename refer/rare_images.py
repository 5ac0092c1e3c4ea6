"""What only few images need: formats beyond the usual, and sizes that are not the annotations'."""

from __future__ import annotations

import importlib
import io
import logging
from contextlib import suppress
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lib.errors import InputError

# Pillow's name of a format, and the package that reads it where Pillow does not.
FORMATS = {
    "AVIF": "pillow-avif-plugin",
    "HEIF": "pillow-heif",
    "JPEG2000": "a Pillow with OpenJPEG",
}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
JPEG2000_STARTS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 are on their side


def open_rare(data: bytes, path: Path) -> Image.Image:
    """Open, but not decode, an AVIF, HEIF (HEIC) or JPEG 2000.

    Raises:
        InputError: it is one, but nothing that is installed reads it.
        UnidentifiedImageError: it is none.
    """
    kind = _format(data)
    if kind is None:
        raise UnidentifiedImageError
    Image.init()
    if kind in Image.OPEN:
        return Image.open(io.BytesIO(data), formats=[kind])
    with suppress(ImportError, UnidentifiedImageError, KeyError):
        if kind == "HEIF":
            importlib.import_module("pillow_heif").register_heif_opener()
        elif kind == "AVIF":
            importlib.import_module("pillow_avif")  # registers itself
        return Image.open(io.BytesIO(data), formats=[kind])
    raise InputError(
        f"image {path} is {kind} and cannot be read: install {FORMATS[kind]}, or convert it to "
        "JPEG or PNG (or it is damaged)"
    )


def _format(data: bytes) -> str | None:
    brands = data[8:40] if data[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    if any(brand in brands for brand in HEIF_BRANDS):
        return "HEIF"
    return "JPEG2000" if data.startswith(JPEG2000_STARTS) else None


def check_fit(image: Image.Image, path: Path, size: tuple[int, int], warned: Tensor) -> None:
    """Warn of an image that is a resized copy of the one that was annotated.

    Args:
        image: as in the file.
        path: of the file.
        size: width and height of the annotations, pixels.
        warned: (1,) bool, whether this was done before; is set.

    Raises:
        InputError: it cannot be a copy, see :func:`misfit`.
    """
    if reason := misfit(image, *size):
        raise InputError(f"image {path} {reason}")
    if not warned:
        warned.fill_(True)
        logging.getLogger("lavt").warning(
            "warning: image %s has %dx%d pixels, its annotations are of %dx%d: a resized copy, "
            "which is used; there may be more",
            *(path, *image.size, *size),
        )


def misfit(image: Image.Image, width: int, height: int) -> str:
    """Why an image cannot be the one that was annotated; '' if it is a resized copy of it.

    Args:
        image: as in the file.
        width, height: pixels, of the annotations.
    """
    if _same_shape(image.width, image.height, width, height):
        return ""
    text = f"has {image.width}x{image.height} pixels, but its annotations are of {width}x{height}"
    if not _same_shape(image.height, image.width, width, height):
        return f"{text}: it is another image, or cropped; put the original there"
    if (orientation := orientation_of(image)) > 4:
        return (
            f"{text}: it is stored on its side, with EXIF orientation {orientation}; rewrite it "
            "upright with PIL's ImageOps.exif_transpose"
        )
    return f"{text}: it is turned by 90 degrees; turn it as it was annotated"


def _same_shape(width: int, height: int, other_width: int, other_height: int) -> bool:
    """Whether two sizes have one aspect ratio, up to a pixel by which one of them was rounded."""
    sides = width, height, other_width, other_height
    return abs(width * other_height - height * other_width) <= max(sides)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none."""
    with suppress(Exception):  # PIL raises many kinds for damaged metadata
        return int(image.getexif().get(ORIENTATION, 1))
    return 1
