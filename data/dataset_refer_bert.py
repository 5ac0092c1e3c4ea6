"""Referring expressions as tensors for a BERT-based network."""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bert.tokenizer import Tokenizer, encode_compact, fingerprint
from data.cache import ArrayCache, digest
from data.transforms import Preprocess, as_tensor, nearest
from lib.errors import InputError
from refer.arrays import Ints, Texts, offsets
from refer.masks import draw_components, draw_samples, run_lengths
from refer.refer import REFER, in_split

FEW = 2000  # texts, that are tokenised as fast as they are looked up


class Sample(TypedDict, total=False):
    """A text about an object, or all its texts; a loader stacks samples along a batch axis B."""

    image: Tensor  # (3, S, S) uint8, the channels side by side in memory
    target: Tensor  # (S, S) uint8 in {0, 1}
    input_ids: Tensor  # (N_l,) int64; of averaged expressions (K, N_l)
    attention_mask: Tensor  # of the same shape, 1 = real token
    index: int  # of the sample in the data set
    expressions: int  # averaged expressions only: how many of the K rows are used
    original_mask: str  # with original_masks only: the mask at the photo's size, COCO's run lengths
    height: int  # likewise: of the photo, pixels
    width: int


@dataclass(frozen=True)
class Record:
    """What a sample is about, for reports."""

    ref_id: int
    ann_id: int
    image_id: int
    sent_ids: tuple[int, ...]
    sentences: tuple[str, ...]  # that are fed: several where their predictions are averaged
    file_name: str

    @property
    def ann_ids(self) -> list[int]:
        return [self.ann_id]

    @property
    def sentence(self) -> str:
        """What is fed, as one text."""
        return " | ".join(self.sentences)


class Spans(Sequence[range]):
    """Ranges, one behind the other.

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
    """What each sample of a data set is about, made when it is asked for."""

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
    """Every sentence of every object of a split, in the order of the references.

    A sample depends on its index alone: which of an object's sentences is trained on is the
    sampler's business, so neither worker counts nor resuming can change a draw.

    Args:
        refer: the references.
        split: train, val, test, testA, testB, testC.
        tokenizer: from `bert.load_tokenizer`.
        img_size: side of the square pictures and masks, pixels.
        max_tokens: N_l.
        union_masks: whether pixels covered by several components of an object belong to it.
            The published numbers count them as background.
        eval_mode: 'each' sentence is a sample; or each object is one, its sentences joined by
            spaces ('cat') or side by side, for their predictions to be averaged ('mean').
        text: 'raw', which the release feeds, or 'sent', lower-cased and cleaned.
        original_masks: whether samples have their mask at the photo's own size too.

    Attributes:
        records: what each sample is about.
        samples_of_ref: sample indices of each reference; one without sentences is left out.
        expressions: number of sentences of the split.

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
        self.preprocess = Preprocess(img_size)
        self.union_masks = union_masks
        self.eval_mode = eval_mode
        self.original_masks = original_masks
        self.tables = tables = refer.tables
        self.texts = tables.sent if text == "sent" else tables.raw
        self.records = Records(self)
        refs = _rows_of_split(refer, split)
        counts = tables.sentence[refs + 1] - tables.sentence[refs]
        refs, counts = refs[counts > 0], counts[counts > 0]
        self.expression_count = int(counts.sum())
        per_ref = counts if eval_mode == "each" else np.ones_like(counts)
        self.samples_of_ref = Spans(offsets(per_ref))
        self._ref = refs.repeat(per_ref)  # of each sample, its row
        said = tables.sentence[refs].repeat(counts) + _places(counts)  # rows of all sentences
        self._said = Spans(offsets(np.ones_like(said) if eval_mode == "each" else counts))
        self._sentence = said
        fed = self.texts.take(said)
        if eval_mode == "cat":
            fed = Texts.pack(text for i in range(len(self)) for text in self._fed(i))
        # Rows of `input_ids` of each sample.
        self._rows = self._said if eval_mode == "mean" else Spans(np.arange(len(self) + 1))
        self.input_ids, self._tokens = _encode(tokenizer, fed, max_tokens, refer.cache)
        self._most = int(counts.max(initial=0))
        self._image_ids = tables.image_id[self._ref]
        self._by_image = np.argsort(self._image_ids, kind="stable")
        # Samples of one picture follow one another in evaluation: it is decoded once.
        self._last_picture: tuple[int, Image.Image] | None = None
        self._last_target: tuple[int, Tensor] | None = None

    def __repr__(self) -> str:
        return f"{self.refer!r} {self.split}"

    def __len__(self) -> int:
        return len(self._ref)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        image, target = self.image(index), self.target(index)
        sample: Sample = {"image": image, "target": target, **self.text(index), "index": index}
        if self.original_masks:
            mask = self.mask(index)
            height, width = mask.shape
            sample |= {
                "original_mask": run_lengths(mask)["counts"],
                "height": height,
                "width": width,
            }
        return sample

    def text(self, index: int) -> Sample:
        """The part of a sample that holds what is said about its object."""
        rows = self._rows[index]
        # Equally many rows in all samples, so that they stack; the rest is not used.
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
        """What a sample is about."""
        tables, row = self.tables, self._ref[index]
        return Record(
            int(tables.ref_id[row]),
            int(tables.ann_id[row]),
            int(tables.image_id[row]),
            tuple(tables.sent_id[self._said_rows(index)].tolist()),
            tuple(self._fed(index)),
            tables.file_name[int(tables.image[row])],
        )

    def _said_rows(self, index: int) -> Ints:
        said = self._said[index]
        return self._sentence[said.start : said.stop]

    def _fed(self, index: int) -> list[str]:
        """What is fed of a sample, in words."""
        texts = [self.texts[i] for i in self._said_rows(index).tolist()]
        return [" ".join(texts)] if self.eval_mode == "cat" else texts

    def picture(self, index: int) -> Image.Image:
        """The sample's picture at its own size, RGB.

        Raises:
            InputError: missing or damaged.
        """
        return self.refer.open_image(int(self.tables.image_id[self._ref[index]]))

    def image(self, index: int) -> Tensor:
        """The sample's picture as the model takes it, (3, S, S) uint8."""
        key = int(self.tables.image[self._ref[index]])
        if self._last_picture is None or self._last_picture[0] != key:
            self._last_picture = (key, self.preprocess.square(self.picture(index)))
        return as_tensor(self._last_picture[1])

    def target(self, index: int) -> Tensor:
        """The sample's object, (S, S) uint8 in {0, 1}: `mask` resized by nearest neighbour."""
        key = int(self._ref[index])
        if self._last_target is None or self._last_target[0] != key:
            self._last_target = (key, self.draw_target(index))
        return self._last_target[1].clone()

    def draw_target(self, index: int) -> Tensor:
        """`target`, drawn anew."""
        segmentation, height, width, where = self._outline(index)
        size = self.preprocess.img_size
        covered = draw_samples(segmentation, nearest(height, size), nearest(width, size), where)
        return torch.from_numpy(self._belongs(covered).view(np.uint8))

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """(H, W) bool, the sample's object at the annotated size.

        Raises:
            InputError: the annotation has no polygons, or damaged ones.
        """
        return self._belongs(draw_components(*self._outline(index)))

    def _belongs(self, covered: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        return covered > 0 if self.union_masks else covered == 1

    def _outline(self, index: int) -> tuple[Any, int, int, str]:
        tables, row = self.tables, int(self._ref[index])
        image = tables.image[row]
        where = f"{self.refer!r}: annotation {tables.ann_id[row]} of reference {tables.ref_id[row]}"
        size = int(tables.height[image]), int(tables.width[image])
        return tables.segmentation(row), *size, where

    def name_samples(self, indices: Iterable[int]) -> list[str]:
        """Samples in words, for messages: reference, picture and sentence."""
        chosen = [self.records[i] for i in indices]
        return [f"ref {r.ref_id} ({r.file_name}) {r.sentence[:60]!r}" for r in chosen]

    def group_by_image(self, indices: Iterable[int]) -> list[int]:
        """Samples about the same picture side by side, otherwise in their order."""
        indices = list(indices)
        images = self._image_ids[indices].tolist()
        first = {image: place for place, image in enumerate(dict.fromkeys(images))}
        order = sorted(range(len(indices)), key=lambda k: first[images[k]])
        return [indices[k] for k in order]

    def check_images(self) -> None:
        """Look for every picture of the split, without opening any.

        Raises:
            InputError: some are missing; says how many and where the first was looked for.
        """
        images = dict.fromkeys(self._image_ids.tolist())  # each once, in order
        paths = [self.refer.image_path(image_id) for image_id in images]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(paths)} images of {self!r} are missing: "
                + self.refer.missing_image(missing[0])
            )

    def kinds(self) -> dict[int, str]:
        """Kind of expression by sent_id, from the data set's `kinds.json`; {} without one.

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
        """Kind of each sample: 'mixed' where its sentences differ in it, None where unknown."""
        kinds = self.kinds()
        other = "unknown" if kinds else None
        of_sample = [{kinds.get(i, other) for i in record.sent_ids} for record in self.records]
        return [found.pop() if len(found) == 1 else "mixed" for found in of_sample]

    def describe(self, index: int) -> dict[str, Any]:
        """What a file of predictions says of a sample, apart from what was predicted."""
        record = self.records[index]
        tables, row = self.tables, self._ref[index]
        image, category = tables.image[row], tables.category_id[row]
        names = [tables.cat_name[i] for i in np.flatnonzero(tables.cat_id == category).tolist()]
        return {
            "split": self.split,
            "ref_id": record.ref_id,
            "ann_id": record.ann_id,
            "image_id": record.image_id,
            "category_id": int(category),
            "sent_ids": list(record.sent_ids),
            "sentence": record.sentence,
            "category": names[0] if names else "",
            "file_name": record.file_name,
            "height": int(tables.height[image]),
            "width": int(tables.width[image]),
            "same_category": int(tables.same_category[row]),
        }

    def other_object(self, index: int) -> int | None:
        """A sample about another object of the same picture, always the same one.

        Args:
            index: of a sample.

        Returns:
            Index of the other sample; None where the split refers to no other object there.
        """
        images, row = self._image_ids, self._ref[index]
        image = self.tables.image_id[row]
        ends = np.searchsorted(images, [image, image + 1], sorter=self._by_image)
        there = self._by_image[ends[0] : ends[1]]
        others = there[self.tables.ann_id[self._ref[there]] != self.tables.ann_id[row]]
        return int(others[index % len(others)]) if len(others) else None


class OtherObjectExpressions(Dataset[Sample]):
    """The control: each picture and mask with the sentence of another object in the picture.

    A network that uses the sentence must do badly here.

    Args:
        dataset: where pictures, masks and sentences come from.

    Attributes:
        indices: the samples of `dataset` that have such a sentence; others cannot be taken.
    """

    def __init__(self, dataset: ReferDataset) -> None:
        self.dataset = dataset
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


def _rows_of_split(refer: REFER, split: str) -> Ints:
    """Rows of a split's references.

    Raises:
        InputError: there are none.
    """
    labels = np.array(list(refer.tables.split))
    wanted = [label for label in np.unique(labels) if in_split(str(label), split)]
    rows = np.flatnonzero(np.isin(labels, wanted))
    if not len(rows):
        raise refer.no_split(split)
    return rows


def _places(counts: Ints) -> Ints:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    ends = offsets(counts)
    return np.arange(ends[-1]) - ends[:-1].repeat(counts)


def _encode(
    tokenizer: Tokenizer, texts: Texts, max_tokens: int, cache: ArrayCache | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`encode_compact`, kept between runs."""
    known = fingerprint(tokenizer) if cache is not None and len(texts) > FEW else None
    if cache is None or known is None:
        return encode_compact(tokenizer, list(texts), max_tokens)
    key = digest(texts.letters, texts.ends, known, b"%d" % max_tokens)
    kept = cache.get("tokens", key)
    if kept is None:
        ids, tokens = encode_compact(tokenizer, list(texts), max_tokens)
        kept = cache.put("tokens", key, {"ids": ids, "tokens": tokens})
    return kept["ids"], kept["tokens"]
