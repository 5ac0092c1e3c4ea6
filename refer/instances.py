"""Read and check `instances.json` (COCO's layout)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lib.errors import InputError

Record = dict[str, Any]

MAX_PIXELS = 100_000_000  # of one image; COCO's have 0.4 million
MAX_BYTES = 1 << 30  # COCO's instances_train2014.json has 0.3 GB


def load_instances(path: str | Path) -> dict[str, list[Record]]:
    """Load images, annotations and categories.

    Args:
        path: the JSON file.

    Returns:
        {'images', 'annotations', 'categories'}: lists of dicts, whose ids, sizes (pixels)
        and file names have been checked; segmentations are checked when they are drawn.

    Raises:
        InputError: missing, not JSON, or a record without its fields.
    """
    path = Path(path)
    content = _read_json(path)
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
        if not 0 < image["width"] * image["height"] <= MAX_PIXELS or image["width"] < 0:
            size = f"{image['width']}x{image['height']}"[:40]
            raise InputError(f"{path}: image {image['id']} has a size of {size} pixels")
    for annotation in tables["annotations"]:
        if not _is_annotation(annotation):
            fields: dict[str, type] = {"id": int, "image_id": int, "category_id": int}
            _check(annotation, fields, "annotation", path)
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


def _read_json(path: Path) -> Any:
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
        if type(record.get(key)) is not kind:
            raise InputError(
                f"{path}: {what} {str(record.get('id'))[:20]} has no {kind.__name__} '{key}'"
            )
