"""Referring expressions as tensors for a BERT-based network."""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bert.tokenizer import Tokenizer, encode_compact
from data.transforms import as_tensor, resize_image, resize_mask
from lib.errors import InputError
from refer.arrays import Ints, Texts, offsets, ranges
from refer.datasets import DATASETS
from refer.masks import run_lengths
from refer.refer import REFER, in_split


class Sample(TypedDict, total=False):
    """An expression, or all expressions of a reference; a loader stacks samples along B."""

    image: Tensor  # (3, S, S) uint8, channels last in memory
    target: Tensor  # (S, S) uint8 in {0, 1}
    input_ids: Tensor  # (N_l,) int64; (K, N_l) with eval_mode 'mean'
    attention_mask: Tensor  # of the same shape, 1 = real token
    index: int  # of the sample in the dataset
    expressions: int  # eval_mode 'mean' only: how many of the K rows are used
    original_mask: str  # original_masks only: the mask at original size, COCO's run lengths
    height: int  # likewise: of the image, pixels
    width: int


@dataclass(frozen=True)
class Record:
    """What a sample is about, for reports."""

    ref_id: int
    ann_ids: tuple[int, ...]
    image_id: int
    sent_ids: tuple[int, ...]
    expressions: tuple[str, ...]  # the model's input; several with eval_mode 'mean'
    file_name: str

    @property
    def expression(self) -> str:
        """The expressions as one string."""
        return " | ".join(self.expressions)


class Spans(Sequence[range]):
    """Consecutive ranges.

    Args:
        ends: (N + 1,) int64; range i is from ends[i] to ends[i + 1].
    """

    def __init__(self, ends: Ints) -> None:
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> range: ...
    @overload
    def __getitem__(self, index: slice) -> list[range]: ...
    def __getitem__(self, index: int | slice) -> range | list[range]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return range(int(self.ends[index]), int(self.ends[index + 1]))


class Records(Sequence[Record]):
    """The records of a dataset's samples, made on access."""

    def __init__(self, dataset: ReferDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.dataset.record(range(len(self))[index])


class ReferDataset(Dataset[Sample]):
    """Every expression of every reference of a split, in the order of the references.

    A sample depends on its index alone; the sampler draws one expression per reference.

    Args:
        refer: the references.
        split: train, val, test, testA, testB, testC.
        tokenizer: from `bert.load_tokenizer`.
        img_size: side S of the square images and masks, pixels.
        max_tokens: N_l.
        union_masks: whether pixels that several components of an annotation cover belong to it.
            LAVT's published numbers count them as background.
        eval_mode: 'each' expression is a sample; or each reference is one, its expressions joined
            by spaces ('cat'), or side by side, for averaged predictions ('mean').
        text: 'raw' as published, or 'sent', lower-cased and cleaned.
        original_masks: add the mask at the image's original size to each sample.

    Attributes:
        records: of the samples.
        metrics: kind of the dataset's metrics, see :class:`refer.datasets.DatasetInfo`; a dataset
            of the user's own has 'zero_target' if any of its references has no annotation.
        no_target: (N,) bool, whether a sample's reference has no annotation.
        image_ids: (N,) int64, of each sample.
        samples_of_ref: sample indices of each reference; those without expressions are left out.
        expression_count: number of expressions of the split.

    Raises:
        InputError: the split does not exist.
    """

    def __init__(
        self,
        refer: REFER,
        split: str,
        tokenizer: Tokenizer,
        img_size: int,
        max_tokens: int = 20,
        *,
        union_masks: bool = False,
        eval_mode: str = "each",
        text: str = "raw",
        original_masks: bool = False,
    ) -> None:
        self.refer = refer
        self.split = split
        self.img_size = img_size
        self.union_masks = union_masks or refer.info.mask_mode == "union"
        self.eval_mode = eval_mode
        self.original_masks = original_masks
        self.arrays = arrays = refer.arrays
        self.texts = arrays.sent if text == "sent" else arrays.raw
        self.records = Records(self)
        refs = _rows_of_split(refer, split)
        counts = np.diff(arrays.expression_offsets)[refs]
        refs, counts = refs[counts > 0], counts[counts > 0]
        self.expression_count = int(counts.sum())
        per_ref = counts if eval_mode == "each" else np.ones_like(counts)
        self.samples_of_ref = Spans(offsets(per_ref))
        self._ref = refs.repeat(per_ref)  # the reference row of each sample
        empty = np.diff(arrays.annotation_offsets) == 0
        own = refer.dataset not in DATASETS and empty.any()
        self.metrics = "zero_target" if own else refer.info.metrics
        self.no_target = empty[self._ref]
        # The expression rows of all samples, and which of them each sample has.
        self._rows = ranges(arrays.expression_offsets[refs], counts)
        self._spans = Spans(offsets(np.ones_like(self._rows) if eval_mode == "each" else counts))
        inputs = self.texts.take(self._rows)
        if eval_mode == "cat":
            inputs = Texts.pack(text for i in range(len(self)) for text in self._expressions(i))
        # Rows of `input_ids` of each sample.
        self._inputs = self._spans if eval_mode == "mean" else Spans(np.arange(len(self) + 1))
        self.input_ids, self._tokens = encode_compact(tokenizer, list(inputs), max_tokens)
        self._most = int(counts.max(initial=0))
        self.image_ids = arrays.image_id[self._ref]
        self._by_image = np.argsort(self.image_ids, kind="stable")
        # Evaluation takes the samples of an image one after the other: it is decoded once.
        self._last_image: tuple[int, Image.Image] | None = None
        self._last_target: tuple[int, Tensor] | None = None

    def __repr__(self) -> str:
        return f"{self.refer!r} {self.split}"

    @property
    def training_samples(self) -> Spans:
        """What an epoch draws one sample each from: the references, or where published, samples."""
        every = self.refer.info.each_expression
        return Spans(np.arange(len(self) + 1)) if every else self.samples_of_ref

    @property
    def seen_images(self) -> dict[str, Tensor]:
        """Ids of the images that training draws from: sorted int64, by `REFER.image_source`."""
        return self.images_of(np.ones(len(self), bool))

    def images_of(self, rows: npt.NDArray[np.bool_]) -> dict[str, Tensor]:
        """Ids of the images of the chosen samples, sorted, by their source."""
        return {self.refer.image_source: torch.from_numpy(np.unique(self.image_ids[rows]))}

    def __len__(self) -> int:
        return len(self._ref)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        image, target = self.image(index), self.target(index)
        sample: Sample = {"image": image, "target": target, **self.text(index), "index": index}
        if self.original_masks:
            mask = self.mask(index)
            sample["original_mask"] = run_lengths(mask)["counts"]
            sample["height"], sample["width"] = mask.shape
        return sample

    def text(self, index: int) -> Sample:
        """The tokens of a sample."""
        rows = self._inputs[index]
        # Equally many rows in all samples, so that they stack; the others are zeros.
        height = self._most if self.eval_mode == "mean" else 1
        ids = np.zeros((height, self.input_ids.shape[1]), np.int64)
        mask = np.zeros_like(ids)
        ids[: len(rows)] = self.input_ids[rows.start : rows.stop]
        tokens = self._tokens[rows.start : rows.stop, None]
        mask[: len(rows)] = np.arange(ids.shape[1]) < tokens
        if self.eval_mode == "mean":
            return {
                "input_ids": torch.from_numpy(ids),
                "attention_mask": torch.from_numpy(mask),
                "expressions": len(rows),
            }
        return {
            "input_ids": torch.from_numpy(ids[0]),
            "attention_mask": torch.from_numpy(mask[0]),
        }

    def record(self, index: int) -> Record:
        """The record of a sample."""
        arrays, row = self.arrays, self._ref[index]
        return Record(
            int(arrays.ref_id[row]),
            tuple(self._ann_ids(row)),
            int(arrays.image_id[row]),
            tuple(arrays.sent_id[self._expression_rows(index)].tolist()),
            tuple(self._expressions(index)),
            arrays.file_name[int(arrays.image[row])],
        )

    def _ann_ids(self, row: int) -> list[int]:
        """The annotations of a reference."""
        arrays = self.arrays
        first, end = arrays.annotation_offsets[row : row + 2]
        return arrays.ann_id[first:end].tolist()

    def _expression_rows(self, index: int) -> Ints:
        span = self._spans[index]
        return self._rows[span.start : span.stop]

    def _expressions(self, index: int) -> list[str]:
        """The model's input of a sample, in words."""
        texts = [self.texts[i] for i in self._expression_rows(index).tolist()]
        return [" ".join(texts)] if self.eval_mode == "cat" else texts

    def original_image(self, index: int) -> Image.Image:
        """The sample's image at its original size, RGB.

        Raises:
            InputError: missing or damaged.
        """
        return self.refer.open_image(int(self.image_ids[index]))

    def image(self, index: int) -> Tensor:
        """The sample's image as the model's input, (3, S, S) uint8."""
        key = int(self.image_ids[index])
        if self._last_image is None or self._last_image[0] != key:
            self._last_image = (key, resize_image(self.original_image(index), self.img_size))
        return as_tensor(self._last_image[1])

    def target(self, index: int) -> Tensor:
        """The sample's ground truth, (S, S) uint8 in {0, 1}: `mask` resized, nearest neighbour."""
        key = int(self._ref[index])
        if self._last_target is None or self._last_target[0] != key:
            self._last_target = (key, resize_mask(self.mask(index), self.img_size))
        return self._last_target[1].clone()

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """The ground truth at the image's original size: the union of the reference's annotations.

        Returns:
            (H, W) bool, empty for a reference without annotations.

        Raises:
            InputError: an annotation has no polygons, or damaged ones.
        """
        size = self._original_size(index)
        mask = np.zeros(size, bool)
        for segmentation, where in self._segmentations(index):
            components = self.refer.draw(segmentation, *size, where)
            mask |= components > 0 if self.union_masks else components == 1
        return mask

    def _original_size(self, index: int) -> tuple[int, int]:
        image = self.arrays.image[self._ref[index]]
        return int(self.arrays.height[image]), int(self.arrays.width[image])

    def _segmentations(self, index: int) -> Iterable[tuple[Any, str]]:
        """Each annotation's segmentation, and its name for error messages."""
        arrays, row = self.arrays, int(self._ref[index])
        first, end = arrays.annotation_offsets[row : row + 2].tolist()
        for i in range(first, end):
            name = f"annotation {arrays.ann_id[i]} of reference {arrays.ref_id[row]}"
            yield arrays.segmentation(i), f"{self.refer!r}: {name}"

    def name_samples(self, indices: Iterable[int]) -> list[str]:
        """Samples in words, for messages: reference, image and expression."""
        chosen = [self.records[i] for i in indices]
        return [f"ref {r.ref_id} ({r.file_name}) {r.expression[:60]!r}" for r in chosen]

    def group_by_image(self, indices: Iterable[int]) -> list[int]:
        """The samples ordered so that those of an image follow one another."""
        indices = list(indices)
        images = self.image_ids[indices].tolist()
        first = {image: place for place, image in enumerate(dict.fromkeys(images))}
        order = sorted(range(len(indices)), key=lambda k: first[images[k]])
        return [indices[k] for k in order]

    def check_images(self) -> None:
        """Check that every image of the split exists, without opening any.

        Raises:
            InputError: some are missing; says how many, and names the first.
        """
        images = dict.fromkeys(self.image_ids.tolist())  # each once, in order
        paths = [self.refer.image_path(image_id) for image_id in images]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(paths)} images of {self!r} are missing: "
                + self.refer.missing_image(missing[0])
            )

    def kinds(self) -> dict[int, str]:
        """Kind of expression by sent_id, from the dataset's `kinds.json`; {} without the file.

        Raises:
            InputError: the file is not an object of strings.
        """
        path = self.refer.DATA_DIR / "kinds.json"
        if not os.path.isfile(path):
            return {}
        try:
            kinds = json.loads(path.read_bytes())
            return {int(sent_id): str(kind) for sent_id, kind in kinds.items()}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not an object {{sent_id: kind}} ({error})") from None

    def sample_kinds(self) -> list[str | None]:
        """Kind of each sample: 'mixed' if its expressions differ in it, None if unknown."""
        kinds = self.kinds()
        if not kinds:
            return [None] * len(self)
        per_sample = [{kinds.get(i, "unknown") for i in record.sent_ids} for record in self.records]
        return [names.pop() if len(names) == 1 else "mixed" for names in per_sample]

    def describe(self, index: int) -> dict[str, Any]:
        """The part of a line of a predictions file that describes the sample."""
        record = self.records[index]
        arrays, row = self.arrays, self._ref[index]
        category = arrays.category_id[row]
        names = [arrays.cat_name[i] for i in np.flatnonzero(arrays.cat_id == category).tolist()]
        height, width = self._original_size(index)
        no_target = {"metrics": self.metrics, "no_target": bool(self.no_target[index])}
        return {
            "split": self.split,
            "ref_id": record.ref_id,
            "ann_ids": list(record.ann_ids),
            "image_id": record.image_id,
            "category_id": int(category),
            "sent_ids": list(record.sent_ids),
            "sentence": record.expression,
            "category": names[0] if names else "",
            "file_name": record.file_name,
            "height": height,
            "width": width,
            "same_category": int(arrays.same_category[row]),
            **({} if self.metrics == "standard" else no_target),
        }

    def other_object(self, index: int) -> int | None:
        """A sample about other objects of the same image, always the same one.

        Args:
            index: of a sample.

        Returns:
            Index of a sample that shares no annotation with it; None if the image has none. Where
            the metrics ask for missing targets, both have one.
        """
        image = self.image_ids[index]
        ends = np.searchsorted(self.image_ids, [image, image + 1], sorter=self._by_image)
        row = self._ref[index]
        mine = set(self._ann_ids(row))
        others = [
            i
            for i in self._by_image[ends[0] : ends[1]].tolist()
            if self._ref[i] != row and mine.isdisjoint(self._ann_ids(self._ref[i]))
        ]
        if self.metrics != "standard":
            others = [i for i in others if not self.no_target[[i, index]].any()]
        return others[index % len(others)] if others else None


class OtherObjectExpressions(Dataset[Sample]):
    """The control: each image and mask with the expression of another object in the image.

    A network that uses the expression should score low here.

    Args:
        dataset: of images, masks and expressions.

    Attributes:
        indices: the samples of `dataset` that have such an expression; others raise a KeyError.
    """

    def __init__(self, dataset: ReferDataset) -> None:
        self.dataset = dataset
        self.metrics, self.no_target = dataset.metrics, dataset.no_target
        others = {i: dataset.other_object(i) for i in range(len(dataset))}
        self._other = {i: other for i, other in others.items() if other is not None}
        self.indices = list(self._other)

    def __len__(self) -> int:
        return len(self.dataset)

    def group_by_image(self, indices: Iterable[int]) -> list[int]:
        """As :meth:`ReferDataset.group_by_image`."""
        return self.dataset.group_by_image(indices)

    def __getitem__(self, index: int) -> Sample:
        return {**self.dataset[index], **self.dataset.text(self._other[index])}


def merge(*many: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The union of several ``seen_images`` of :class:`ReferDataset`."""
    names = sorted({name for seen in many for name in seen})
    return {n: torch.cat([seen[n] for seen in many if n in seen]).unique() for n in names}


def _rows_of_split(refer: REFER, split: str) -> Ints:
    """Rows of a split's references.

    Raises:
        InputError: there are none.
    """
    labels = np.array(list(refer.arrays.split))
    wanted = [label for label in np.unique(labels) if in_split(str(label), split)]
    rows = np.flatnonzero(np.isin(labels, wanted))
    if not len(rows):
        raise refer.no_split(split)
    return rows
