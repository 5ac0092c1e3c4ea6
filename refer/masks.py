"""Draw COCO segmentations: polygons, uncompressed and compressed run lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from lib.errors import InputError

UInt8Array = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]

MAX_OUTLINE = 2_000_000  # pixels along one polygon; the rasteriser's memory grows with it
MAX_PAINTED = 4_000_000_000  # pixels of all components of an object: ten seconds


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
    return draw_samples(segmentation, np.arange(height + 1), np.arange(width + 1), where)


def draw_samples(
    segmentation: Any, row_at: Positions, column_at: Positions, where: str
) -> UInt8Array:
    """`draw_components`, resized by nearest neighbour.

    Args:
        segmentation, where: see `draw_components`.
        row_at: (height + 1,), how many rows of the result are taken from rows before each of
            the image's: 0 first, h last.
        column_at: (width + 1,), likewise, w at last.

    Returns:
        (h, w) uint8.

    Raises:
        InputError: see `draw_components`.
    """
    total = np.zeros((row_at[-1], column_at[-1]), np.uint8)
    for counts in _components(segmentation, len(row_at) - 1, len(column_at) - 1, where):
        _paint(total, counts, row_at, column_at)
    return total


def _paint(total: UInt8Array, counts: Counts, row_at: Positions, column_at: Positions) -> None:
    """Add a component to `total`.

    Args:
        total: (h, w).
        counts: run lengths, outside first, column by column.
        row_at, column_at: see `draw_samples`.
    """
    height = len(row_at) - 1
    ends = np.cumsum(counts)
    start, stop = ends[0:-1:2], ends[1::2]  # of the runs inside
    first = start // height
    parts = np.maximum((stop - 1) // height, first) - first + 1  # columns that a run is in
    run = np.arange(len(start)).repeat(parts)
    column = first[run] + _places(parts)
    top = row_at[np.maximum(start[run] - column * height, 0)]
    bottom = row_at[np.minimum(stop[run] - column * height, height)]
    left = column_at[np.minimum(column, len(column_at) - 2)]
    copies = column_at[np.minimum(column, len(column_at) - 2) + 1] - left
    copies[bottom <= top] = 0
    if not copies.any():
        return
    top, bottom = top.repeat(copies), bottom.repeat(copies)
    left = left.repeat(copies) + _places(copies)
    box = slice(top.min(), bottom.max()), slice(left.min(), left.max() + 1)
    # +1 at the begin of a run, -1 behind its end; the cumulative sum is 1 inside.
    marks = np.zeros((box[0].stop - box[0].start + 1, box[1].stop - box[1].start), np.int8)
    marks[top - box[0].start, left - box[1].start] = 1
    marks[bottom - box[0].start, left - box[1].start] -= 1
    drawn = np.cumsum(marks[:-1], axis=0, dtype=np.int8).view(np.uint8)
    _add(total[box], drawn)


def _places(counts: Counts) -> Counts:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - (ends - counts).repeat(counts)


def _components(segmentation: Any, height: int, width: int, where: str) -> Iterator[Counts]:
    """Run lengths of each component: outside first, column by column."""
    components = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(components, list) or not components:
        raise InputError(f"{where} has no polygons; see refer/README.md for how to check the files")
    if len(components) * height * width > MAX_PAINTED:
        raise InputError(f"{where} has {len(components)} components, too many for its image")
    for component in components:
        if isinstance(component, dict):
            yield _runs(component, height, width, where)
        else:
            yield _polygon_runs(component, height, width, where)


def _add(total: UInt8Array, drawn: UInt8Array) -> None:
    """Add 0s and 1s, up to 255."""
    total += drawn & (total < 255)


def _polygon_runs(points: Any, height: int, width: int, where: str) -> Counts:
    try:
        xy = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: a polygon is not a list of numbers") from None
    if xy.ndim != 1 or xy.size < 4 or xy.size % 2:
        raise InputError(f"{where}: a polygon of {xy.size} numbers, pairs of x and y are needed")
    corners = xy.reshape(-1, 2)
    sides = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
    if not sides.sum() + np.abs(xy).max() <= MAX_OUTLINE:  # also catches nan
        raise InputError(f"{where}: a polygon with corners far outside the image")
    if xy.size < 6:  # two points enclose nothing, and pycocotools takes four numbers for a box
        return np.array([height * width])
    return _unpack(coco_mask.frPyObjects([xy.tolist()], height, width)[0]["counts"])


def _runs(rle: dict[str, Any], height: int, width: int, where: str) -> Counts:
    """Run lengths that fit the image."""
    packed: Any = rle.get("counts")
    if isinstance(packed, str):
        packed = packed.encode()
    counts = unpack_counts(packed, where) if isinstance(packed, bytes) else _run_list(packed)
    fits = rle.get("size", [height, width]) in ([height, width], (height, width))
    if not fits or counts is None or min(counts, default=0) < 0 or sum(counts) != height * width:
        raise InputError(f"{where}: run lengths that do not fit its {width}x{height} image")
    return np.array(counts, np.int64)


def _unpack(packed: bytes) -> Counts:
    """`unpack_counts` of what pycocotools has packed, without a loop."""
    bits = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    lengths = np.diff(ends, prepend=-1)
    places = 5 * _places(lengths)
    values = np.add.reduceat((bits & 31) << places, ends - lengths + 1)
    values -= (bits[ends] & 16 != 0).astype(np.int64) << 5 * lengths  # negative
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


def _run_list(counts: Any) -> list[int] | None:
    """`counts` if it is a list of int."""
    return counts if isinstance(counts, list) and {type(n) for n in counts} <= {int} else None


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
