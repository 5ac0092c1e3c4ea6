"""Draw COCO segmentations: polygons, uncompressed and compressed run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from lib.errors import InputError
from refer.instances import whole

UInt8Array = npt.NDArray[np.uint8]

MAX_POLYGON = 2_000_000  # pixels along one polygon; the rasteriser's memory grows with it
MAX_PAINTED = 4_000_000_000  # components of an object x pixels of its image; ten seconds


def draw_components(segmentation: Any, height: int, width: int, where: str) -> UInt8Array:
    """Count, for each pixel, the components of an object that cover it.

    Args:
        segmentation: COCO's: a list of polygons [x0, y0, x1, y1, ...] in pixels, a run-length
            object {'size': [h, w], 'counts': list, str or bytes}, or a list of these.
        height: of the image, pixels.
        width: of the image, pixels.
        where: name of the object, for error messages.

    Returns:
        (height, width) uint8; counts above 255 stay at 255.

    Raises:
        InputError: nothing to draw, or a component that is not valid.
    """
    components = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(components, list) or not components:
        raise InputError(f"{where} has no polygons; see refer/README.md for how to check the files")
    if len(components) * height * width > MAX_PAINTED:
        raise InputError(f"{where} has {len(components)} components, too many for its image")
    total = np.zeros((height, width), np.uint8, order="F")  # as pycocotools draws
    for component in components:
        draw = _draw_runs if isinstance(component, dict) else _draw_polygon
        total += draw(component, height, width, where) & (total < 255)
    return total


def _draw_polygon(points: Any, height: int, width: int, where: str) -> UInt8Array:
    try:
        xy = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: a polygon is not a list of numbers") from None
    if xy.ndim != 1 or xy.size < 4 or xy.size % 2:
        raise InputError(f"{where}: a polygon of {xy.size} numbers, pairs of x and y are needed")
    corners = xy.reshape(-1, 2)
    sides = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
    if not sides.sum() + np.abs(xy).max() <= MAX_POLYGON:  # also catches nan
        raise InputError(f"{where}: a polygon with corners far outside the image")
    if xy.size < 6:  # two points enclose nothing, and pycocotools takes four numbers for a box
        return np.zeros((height, width), np.uint8)
    return coco_mask.decode(coco_mask.frPyObjects([xy.tolist()], height, width)[0])


def _draw_runs(rle: dict[str, Any], height: int, width: int, where: str) -> UInt8Array:
    """Decode run lengths. pycocotools would write out of bounds if they do not fit the image."""
    packed: Any = rle.get("counts")
    if isinstance(packed, str):
        packed = packed.encode()
    counts = unpack_counts(packed, where) if isinstance(packed, bytes) else _whole(packed)
    size = _whole(rle.get("size", [height, width]))
    fits = isinstance(counts, list) and {type(n) for n in counts} <= {int}
    fits = fits and min(counts, default=0) >= 0 and sum(counts) == height * width
    if not fits or size != [height, width]:
        raise InputError(f"{where}: run lengths that do not fit its {width}x{height} image")
    inside = np.arange(len(counts), dtype=np.uint8) & 1
    return inside.repeat(counts).reshape(width, height).T


def _whole(numbers: Any) -> Any:
    return [whole(n) for n in numbers] if isinstance(numbers, list | tuple) else numbers


def unpack_counts(packed: bytes, where: str) -> list[int]:
    """Undo COCO's compression: 5 bits a character, differences to the run before the last.

    Args:
        packed: 'counts' of a compressed run-length object.
        where: name of the object, for error messages.

    Returns:
        Lengths of the runs, outside first; not checked against the image, may be negative.

    Raises:
        InputError: a character or number that cannot be.
    """
    counts: list[int] = []
    value = shift = 0
    for byte in packed:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            raise InputError(f"{where}: damaged run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more to come
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise InputError(f"{where}: damaged run lengths")
    return counts


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
