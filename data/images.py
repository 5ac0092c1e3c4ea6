"""Open pictures of any common kind as RGB, within bounds."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from lib.errors import InputError

MAX_PIXELS = 100_000_000
# PIL tries every format it knows by default, some through other programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


def open_rgb(path: str | Path) -> Image.Image:
    """Open a picture as 8-bit RGB.

    Palette, grayscale, CMYK and transparent pictures become what PIL's own conversion makes
    of them (transparency is dropped), as in the release. EXIF orientation is not applied:
    the release does not, and annotations are in the file's own pixel coordinates.

    Args:
        path: JPEG, PNG, BMP, GIF (first frame), TIFF, WebP or PPM.

    Returns:
        The decoded picture, mode RGB.

    Raises:
        InputError: missing, not a picture, truncated, or more than `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on size, transparency and metadata
            with Image.open(path, formats=FORMATS) as picture:
                _check_size(picture, path)
                return _to_rgb(picture)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except Image.DecompressionBombError:
        raise InputError(f"image {path} has more than {MAX_PIXELS // 10**6} megapixels") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not an image ({', '.join(FORMATS)} are read)") from None
    except Exception as error:  # PIL's decoders raise nearly anything for damaged files
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise InputError(f"image {path} cannot be read: {str(reason)[:120]}") from None


def _check_size(picture: Image.Image, path: Path) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"image {path} has {width}x{height} pixels, more than {MAX_PIXELS // 10**6} megapixels"
        )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_to_gray(picture).convert("RGB")
    if picture.mode == "RGBa":
        return picture.convert("RGBA").convert("RGB")
    return picture.convert("RGB")


def _deep_to_gray(picture: Image.Image) -> Image.Image:
    """Scale a picture of more than 8 bits to 8; PIL's conversion would clip it to white."""
    values = np.nan_to_num(np.asarray(picture).astype(np.float64), posinf=0.0, neginf=0.0)
    top = values.max()
    if picture.mode == "F" and top <= 1.0:
        scale = 255.0  # floats of 0 to 1
    elif picture.mode == "F" and top <= 255.0:
        scale = 1.0
    else:  # 16 bits; 256 levels of equal width, as PIL reads 16-bit colour
        scale = 1 / 256 if top < 65536 else 255.0 / top
    return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
