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

MAX_OUTLINE = 2_000_000  # pixels along one polygon; the rasteriser's memory grows with it
MAX_PAINTED = 4_000_000_000  # pixels of all an object's components: some ten seconds


def draw_components(segmentation: Any, height: int, width: int, where: str) -> UInt8Array:
    """Count, for each pixel, the components of an object that cover it.

    Args:
        segmentation: COCO's: a list of polygons [x0, y0, x1, y1, ...] in pixels, a run-length
            object {'size': [h, w], 'counts': list, str or bytes}, or a list of these.
        height: of the image, pixels.
        width: of the image, pixels.
        where: what is drawn, for error messages.

    Returns:
        (height, width) uint8; counts above 255 stay at 255.

    Raises:
        InputError: nothing to draw, or a component that is not valid.
    """
    total = np.zeros((width, height), np.uint8)  # column by column, as components come
    for component in _components(segmentation, height, width, where):
        _add(total, component.T)
    return np.ascontiguousarray(total.T)


def draw_samples(
    segmentation: Any, height: int, width: int, rows: Positions, columns: Positions, where: str
) -> UInt8Array:
    """`draw_components`, at some pixels only: [rows][:, columns] of it.

    Args:
        segmentation, height, width, where: see `draw_components`.
        rows: (h,) in rising order.
        columns: (w,) in rising order.

    Returns:
        (h, w) uint8.

    Raises:
        InputError: see `draw_components`.
    """
    total = np.zeros((len(rows), len(columns)), np.uint8)
    for component in _components(segmentation, height, width, where):
        drawn = component.T
        # What is outside of the component's bounding box adds nothing.
        left, right = _ends_of_inside(drawn.any(axis=1), columns)
        part = drawn[columns[left:right]]
        top, bottom = _ends_of_inside(part.any(axis=0), rows)
        _add(total[top:bottom, left:right], part.take(rows[top:bottom], axis=1).T)
    return total


def _components(segmentation: Any, height: int, width: int, where: str) -> Iterator[UInt8Array]:
    """Each component as (height, width), 0 and 1, column by column in memory."""
    components = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(components, list) or not components:
        raise InputError(f"{where} has no polygons; see refer/README.md for how to check the files")
    if len(components) * height * width > MAX_PAINTED:
        raise InputError(f"{where} has {len(components)} components, too many for its picture")
    for component in components:
        if isinstance(component, dict):
            yield _draw_runs(component, height, width, where)
        else:
            yield _draw_polygon(component, height, width, where)


def _ends_of_inside(inside: npt.NDArray[np.bool_], positions: Positions) -> tuple[int, int]:
    """First of the positions at or behind the first True, and behind the last one."""
    first = int(inside.argmax())
    last = len(inside) - int(inside[::-1].argmax()) if inside[first:].any() else first
    left, right = np.searchsorted(positions, [first, last])
    return int(left), int(right)


def _add(total: UInt8Array, drawn: UInt8Array) -> None:
    """Add 0s and 1s, up to 255."""
    total += drawn & (total < 255)


def _draw_polygon(points: Any, height: int, width: int, where: str) -> UInt8Array:
    try:
        xy = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: a polygon is not a list of numbers") from None
    if xy.ndim != 1 or xy.size < 4 or xy.size % 2:
        raise InputError(f"{where}: a polygon of {xy.size} numbers, pairs of x and y are needed")
    corners = xy.reshape(-1, 2)
    sides = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
    if not sides.sum() + np.abs(xy).max() <= MAX_OUTLINE:  # also catches nan
        raise InputError(f"{where}: a polygon with corners far outside the picture")
    if xy.size < 6:  # two points enclose nothing, and pycocotools takes four numbers for a box
        return np.zeros((height, width), np.uint8)
    return coco_mask.decode(coco_mask.frPyObjects([xy.tolist()], height, width)[0])


def _draw_runs(rle: dict[str, Any], height: int, width: int, where: str) -> UInt8Array:
    """Decode run lengths in Python: pycocotools writes past its buffer for bad counts."""
    packed: Any = rle.get("counts")
    if isinstance(packed, str):
        packed = packed.encode()
    counts = unpack_counts(packed, where) if isinstance(packed, bytes) else _run_list(packed)
    fits = rle.get("size", [height, width]) in ([height, width], (height, width))
    if not fits or counts is None or min(counts, default=0) < 0 or sum(counts) != height * width:
        raise InputError(f"{where}: run lengths that do not fit its {width}x{height} picture")
    values = (np.arange(len(counts)) & 1).astype(np.uint8)  # runs of 0 and 1 take turns
    return np.repeat(values, counts).reshape(width, height).T  # column by column


def _run_list(counts: Any) -> list[int] | None:
    """`counts` if it is a list of int."""
    return counts if isinstance(counts, list) and {type(n) for n in counts} <= {int} else None


def unpack_counts(packed: bytes, where: str) -> list[int]:
    """Undo COCO's compression: 5 bits a character, differences to the run before the last.

    Args:
        packed: 'counts' of a compressed run-length object.
        where: what is read, for error messages.

    Returns:
        Lengths of the runs, outside first; not checked against the picture, may be negative.

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
