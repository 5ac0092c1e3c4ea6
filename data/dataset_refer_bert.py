"""Referring expressions as tensors for a BERT-based network."""

from __future__ import annotations

import json
import os.path
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from bert.tokenizer import Tokenizer, encode
from data.transforms import Preprocess
from lib.errors import InputError
from lib.masks import run_lengths
from refer.pickles import Ref
from refer.refer import REFER


class Sample(TypedDict, total=False):
    """A text about an object, or all its texts; a loader stacks samples along a batch axis B."""

    image: Tensor  # (3, S, S) uint8
    target: Tensor  # (S, S) int64 in {0, 1}
    input_ids: Tensor  # (N_l,) int64; of averaged expressions (K, N_l)
    attention_mask: Tensor  # of the same shape, 1 = real token
    index: int  # of the sample in the data set
    expressions: int  # averaged expressions only: how many of the K rows are used
    truth: str  # with photo_masks only: the mask at the photo's size, COCO's run lengths
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
    def sentence(self) -> str:
        """What is fed, as one text."""
        return " | ".join(self.sentences)


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
        photo_masks: whether samples have their mask at the photo's own size too.

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
        photo_masks: bool = False,
    ) -> None:
        self.refer = refer
        self.split = split
        self.preprocess = Preprocess(img_size)
        self.union_masks = union_masks
        self.averages = eval_mode == "mean"
        self.photo_masks = photo_masks
        self.records: list[Record] = []
        self.samples_of_ref: list[list[int]] = []
        self.expressions = 0
        for ref in refer.loadRefs(refer.getRefIds(split=split)):
            first = len(self.records)
            self.records += _records(refer, ref, eval_mode, text)
            self.expressions += len(ref["sentences"])
            if len(self.records) > first:
                self.samples_of_ref.append(list(range(first, len(self.records))))
        fed = [sentence for record in self.records for sentence in record.sentences]
        self.input_ids, self.attention_mask = encode(tokenizer, fed, max_tokens)
        counts = [len(record.sentences) for record in self.records]
        self._most = max(counts, default=0)
        self._first = np.cumsum([0, *counts])  # row of input_ids where a sample starts
        self._samples_of_image: dict[int, list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            self._samples_of_image[record.image_id].append(i)

    def __repr__(self) -> str:
        return f"{self.refer!r} {self.split}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        mask = self.mask(index)
        image, target = self.preprocess(self.picture(index), mask)
        sample: Sample = {"image": image, "target": target, **self.text(index), "index": index}
        if self.photo_masks:
            height, width = mask.shape
            sample |= {"truth": run_lengths(mask)["counts"], "height": height, "width": width}
        return sample

    def text(self, index: int) -> Sample:
        """The part of a sample that holds what is said about its object."""
        first, end = self._first[index], self._first[index + 1]
        ids, mask = self.input_ids[first:end], self.attention_mask[first:end]
        if not self.averages:
            return {"input_ids": ids[0], "attention_mask": mask[0]}
        # Equally many rows in all samples, so that they stack; the rest is not used.
        unused = (0, 0, 0, self._most - len(ids))
        return {
            "input_ids": pad(ids, unused),
            "attention_mask": pad(mask, unused),
            "expressions": len(ids),
        }

    def picture(self, index: int) -> Image.Image:
        """The sample's picture at its own size, RGB.

        Raises:
            InputError: missing or damaged.
        """
        return self.refer.open_image(self.records[index].image_id)

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """(H, W) bool, the sample's object at the annotated size.

        Raises:
            InputError: the annotation has no polygons, or damaged ones.
        """
        covered = self.refer.getMask(self.refer.Refs[self.records[index].ref_id])["mask"]
        return covered > 0 if self.union_masks else covered == 1

    def name_samples(self, indices: Iterable[int]) -> list[str]:
        """Samples in words, for messages: reference, picture and sentence."""
        chosen = [self.records[i] for i in indices]
        return [f"ref {r.ref_id} ({r.file_name}) {r.sentence[:60]!r}" for r in chosen]

    def check_images(self) -> None:
        """Look for every picture of the split, without opening any.

        Raises:
            InputError: some are missing; says how many and where the first was looked for.
        """
        paths = [self.refer.image_path(image_id) for image_id in self._samples_of_image]
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
        image = self.refer.Imgs[record.image_id]
        category = self.refer.Refs[record.ref_id]["category_id"]
        alike = [
            ann
            for ann in self.refer.imgToAnns.get(record.image_id, [])
            if ann.get("category_id") == category and ann["id"] != record.ann_id
        ]
        return {
            "split": self.split,
            "ref_id": record.ref_id,
            "ann_id": record.ann_id,
            "image_id": record.image_id,
            "category_id": category,
            "sent_ids": list(record.sent_ids),
            "sentence": record.sentence,
            "category": self.refer.Cats.get(category, ""),
            "file_name": record.file_name,
            "height": image["height"],
            "width": image["width"],
            "same_category": len(alike),
        }

    def other_object(self, index: int) -> int | None:
        """A sample about another object of the same picture, always the same one.

        Args:
            index: of a sample.

        Returns:
            Index of the other sample; None where the split refers to no other object there.
        """
        record = self.records[index]
        others = [
            i
            for i in self._samples_of_image[record.image_id]
            if self.records[i].ann_id != record.ann_id
        ]
        return others[index % len(others)] if others else None


class OtherObjectSentences(Dataset[Sample]):
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

    def __getitem__(self, index: int) -> Sample:
        return {**self.dataset[index], **self.dataset.text(self._other[index])}


def _records(refer: REFER, ref: Ref, eval_mode: str, text: str) -> list[Record]:
    """The samples that a reference gives."""
    ids = [sentence["sent_id"] for sentence in ref["sentences"]]
    texts = [sentence[text] for sentence in ref["sentences"]]
    if not ids:
        groups = []
    elif eval_mode == "each":
        groups = [((i,), (t,)) for i, t in zip(ids, texts, strict=True)]
    else:
        groups = [(tuple(ids), (" ".join(texts),) if eval_mode == "cat" else tuple(texts))]
    image = refer.Imgs[ref["image_id"]]
    return [
        Record(ref["ref_id"], ref["ann_id"], ref["image_id"], *group, image["file_name"])
        for group in groups
    ]
