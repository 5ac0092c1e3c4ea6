"""Images of every kind, and files that are none."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.errors import InputError
from refer.images import open_rgb

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: Any) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


HOLDS = {
    "png": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "jpg": ["L", "RGB", "CMYK", "YCbCr"],
    "bmp": ["1", "L", "P", "RGB", "RGBA"],
    "gif": ["1", "L", "LA", "P", "RGB", "RGBA"],
    # Not YCbCr: Pillow 12 cannot read what it writes.
    "tif": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"],
    "webp": ["L", "LA", "P", "RGB", "RGBA"],
}


@pytest.mark.parametrize(("ending", "mode"), [(e, mode) for e in HOLDS for mode in HOLDS[e]])
def test_modes_convert_as_pil_does(tmp_path: Path, ending: str, mode: str) -> None:
    colours = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2))
    image = colours.convert("L").convert(mode) if mode == "LA" else colours.convert(mode)
    path = saved(tmp_path, image, f"x.{ending}")
    with Image.open(path) as expected:
        np.testing.assert_array_equal(pixels(path), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparent_palette(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.fromarray(RAMP).convert("P")
    path = saved(tmp_path, image, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(path)[..., 0], RAMP)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("factor", [256, 257])
def test_16_bits_are_scaled(tmp_path: Path, ending: str, factor: int) -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * factor)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(pixels(saved(tmp_path, deep, f"x.{ending}"))[..., 1], RAMP)


def test_32_bits_and_floats_are_scaled(tmp_path: Path) -> None:
    for values in (
        RAMP.astype(np.int32) * 257,
        RAMP.astype(np.int32) * 2**23,
        RAMP.astype(np.float32),
        RAMP.astype(np.float32) / 255,
    ):
        result = pixels(saved(tmp_path, Image.fromarray(values), "x.tif"))[..., 2]
        assert np.abs(result.astype(int) - RAMP).max() <= 1
    odd = np.full((2, 2), np.nan, np.float32)
    assert not pixels(saved(tmp_path, Image.fromarray(odd), "x.tif")).any()


def test_one_pixel(tmp_path: Path) -> None:
    assert pixels(saved(tmp_path, Image.new("L", (1, 1), 7))).tolist() == [[[7, 7, 7]]]


def test_orientation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    path = saved(tmp_path, Image.new("RGB", (20, 10)), "x.jpg", exif=exif)
    assert open_rgb(path).size == (20, 10)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_rgb(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_no_image(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.jpg")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    assert "is not an image" in refusal(tmp_path / "text.jpg")
    (tmp_path / "empty.jpg").touch()
    assert "is not an image" in refusal(tmp_path / "empty.jpg")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "is not an image" in refusal(tmp_path / "x.eps")


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tif", "webp"])
def test_truncated(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), f"x.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refusal(path)


def test_damage_anywhere(tmp_path: Path) -> None:
    """Flipped bytes give an image or one clear line, nothing else."""
    rng = np.random.default_rng(0)
    whole = saved(tmp_path, Image.fromarray(RAMP).convert("RGB"), "x.jpg").read_bytes()
    outcomes = set()
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 5):
            data[place] = rng.integers(0, 256)
        (tmp_path / "y.jpg").write_bytes(data)
        try:
            outcomes.add(open_rgb(tmp_path / "y.jpg").mode)
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [11_000, 12_000, 60_000])
def test_bombs(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f"{side}x{side} pixels, more than --max_pixels 100000000" in refusal(path)


def test_bound_is_inclusive(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("L", (16, 17)))
    assert open_rgb(path, 272).size == (16, 17)
    with pytest.raises(InputError, match="16x17 pixels, more than --max_pixels 271 allows"):
        open_rgb(path, 271)


def test_more_than_pils_own_limit(tmp_path: Path) -> None:
    """PIL alone refuses more than 179 megapixels."""
    path = saved(tmp_path, Image.new("1", (20_000, 10_000)))
    assert "20000x10000" in refusal(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_rgb(path, 200_000_000).size == (20_000, 10_000)
