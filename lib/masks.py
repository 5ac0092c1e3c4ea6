"""Masks as COCO's compressed run lengths, and what they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

RunLengths = dict[str, Any]  # {"size": [H, W], "counts": text}


def run_lengths(mask: npt.NDArray[np.bool_]) -> RunLengths:
    """COCO's compressed RLE of a mask (H, W): {'size': [H, W], 'counts': text}."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def shared_pixels(a: RunLengths, b: RunLengths) -> tuple[int, int]:
    """Intersection and union of two masks of one size, pixels.

    Args:
        a, b: run lengths that fit their size; pycocotools does not check them.

    Raises:
        ValueError: the sizes differ.
    """
    if a["size"] != b["size"]:
        raise ValueError(f"masks of {a['size']} and {b['size']}")
    both = coco_mask.merge([a, b], intersect=True)
    inter, area_a, area_b = (int(n) for n in coco_mask.area([both, a, b]))
    return inter, area_a + area_b - inter
