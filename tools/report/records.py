"""Read what `test.py --predictions` writes: one JSON object a line, one line a sample."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lib.errors import InputError
from refer.images import MAX_PIXELS
from refer.masks import unpack_counts
from refer.refer import leads_out

STANDARD = "standard"
MAX_INT = 2**53  # JSON numbers beyond are not exact everywhere
ROUNDING = 1e-3  # of a written IoU


@dataclass(frozen=True)
class Rle:
    """A mask as COCO's compressed run lengths, checked: pycocotools decodes `as_coco` safely."""

    height: int
    width: int
    counts: str

    @property
    def as_coco(self) -> dict[str, Any]:
        """As pycocotools takes it."""
        return {"size": [self.height, self.width], "counts": self.counts}

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return sum(unpack_counts(self.counts.encode(), "mask")[1::2])


@dataclass(frozen=True)
class Prediction:
    """A line: a sample, and what was predicted for it.

    Attributes:
        split: that it was evaluated in.
        ref_id, ann_id, image_id, category_id: of the object.
        sent_ids: the expressions; several where they were joined or averaged.
        sentence: what was fed; averaged expressions are joined by " | ".
        category: its name.
        file_name: of the photo, relative to the image folder; cannot lead out of it.
        height, width: of the photo, pixels.
        same_category: number of other objects of the category in the photo.
        iou: of the protocol, in [0, 1].
        intersection, union: pixels, of the protocol.
        score: mean foreground probability inside the predicted mask, in [0, 1].
        segmentation: predicted mask, at the photo's size.
        truth: true mask, at the photo's size.
        protocol: "standard", or how it differs.
        kind: of the expression, where the data set knows kinds.
    """

    split: str
    ref_id: int
    ann_id: int
    image_id: int
    category_id: int
    sent_ids: tuple[int, ...]
    sentence: str
    category: str
    file_name: str
    height: int
    width: int
    same_category: int
    iou: float
    intersection: int
    union: int
    score: float
    segmentation: Rle
    truth: Rle
    protocol: str
    kind: str | None = None

    @property
    def key(self) -> tuple[str, int, tuple[int, ...]]:
        """What tells samples apart, and is the same in another evaluation of them."""
        return self.split, self.ref_id, self.sent_ids

    @property
    def object(self) -> tuple[str, int]:
        """What samples share that are about the same object."""
        return self.split, self.ann_id


def read_records(path: str | Path) -> list[Prediction]:
    """Read a file of predictions.

    Args:
        path: of the file.

    Returns:
        Its samples, in the file's order; blank lines are passed over, unknown fields ignored.

    Raises:
        InputError: the file cannot be read or has no sample; a line is not what `Prediction`
            says, repeats a sample, or is of another protocol than the first. Names the line.
    """
    found: list[Prediction] = []
    line_of: dict[tuple[Any, ...], int] = {}
    for number, line in _lines(Path(path)):
        try:
            sample = _parse(line)
            if sample.key in line_of:
                raise ValueError(f"the same sample as line {line_of[sample.key]}")
            if found and sample.protocol != found[0].protocol:
                raise ValueError(
                    f"protocol '{sample.protocol[:80]}', that of the first line is "
                    f"'{found[0].protocol[:80]}'; keep them in files of their own"
                )
        except ValueError as e:
            raise InputError(f"{path}, line {number}: {e}") from None
        line_of[sample.key] = number
        found.append(sample)
    if not found:
        raise InputError(f"{path} holds no sample: write it with test.py --predictions")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, without blank ones."""
    try:
        with open(path, "rb") as file:  # as bytes: text lines would also end at a U+2028
            yield from ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: write it with test.py --predictions") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from None


def _parse(line: bytes) -> Prediction:
    """Check a line; a ValueError says what is wrong with it."""
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON (cut off?)") from None
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    needed = [f.name for f in fields(Prediction) if f.name != "kind"]
    missing = [name for name in needed if name not in raw]
    if missing:
        raise ValueError(f"'{missing[0]}' is missing")
    texts: dict[str, Any] = {
        name: _text(raw, name) for name in ("split", "sentence", "category", "protocol")
    }
    ids: dict[str, Any] = {
        name: _integer(raw, name) for name in ("ref_id", "ann_id", "image_id", "category_id")
    }
    sizes: dict[str, Any] = {name: _integer(raw, name, 1) for name in ("height", "width")}
    if sizes["height"] * sizes["width"] > MAX_PIXELS:
        raise ValueError(f"a photo of more than {MAX_PIXELS // 10**6} megapixels")
    return Prediction(
        **texts,
        **ids,
        **sizes,
        **_counts(raw),
        sent_ids=_sent_ids(raw["sent_ids"]),
        file_name=_file_name(raw),
        same_category=_integer(raw, "same_category", 0),
        score=_share(raw, "score"),
        segmentation=_rle(raw, "segmentation", **sizes),
        truth=_rle(raw, "truth", **sizes),
        kind=None if raw.get("kind") is None else _text(raw, "kind"),
    )


def _text(raw: dict[str, Any], name: str) -> str:
    if not isinstance(raw[name], str):
        raise ValueError(f"'{name}' is not a text")
    return raw[name]


def _integer(raw: dict[str, Any], name: str, least: int = -MAX_INT) -> int:
    value = raw[name]
    if type(value) is not int or not least <= value <= MAX_INT:
        raise ValueError(f"'{name}' is not an integer{'' if least < 0 else f' of {least} or more'}")
    return value


def _share(raw: dict[str, Any], name: str) -> float:
    value = raw[name]
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"'{name}' is not a number from 0 to 1")
    return float(value)


def _counts(raw: dict[str, Any]) -> dict[str, Any]:
    """IoU, intersection and union, which must agree."""
    iou, inter, union = _share(raw, "iou"), _integer(raw, "intersection", 0), raw["union"]
    if _integer(raw, "union", 0) < inter:
        raise ValueError("'intersection' is more than 'union'")
    if not math.isclose(iou, inter / union if union else 0.0, abs_tol=ROUNDING):
        raise ValueError("'iou' is not 'intersection' / 'union'")
    return {"iou": iou, "intersection": inter, "union": union}


def _sent_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or {type(n) for n in value} != {int}:
        raise ValueError("'sent_ids' is not a list of integers")
    return tuple(value)


def _file_name(raw: dict[str, Any]) -> str:
    name = _text(raw, "file_name")
    if leads_out(name):
        raise ValueError(f"the file name {name[:80]!r} leads out of the image folder")
    return name


def _rle(raw: dict[str, Any], name: str, height: int, width: int) -> Rle:
    """A mask; pycocotools would write past its buffer for counts that do not fit."""
    value = raw[name]
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str):
        raise ValueError(f"'{name}' is not {{'size': [h, w], 'counts': text}}")
    if value.get("size") != [height, width]:
        raise ValueError(f"the size of '{name}' is not the photo's, {height} x {width}")
    try:
        runs = unpack_counts(value["counts"].encode("ascii", "replace"), name)
    except InputError as e:
        raise ValueError(str(e)) from None
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"the run lengths of '{name}' do not fill {height} x {width} pixels")
    return Rle(height, width, value["counts"])
