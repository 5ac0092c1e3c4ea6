"""Read data of one's own: JSON lines, COCO, LabelMe, masks with a CSV file."""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lib.errors import InputError
from refer.instances import Record, load_instances, whole

CIRCLE_CORNERS = 72


@dataclass(frozen=True)
class MaskFile:
    """An object drawn in an image file.

    Attributes:
        name: of the file.
        value: of the object's pixels: a number, or '#rrggbb'; None: all that is not black.
    """

    name: str
    value: int | str | None = None


@dataclass
class Item:
    """A reference: the expressions of one target in one image.

    Attributes:
        where: file and line, for error messages.
        image: name of the image's file.
        expressions: as written; checked later.
        objects: of the target, none or several: mask files or COCO segmentations.
        split: '' where none is given.
        category: '' where none is given.
        size: width and height that the annotations were drawn for, if it is recorded.
        embedded: a LabelMe file that holds the image too.
    """

    where: str
    image: str
    expressions: list[Any]
    objects: list[Any]
    split: str = ""
    category: str = ""
    size: tuple[int, int] | None = None
    embedded: Path | None = field(default=None, repr=False)


def read_jsonl(path: Path) -> Iterator[Item]:
    """References from JSON lines.

    Raises:
        InputError: with the line.
    """
    for where, record in _json_lines(path):
        if "mask" not in record and "segmentation" not in record:
            raise InputError(f"{where}: has no 'mask' and no 'segmentation'; null means no target")
        mask, drawn = record.get("mask"), record.get("segmentation")
        if mask is not None and drawn is not None:
            raise InputError(f"{where}: give 'mask' or 'segmentation', not both")
        if isinstance(drawn, list) and drawn and type(drawn[0]) in (int, float):
            drawn = [drawn]  # one polygon
        objects: list[Any] = [] if drawn is None else [drawn]
        if mask is not None:
            names, values = _as_list(mask), _as_list(record.get("value"))
            objects = [_mask_file(name, value, where) for name in names for value in values]
        extra = _text(record, "split", where), _text(record, "category", where)
        yield Item(
            where,
            _text(record, "image", where, needed=True),
            _expressions(record, where),
            objects,
            *extra,
        )


def read_coco(path: Path, expressions: Path, max_pixels: int) -> list[Item]:
    """References from COCO annotations and a CSV file or JSON lines of their expressions.

    Raises:
        InputError: with the line.
    """
    tables = load_instances(path, max_pixels)
    images = {image["id"]: image for image in tables["images"]}
    categories = {category["id"]: category["name"] for category in tables["categories"]}
    by_name: dict[str, list[Record]] = {}
    for image in tables["images"]:
        by_name.setdefault(PurePosixPath(image["file_name"]).name, []).append(image)
    annotations: dict[Any, list[Record]] = {}
    for annotation in tables["annotations"]:
        if annotation["image_id"] in images:
            annotations.setdefault(annotation["id"], []).append(annotation)
    in_csv = expressions.suffix.lower() in (".csv", ".tsv")
    items = []
    for where, row in _csv_rows(expressions, ["ann_id"]) if in_csv else _json_lines(expressions):
        if "ann_id" not in row:
            raise InputError(f"{where}: has no 'ann_id'; null or nothing there means no target")
        name = _text(row, "image", where)
        alike = by_name.get(PurePosixPath(name).name, [])
        here = {i["id"] for i in alike if f"/{i['file_name']}".endswith(f"/{name}")}
        chosen = []
        for ann_id in (str(i) for i in _as_list(row["ann_id"]) if i not in (None, "")):
            found = annotations.get(whole(ann_id), [])
            found = [a for a in found if not name or a["image_id"] in here]
            if len(found) != 1:
                of = f" in {len(here)} images named {name!r}" if name else ""
                raise InputError(f"{where}: {path} has {len(found)} annotations {ann_id:.40}{of}")
            chosen += found
        ids = {annotation["image_id"] for annotation in chosen} or here
        if len(ids) != 1:
            raise InputError(f"{where}: {len(ids)} images of {path} are meant: name one ('image')")
        image = images[ids.pop()]
        category = categories.get(chosen[0].get("category_id"), "") if chosen else ""
        objects = [annotation.get("segmentation") for annotation in chosen]
        extra = _text(row, "split", where), category, (image["width"], image["height"])
        items.append(Item(where, image["file_name"], _expressions(row, where), objects, *extra))
    return merge(items)


def read_masks(source: Path) -> list[Item]:
    """References from a CSV file with the columns image, mask and expression, or its folder.

    Rows of the same mask are expressions of one reference.

    Raises:
        InputError: with the line.
    """
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix.lower() in (".csv", ".tsv"))
        if len(found) != 1:
            raise InputError(f"--input {source} has {len(found)} CSV files: name the file itself")
        source = found[0]
    items = []
    for where, row in _csv_rows(source, ["image", "mask", "expression"]):
        mask, value = row["mask"], row.get("value") or None
        objects = [_mask_file(mask, value, where)] if mask else []
        extra = row.get("split", ""), row.get("category", "")
        items.append(
            Item(
                where, _text(row, "image", where, needed=True), [row["expression"]], objects, *extra
            )
        )
    return merge(items)


def read_labelme(source: Path) -> Iterator[Item]:
    """References from LabelMe's files: a shape's description, or else its label, is its expression.

    Shapes of one group_id are one object. Each line of a description is an expression.

    Raises:
        InputError: with the file and shape.
    """
    base = source if source.is_dir() else source.parent
    paths = sorted(source.rglob("*.json")) if source.is_dir() else [source]
    for path in paths:
        if source.is_dir() and path.name == "instances.json":  # of an earlier conversion
            continue
        record = parse(read_text(path), str(path))
        shapes = record.get("shapes") if isinstance(record, dict) else None
        if not isinstance(shapes, list):
            raise InputError(f"{path}: has no list 'shapes' as LabelMe's files do; move it away")
        stored = _text(record, "imagePath", str(path), needed=True)
        name = inner(f"{path.parent.relative_to(base).as_posix()}/{stored}")
        width, height = record.get("imageWidth"), record.get("imageHeight")
        size = (width, height) if type(width) is type(height) is int and width > 0 else None
        groups: dict[Any, Item] = {}
        for number, shape in enumerate(shapes, 1):
            where = f"{path}, shape {number}"
            if not isinstance(shape, dict):
                raise InputError(f"{where}: is not an object")
            polygon = _polygon(shape, size, where)
            label = _text(shape, "label", where)
            lines = _text(shape, "description", where).strip().splitlines()
            group = shape.get("group_id")
            key = ("alone", number) if group is None else ("group", str(group))
            item = groups.setdefault(key, Item(where, name, [], [[]], size=size))
            item.embedded = path if record.get("imageData") else None
            item.category = item.category or (label if lines else "")
            item.expressions += [line for line in lines or [label] if line not in item.expressions]
            item.objects[0].append(polygon)
        yield from groups.values()


def _polygon(shape: Record, size: tuple[int, int] | None, where: str) -> list[float]:
    """Corners [x0, y0, x1, y1, …] of a polygon, rectangle or circle."""
    kind = shape.get("shape_type", "polygon")
    needed = {"polygon": 3, "rectangle": 2, "circle": 2}
    if kind not in needed:
        raise InputError(f"{where}: is a {kind!r:.40}; {', '.join(needed)} are converted")
    try:
        points = np.asarray(shape.get("points"), np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise InputError(f"{where}: its 'points' are not a list of [x, y]")
    if len(points) < needed[kind] or (kind == "circle" and len(points) > 2):
        raise InputError(f"{where}: a {kind} of {len(points)} points")
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    elif kind == "circle":
        angles = np.arange(CIRCLE_CORNERS) * (2 * math.pi / CIRCLE_CORNERS)
        radius = np.hypot(*(points[1] - points[0]))
        points = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        if size:  # a circle may leave the image
            points = points.clip(0, size)
    return [float(value) for value in points.ravel()]


def merge(items: Iterable[Item]) -> list[Item]:
    """Join items of the same objects in one image: their expressions are of one reference.

    Raises:
        InputError: they have different splits.
    """
    merged: dict[tuple[str, str], Item] = {}
    for item in items:
        first = merged.setdefault((item.image, repr(item.objects)), item)
        if first is not item:
            if item.split != first.split:
                raise InputError(
                    f"{item.where}: split {item.split!r:.40}, but {first.split!r:.40} in "
                    f"{first.where}, which has the same object"
                )
            first.expressions += item.expressions
            first.category = first.category or item.category
    return list(merged.values())


def read_text(path: Path) -> str:
    """A text file in UTF-8, without its byte order mark.

    Raises:
        InputError: it cannot be read, or has another encoding.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8; save the file as UTF-8") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Each record of JSON lines, with its place."""
    for number, line in enumerate(read_text(path).split("\n"), 1):  # strings may hold U+2028
        where = f"{path}, line {number}"
        if line.strip():
            record = parse(line, where)
            if not isinstance(record, dict):
                raise InputError(f"{where}: is not an object {{...}}")
            yield where, record


def parse(text: str, where: str) -> Any:
    """The content of JSON; an InputError that begins with `where` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: is not JSON ({str(e)[:80]})") from None


def _csv_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV file separated by commas, semicolons or tabs, with its place."""
    text = read_text(path)
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = names
        missing = [name for name in needed if name not in names]
        if missing:
            there = ", ".join(names)[:200] or "nothing"
            raise InputError(f"{path}, line 1: no column '{missing[0]}'; the header has {there}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise InputError(
                    f"{where}: more fields than the {len(names)} of the header; put an expression "
                    f"with '{separator}' in double quotes"
                )
            values = {name: (value or "").strip() for name, value in row.items()}
            if any(values.values()):
                yield where, values
    except csv.Error as e:
        raise InputError(f"{path}, line {reader.reader.line_num}: is not CSV ({e})") from None


def inner(name: str) -> str:
    """A file's name without '..', which leads out of a folder that --images or --masks may name."""
    parts = name.replace("\\", "/").split("/")
    if not {".", ".."} & set(parts):
        return name
    parts = posixpath.normpath("/".join(parts)).split("/")
    return "/".join(part for part in parts if part != "..")


def _text(record: Record, key: str, where: str, needed: bool = False) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: '{key}' is {value!r:.40}, not a text")
    if needed and not value:
        raise InputError(f"{where}: has no '{key}'")
    return value or ""


def _expressions(record: Record, where: str) -> list[Any]:
    for key in ("expressions", "expression"):
        if key in record:
            return _as_list(record[key])
    raise InputError(f"{where}: has no 'expressions'")


def _mask_file(name: Any, value: Any, where: str) -> MaskFile:
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: 'mask' {name!r:.40} is not a file name or a list of them")
    value = whole(value)
    color = isinstance(value, str) and re.fullmatch("#[0-9A-Fa-f]{6}", value)
    if not (color or value is None or type(value) is int):
        raise InputError(f"{where}: 'value' {value!r:.40} is not a whole number or '#rrggbb'")
    return MaskFile(name, value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
