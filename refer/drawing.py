"""The images of `REFER.showRef` and `REFER.showMask`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw


def box(image: Image.Image, x: float, y: float, width: float, height: float) -> None:
    """Draw a bounding box on an RGB image; pixels."""
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + width, y + height), outline=(0, 255, 0), width=3)


def tint(image: Image.Image, mask: npt.NDArray[np.uint8]) -> Image.Image:
    """A new RGB image, half green where the mask (H, W), of its size, is above 0."""
    alpha = Image.fromarray((mask > 0).astype(np.uint8) * 128)
    green = Image.new("RGB", image.size, (0, 255, 0))
    return Image.composite(green, image, alpha)


def caption(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """A new RGB image, with lines of text below the image."""
    line_height = 14
    sheet = Image.new("RGB", (image.width, image.height + line_height * len(lines) + 4), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        printable = line.encode("latin-1", "replace").decode("latin-1")  # PIL's own font
        draw.text((4, image.height + 2 + i * line_height), printable, fill="black")
    return sheet
