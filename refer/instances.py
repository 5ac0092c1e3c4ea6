"""Read and check `instances.json` (COCO's layout)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lib.errors import InputError
from refer.images import MAX_PIXELS, check_pixels

Record = dict[str, Any]

MAX_BYTES = 1 << 30  # COCO's instances_train2014.json has 0.3 GB


def load_instances(path: str | Path, max_pixels: int = MAX_PIXELS) -> dict[str, list[Record]]:
    """Load images, annotations and categories.

    Args:
        path: the JSON file.
        max_pixels: upper limit of an image's size; COCO's have 0.4 million.

    Returns:
        {'images', 'annotations', 'categories'}: lists of dicts, whose ids, sizes (pixels)
        and file names have been checked (ids and sizes written 12.0 or "12" are int now);
        segmentations are checked when they are drawn.

    Raises:
        InputError: missing, not JSON, or a record without its fields.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not an object with 'images' and 'annotations'")
    tables = {}
    for table in ("images", "annotations", "categories"):
        records = content.get(table, [] if table == "categories" else None)
        if not isinstance(records, list):
            raise InputError(f"{path}: has no list '{table}'; see refer/README.md")
        tables[table] = records
    for image in tables["images"]:
        _check(image, {"id": int, "file_name": str, "width": int, "height": int}, "image", path)
        width, height = image["width"], image["height"]
        if min(width, height) < 1:
            size = f"a size of {width}x{height} pixels"
            raise InputError(f"{path}: image {image['id']} has {size}; give the file's own")
        check_pixels(f"{path}: image {image['id']}", width, height, max_pixels)
    for annotation in tables["annotations"]:
        if not _is_annotation(annotation):
            _check(annotation, {"id": int, "image_id": int}, "annotation", path)
            if "category_id" in annotation:
                _check(annotation, {"category_id": int}, "annotation", path)
    for category in tables["categories"]:
        _check(category, {"id": int, "name": str}, "category", path)
    return tables


def _is_annotation(record: Any) -> bool:
    """Whether nothing is wrong with an annotation; it may lack a category."""
    return (
        isinstance(record, dict)
        and type(record.get("id")) is int
        and type(record.get("image_id")) is int
        and type(record.get("category_id", 0)) is int
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing, too large or damaged.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size >> 20} MB, the upper limit is {MAX_BYTES >> 20} MB")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); see refer/README.md"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{path}: not readable JSON ({type(error).__name__}: {str(error)[:100]}); "
            "get the file again, see refer/README.md"
        ) from None


def _check(record: Any, fields: dict[str, type], what: str, path: Path) -> None:
    if not isinstance(record, dict):
        raise InputError(f"{path}: one {what} is a {type(record).__name__}, not an object")
    for key, kind in fields.items():
        if kind is int and key in record:
            record[key] = whole(record[key])
        if type(record.get(key)) is not kind:
            raise InputError(
                f"{path}: {what} {str(record.get('id'))[:20]} has no {kind.__name__} '{key}'"
            )


def whole(value: Any) -> Any:
    """12, 12.0, "12" and "12.0" as int; anything else as it is."""
    if type(value) is str and re.fullmatch(r"-?[0-9]{1,18}(\.0*)?", value):
        return int(value.partition(".")[0])
    if type(value) is float and value.is_integer() and abs(value) <= 2**53:  # exact up to there
        return int(value)
    return value
