"""Masks equal what pycocotools and PIL make, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data.transforms import resize_mask
from refer.masks import draw_components, unpack_counts

SIZES = [(1, 1), (1, 9), (9, 1), (7, 5), (48, 64), (64, 48), (61, 97), (120, 30)]


def random_polygons(rng: np.random.Generator, height: int, width: int) -> list[list[float]]:
    """Some that overlap, lie outside in part, or are too thin to cover a pixel."""
    polygons = []
    for _ in range(rng.integers(1, 6)):
        corners = rng.integers(3, 12)
        spread = rng.choice([0.3, 1.0, 1.6])
        x = (0.5 + spread * (rng.random(corners) - 0.5)) * width
        y = (0.5 + spread * (rng.random(corners) - 0.5)) * height
        decimals = int(rng.integers(0, 4))
        polygons.append(np.stack([x, y], 1).round(decimals).ravel().tolist())
    return polygons


def random_runs(rng: np.random.Generator, height: int, width: int) -> dict[str, Any]:
    """Blobs and noise, as run lengths packed or not."""
    mask = rng.random((height, width)) < rng.choice([0.0, 0.1, 0.5, 1.0])
    packed = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    if rng.random() < 0.5:
        return {"size": [height, width], "counts": packed["counts"].decode()}
    return {"size": [height, width], "counts": unpack_counts(packed["counts"], "runs")}


def by_pycocotools(segmentation: Any, height: int, width: int) -> Any:
    """The number of components on each pixel."""
    total = np.zeros((height, width), np.int64)
    for part in segmentation:
        if isinstance(part, dict):
            counts = part["counts"]
            whole = {"size": [height, width], "counts": counts}
            packed = isinstance(counts, str)
            runs = whole if packed else coco_mask.frPyObjects(whole, height, width)
        else:
            runs = coco_mask.frPyObjects([part], height, width)[0]
        total += coco_mask.decode(runs)
    return total


def random_segmentations(number: int) -> list[tuple[Any, int, int]]:
    rng = np.random.default_rng(0)
    result = []
    for i in range(number):
        height, width = SIZES[i % len(SIZES)]
        parts: list[Any] = random_polygons(rng, height, width)
        if i % 3 == 0:
            parts += [random_runs(rng, height, width) for _ in range(rng.integers(1, 3))]
        result.append((parts, height, width))
    return result


def test_components_are_pycocotools() -> None:
    several = 0
    for segmentation, height, width in random_segmentations(200):
        expected = by_pycocotools(segmentation, height, width)
        result = draw_components(segmentation, height, width, "mask")
        np.testing.assert_array_equal(result, expected)
        several += int(expected.max() > 1)
    assert several > 30  # overlaps were among them


@pytest.mark.parametrize("side", [1, 13, 61, 480])
def test_resized_mask_is_pils(side: int) -> None:
    for segmentation, height, width in random_segmentations(24):
        drawn = draw_components(segmentation, height, width, "mask")
        resized = Image.fromarray(drawn).resize((side, side), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(resize_mask(drawn == 1, side), np.asarray(resized) == 1)


def test_more_components_than_a_byte_counts() -> None:
    square = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
    result = draw_components([square] * 300, 8, 8, "mask")
    assert result.max() == 255
    assert (draw_components([square] * 257, 8, 8, "mask") == 1).sum() == 0
