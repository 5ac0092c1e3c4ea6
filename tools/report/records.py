"""Read the file of `test.py --predictions`: one JSON object per line, one line per sample."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.evaluation.counts import SampleCounts, sample_counts
from lib.evaluation.generalised import KINDS
from refer.masks import shared_pixels, unpack_counts
from refer.names import parts_of

STANDARD = "standard"
MAX_PIXELS = 2**31 - 1  # of an image; the upper end of --max_pixels
MAX_INT = 2**53  # larger JSON numbers are not exact in every reader
ROUNDING = 1e-3  # of a written IoU


@dataclass(frozen=True)
class Rle:
    """A mask as COCO's compressed run lengths, checked: pycocotools decodes `as_coco` safely."""

    height: int
    width: int
    counts: str

    @property
    def as_coco(self) -> dict[str, Any]:
        """The format of pycocotools."""
        return {"size": [self.height, self.width], "counts": self.counts}

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return sum(unpack_counts(self.counts.encode(), "mask")[1::2])


@dataclass(frozen=True)
class Prediction:
    """A line: a sample and its prediction.

    Attributes:
        split: of the sample.
        ref_id, ann_ids, image_id, category_id: of the reference; it has any number of annotations.
        sent_ids: the expressions; several if they were joined or averaged.
        sentence: the model's input; averaged expressions are joined by " | ".
        category: its name.
        file_name: of the image, relative to the image folder; cannot lead out of it.
        height, width: of the image, pixels.
        same_category: number of other objects of the category in the image.
        iou: of the protocol, in [0, 1].
        intersection, union: pixels, of the protocol.
        score: mean foreground probability inside the predicted mask, in [0, 1].
        segmentation: predicted mask, at the image's original size.
        truth: ground truth mask, at the image's original size.
        protocol: "standard", or how it differs.
        kind: of the expression, if the dataset has kinds.
        metrics: kind of the dataset's metrics, see :class:`refer.datasets.DatasetInfo`.
        no_target: whether the reference has no object; only where the metrics ask.
        predicted_no_target: whether the prediction is that there is none; likewise.
    """

    split: str
    ref_id: int
    ann_ids: tuple[int, ...]
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
    metrics: str = "standard"
    no_target: bool = False
    predicted_no_target: bool = False

    @property
    def key(self) -> tuple[str, int, tuple[int, ...]]:
        """Identifies the sample, in this evaluation and others."""
        return self.split, self.ref_id, self.sent_ids

    @property
    def object(self) -> tuple[str, tuple[int, ...]]:
        """Identifies the objects: samples about the same ones share it."""
        return self.split, self.ann_ids or (-1, self.ref_id)


def read_records(path: str | Path) -> list[Prediction]:
    """Read a file of predictions.

    Args:
        path: of the file.

    Returns:
        Its samples, in the file's order; blank lines and unknown fields are ignored.

    Raises:
        InputError: the file cannot be read or has no sample; a line is malformed, repeats a
            sample, or is of another protocol than the first. Names the line.
    """
    samples: list[Prediction] = []
    line_of: dict[tuple[Any, ...], int] = {}
    for number, line in _lines(Path(path)):
        try:
            sample = _parse(line)
            if sample.key in line_of:
                raise ValueError(f"the same sample as line {line_of[sample.key]}")
            if samples and sample.metrics != samples[0].metrics:
                raise ValueError(f"its metrics are not those of the first line: {sample.metrics}")
            if samples and sample.protocol != samples[0].protocol:
                raise ValueError(
                    f"protocol '{sample.protocol[:80]}', that of the first line is "
                    f"'{samples[0].protocol[:80]}'; put them into separate files"
                )
        except ValueError as e:
            raise InputError(f"{path}, line {number}: {e}") from None
        line_of[sample.key] = number
        samples.append(sample)
    if not samples:
        raise InputError(f"{path} holds no sample: write it with test.py --predictions")
    return samples


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
    """Check a line.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON (cut off?)") from None
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if "ann_ids" not in raw and "ann_id" in raw:  # of earlier versions
        raw["ann_ids"] = [_integer(raw, "ann_id")]
    needed = [f.name for f in fields(Prediction) if f.default is MISSING]
    missing = [name for name in needed if name not in raw]
    if missing:
        raise ValueError(f"'{missing[0]}' is missing")
    texts: dict[str, Any] = {
        name: _text(raw, name) for name in ("split", "sentence", "category", "protocol")
    }
    ids: dict[str, Any] = {
        name: _integer(raw, name) for name in ("ref_id", "image_id", "category_id")
    }
    sizes: dict[str, Any] = {name: _integer(raw, name, 1) for name in ("height", "width")}
    if sizes["height"] * sizes["width"] > MAX_PIXELS:
        raise ValueError(f"an image of more than {MAX_PIXELS} pixels")
    return Prediction(
        **texts,
        **ids,
        **sizes,
        **_counts(raw),
        ann_ids=_integers(raw, "ann_ids"),
        sent_ids=_integers(raw, "sent_ids", least=1),
        file_name=_file_name(raw),
        same_category=_integer(raw, "same_category", 0),
        score=_fraction(raw, "score"),
        segmentation=_rle(raw, "segmentation", **sizes),
        truth=_rle(raw, "truth", **sizes),
        kind=None if raw.get("kind") is None else _text(raw, "kind"),
        **_of_no_target(raw),
    )


def _of_no_target(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that only datasets have whose expressions may refer to nothing."""
    if "metrics" not in raw:
        return {}
    if raw["metrics"] not in KINDS:
        raise ValueError(f"'metrics' is none of {', '.join(KINDS)}")
    names = ("no_target", "predicted_no_target")
    if wrong := [name for name in names if type(raw.get(name)) is not bool]:
        raise ValueError(f"'{wrong[0]}' is not true or false")
    return {name: raw[name] for name in ("metrics", *names)}


def counts_of(samples: Sequence[Prediction], from_masks: bool = False) -> SampleCounts:
    """The counts that the samples' metrics are made of.

    Args:
        samples: of one file.
        from_masks: count again, at the image's original size.
    """
    if from_masks:
        pairs = [shared_pixels(s.segmentation.as_coco, s.truth.as_coco) for s in samples]
    else:
        pairs = [(s.intersection, s.union) for s in samples]
    inter, union = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    predicted = [s.predicted_no_target for s in samples]
    label = re.search(r"no_target_pixels=(\w+)", samples[0].protocol)
    if from_masks and (label is None or label[1].isdecimal()):  # not by a head
        fewest = max(1, int(label[1])) if label else 1
        predicted = [s.segmentation.area < fewest for s in samples]
    truth = [s.no_target for s in samples]
    return sample_counts(samples[0].metrics, inter, union, np.array(truth), np.array(predicted))


def _text(raw: dict[str, Any], name: str) -> str:
    if not isinstance(raw[name], str):
        raise ValueError(f"'{name}' is not a string")
    return raw[name]


def _integer(raw: dict[str, Any], name: str, least: int = -MAX_INT) -> int:
    value = raw[name]
    if type(value) is not int or not least <= value <= MAX_INT:
        raise ValueError(f"'{name}' is not an integer{'' if least < 0 else f' of {least} or more'}")
    return value


def _fraction(raw: dict[str, Any], name: str) -> float:
    value = raw[name]
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"'{name}' is not a number from 0 to 1")
    return float(value)


def _counts(raw: dict[str, Any]) -> dict[str, Any]:
    """IoU, intersection and union, which must agree."""
    iou, inter, union = _fraction(raw, "iou"), _integer(raw, "intersection", 0), raw["union"]
    if _integer(raw, "union", 0) < inter:
        raise ValueError("'intersection' is more than 'union'")
    if not math.isclose(iou, inter / union if union else 0.0, abs_tol=ROUNDING):
        raise ValueError("'iou' is not 'intersection' / 'union'")
    return {"iou": iou, "intersection": inter, "union": union}


def _integers(raw: dict[str, Any], name: str, least: int = 0) -> tuple[int, ...]:
    value = raw[name]
    if not isinstance(value, list) or len(value) < least or not {type(n) for n in value} <= {int}:
        raise ValueError(f"'{name}' is not a list of integers")
    return tuple(value)


def _file_name(raw: dict[str, Any]) -> str:
    name = _text(raw, "file_name")
    if not parts_of(name):
        raise ValueError(f"the file name {name[:80]!r} leads out of the image folder")
    return name


def _rle(raw: dict[str, Any], name: str, height: int, width: int) -> Rle:
    """A mask; checked, because pycocotools would write past its buffer for wrong counts."""
    value = raw[name]
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str):
        raise ValueError(f"'{name}' is not {{'size': [h, w], 'counts': string}}")
    if value.get("size") != [height, width]:
        raise ValueError(f"the size of '{name}' is not the image's, {height} x {width}")
    try:
        runs = unpack_counts(value["counts"].encode("ascii", "replace"), name)
    except InputError as e:
        raise ValueError(str(e)) from None
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"the run lengths of '{name}' do not fill {height} x {width} pixels")
    return Rle(height, width, value["counts"])
