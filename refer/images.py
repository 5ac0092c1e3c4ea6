"""Open images as RGB, up to a size limit."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lib.errors import InputError

MAX_PIXELS = 100_000_000  # --max_pixels
MAX_BYTES = 1 << 30  # of a file; MAX_PIXELS of 8 bytes are 0.8 GB
MAX_SCANS = 100  # of a JPEG; progressive ones have about 10, and each may decode the whole image
# PIL tries every format it knows by default, some through other programs (EPS). Three more are in
# refer/rare_images.py.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


# PIL keeps memory for the next images, which saves a few percent of a sample's time.
KEPT_IMAGES = 8
if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(KEPT_IMAGES)
# PIL's own limit has an upper end that no user can raise; `open_rgb` checks before it decodes.
Image.MAX_IMAGE_PIXELS = None


def open_rgb(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as 8-bit RGB.

    Other modes are converted by PIL, without transparency, as in the release. EXIF orientation is
    not applied, as in the release: annotations are in the file's own pixel coordinates. (PIL
    itself applies that of a TIFF.)

    Args:
        path: JPEG, PNG, BMP, GIF (first frame), TIFF, WebP, PPM, AVIF, JPEG 2000 or, with
            pillow-heif, HEIC.
        max_pixels: upper limit of width x height.

    Returns:
        The decoded image, mode RGB.

    Raises:
        InputError: missing, not an image, truncated, or too large.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on size, transparency and metadata
            data = _read(path, max(MAX_BYTES, 10 * max_pixels))
            with _open(data, path) as image:
                check_pixels(f"image {path}", image.width, image.height, max_pixels)
                if image.format in ("JPEG", "MPO") and _scans(data) > MAX_SCANS:
                    raise InputError(f"image {path} is a JPEG of more than {MAX_SCANS} scans")
                return to_rgb(image)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except Image.UnidentifiedImageError:
        kinds = ", ".join((*FORMATS, "AVIF", "HEIC", "JPEG 2000"))
        raise InputError(f"{path} is not an image, or damaged ({kinds} are read)") from None
    except Exception as error:  # PIL's decoders raise nearly anything for damaged files
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise InputError(f"image {path} cannot be read: {str(reason)[:120]}") from None


def _open(data: bytes, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        from refer.rare_images import open_rare

        return open_rare(data, path)


def _read(path: Path, most: int) -> bytes:
    size = path.stat().st_size
    if size > most:
        raise InputError(f"image {path} has {size >> 20} MB, the limit is {most >> 20} MB")
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would block
        raise InputError(f"image {path} is not a file")
    return path.read_bytes()


def _scans(data: bytes) -> int:
    """Start-of-scan markers (bytes FF DA) in a JPEG; `bytes.count` takes three times as long."""
    values = np.frombuffer(data, np.uint8)
    behind = np.flatnonzero(values[:-1] == 0xFF) + 1
    return int(np.count_nonzero(values[behind] == 0xDA))


def check_pixels(what: str, width: int, height: int, most: int) -> None:
    """Raise an InputError for an image, called `what`, of too many pixels."""
    if width * height > most:
        raise InputError(
            f"{what} has {width}x{height} pixels, more than --max_pixels {most} allows; "
            "if that is no mistake, give a larger number"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of PIL's modes as 8-bit RGB, without transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_gray(image).convert("RGB")
    if image.mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    if image.mode == "RGB":
        image.load()  # conversion would make a copy
        return image
    return image.convert("RGB")


def _deep_to_gray(image: Image.Image) -> Image.Image:
    """Scale an image of more than 8 bits to 8; PIL's conversion would clip it to white."""
    values = np.asarray(image)
    top = max(float(_finite(part).max()) for part in _bands(values))
    if image.mode == "F" and top <= 1.0:
        scale = 255.0  # floats of 0 to 1
    elif image.mode == "F" and top <= 255.0:
        scale = 1.0
    else:  # 16 bits; 256 levels of equal width, as PIL reads 16-bit colour
        scale = 1 / 256 if top < 65536 else 255.0 / top
    shades = [(_finite(part) * scale).clip(0, 255).astype(np.uint8) for part in _bands(values)]
    return Image.fromarray(np.concatenate(shades))


def _bands(values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """An image's rows in bands: the whole in float64 would take a gigabyte or more."""
    rows = max(1, 1_000_000 // values.shape[1])
    return [values[i : i + rows] for i in range(0, len(values), rows)]


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
