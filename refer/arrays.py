"""The records of a dataset as arrays.

`REFER` gives its users one dict per record. Training and evaluation use arrays instead: they take
less memory, and loader processes share them. (Reference counting writes to shared objects, and
every page written to is copied.)
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lib.errors import InputError

Ints = npt.NDArray[np.int64]
Record = Mapping[str, Any]


class Texts(Sequence[str]):
    """Strings, concatenated in one array.

    Args:
        letters: (B,) uint8, UTF-8; lone surrogates, as in broken JSON, are kept.
        ends: (N + 1,) int64; string i is from ends[i] to ends[i + 1].
    """

    def __init__(self, letters: npt.NDArray[np.uint8], ends: Ints) -> None:
        self.letters = letters
        self.ends = ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Texts:
        """Concatenate strings."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = offsets([len(text) for text in encoded])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def take(self, rows: Ints) -> Texts:
        """The strings of some rows."""
        begins, lengths = self.ends[rows], self.ends[rows + 1] - self.ends[rows]
        return Texts(self.letters[ranges(begins, lengths)], offsets(lengths))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self.ends[index], self.ends[index + 1]
        return self.letters[begin:end].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        letters = self.letters.tobytes()
        return (
            letters[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(self.ends.tolist())
        )


@dataclass(frozen=True)
class Arrays:
    """A dataset. Row r of the references is reference r of the pickle.

    Attributes:
        ref_id, image_id, category_id: (R,) of the references; category -1 is none.
        image: (R,) row of its image.
        same_category: (R,) number of other annotations of its image with its category.
        split: of R references, as in the pickle.
        expression_offsets: (R + 1,) reference r has the expressions from row [r] to row [r + 1].
        sent_id, raw, sent: of S expressions.
        annotation_offsets: (R + 1,) reference r has the annotations from row [r] to row [r + 1].
        ann_id: of A annotations.
        polygon_offsets: (A + 1,) annotation a has the polygons from [a] to [a + 1].
        coordinate_offsets: (P + 1,) polygon p has the coordinates from [p] to [p + 1].
        coordinates: (N,) float64, x and y in turn, pixels.
        other_segmentation: of A annotations, JSON if it is not a list of polygons, else ''.
        height, width, file_name: of I images; pixels.
        image_ids, image_rows: (I,) ids in rising order and the row of each.
        cat_id, cat_name: of C categories.
    """

    ref_id: Ints
    image_id: Ints
    category_id: Ints
    image: Ints
    same_category: Ints
    split: Texts
    expression_offsets: Ints
    sent_id: Ints
    raw: Texts
    sent: Texts
    annotation_offsets: Ints
    ann_id: Ints
    polygon_offsets: Ints
    coordinate_offsets: Ints
    coordinates: npt.NDArray[np.float64]
    other_segmentation: Texts
    height: Ints
    width: Ints
    file_name: Texts
    image_ids: Ints
    image_rows: Ints
    cat_id: Ints
    cat_name: Texts

    @classmethod
    def pack(
        cls,
        refs: Sequence[Record],
        images: Mapping[int, Record],
        annotations: Mapping[int, Record],
        categories: Mapping[int, str],
    ) -> Arrays:
        """From records that have been checked; images and annotations by id.

        Raises:
            InputError: an id of more than 64 bits.
        """
        try:
            return cls(
                **_references(refs, images, annotations),
                **_sentences(refs),
                **_annotations(refs, annotations),
                **_images(images),
                cat_id=np.array(list(categories), np.int64),
                cat_name=Texts.pack(categories.values()),
            )
        except OverflowError:
            raise InputError("a record's id or size has more than 64 bits") from None

    def segmentation(self, row: int) -> Any:
        """COCO's segmentation of an annotation; polygons as arrays."""
        if self.other_segmentation.ends[row] < self.other_segmentation.ends[row + 1]:
            return json.loads(self.other_segmentation[row])
        ends = self.coordinate_offsets[
            self.polygon_offsets[row] : self.polygon_offsets[row + 1] + 1
        ].tolist()
        return [self.coordinates[a:b] for a, b in pairwise(ends)]

    def image_row(self, image_id: int) -> int | None:
        """Row of an image by its id; None without it."""
        place = int(np.searchsorted(self.image_ids, image_id))
        if place == len(self.image_ids) or self.image_ids[place] != image_id:
            return None
        return int(self.image_rows[place])


def offsets(lengths: Sequence[int] | Ints) -> Ints:
    """Begin of each part, and the end of the last, from the parts' lengths: (N + 1,)."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """The numbers of several ranges, one after another: begins[0], begins[0] + 1, ..."""
    ends = offsets(lengths)
    return np.arange(ends[-1]) + (begins - ends[:-1]).repeat(lengths)


def _references(
    refs: Sequence[Record], images: Mapping[int, Record], annotations: Mapping[int, Record]
) -> dict[str, Any]:
    rows = {image_id: row for row, image_id in enumerate(images)}
    ids = {
        key: np.array([ref[key] for ref in refs], np.int64)
        for key in ("ref_id", "image_id", "category_id")
    }
    alike = Counter((ann["image_id"], ann.get("category_id")) for ann in annotations.values())
    others = []
    for ref in refs:
        kind = (ref["image_id"], ref["category_id"])
        own = [annotations[i] for i in ref["ann_ids"]]
        others.append(
            alike[kind] - [(a["image_id"], a.get("category_id")) for a in own].count(kind)
        )
    return ids | {
        "image": np.array([rows[ref["image_id"]] for ref in refs], np.int64),
        "same_category": np.array(others, np.int64),
        "split": Texts.pack(ref["split"] for ref in refs),
    }


def _sentences(refs: Sequence[Record]) -> dict[str, Any]:
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    return {
        "expression_offsets": offsets([len(ref["sentences"]) for ref in refs]),
        "sent_id": np.array([sentence["sent_id"] for sentence in sentences], np.int64),
        "raw": Texts.pack(sentence["raw"] for sentence in sentences),
        "sent": Texts.pack(sentence["sent"] for sentence in sentences),
    }


def _images(images: Mapping[int, Record]) -> dict[str, Any]:
    ids = np.array(list(images), np.int64)
    order = np.argsort(ids)
    return {
        "height": np.array([image["height"] for image in images.values()], np.int64),
        "width": np.array([image["width"] for image in images.values()], np.int64),
        "file_name": Texts.pack(image["file_name"] for image in images.values()),
        "image_ids": ids[order],
        "image_rows": order.astype(np.int64),
    }


def _annotations(refs: Sequence[Record], annotations: Mapping[int, Record]) -> dict[str, Any]:
    coordinates = array("d")
    lengths: list[int] = []  # number of coordinates of each polygon
    counts: list[int] = []  # polygons of each annotation
    other: list[str] = []
    ids = [ann_id for ref in refs for ann_id in ref["ann_ids"]]
    for ann_id in ids:
        segmentation = annotations[ann_id].get("segmentation")
        drawn = _polygons(segmentation)
        other.append(_as_json(segmentation) if drawn is None else "")
        counts.append(len(drawn or ()))
        for polygon in drawn or ():
            lengths.append(len(polygon))
            coordinates.extend(polygon)
    return {
        "annotation_offsets": offsets([len(ref["ann_ids"]) for ref in refs]),
        "ann_id": np.array(ids, np.int64),
        "polygon_offsets": offsets(counts),
        "coordinate_offsets": offsets(lengths),
        "coordinates": np.array(coordinates, np.float64),
        "other_segmentation": Texts.pack(other),
    }


def _polygons(segmentation: Any) -> list[array[float]] | None:
    """A list of lists of numbers; None for anything else, which is checked when it is drawn."""
    if not isinstance(segmentation, list) or not segmentation:
        return None
    if not all(isinstance(polygon, list) for polygon in segmentation):
        return None
    try:
        return [array("d", polygon) for polygon in segmentation]
    except (TypeError, OverflowError):
        return None


def _as_json(segmentation: Any) -> str:
    try:
        return json.dumps(segmentation)
    except RecursionError:
        return "null"  # nothing that could be drawn is so deep
