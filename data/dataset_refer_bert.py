"""Referring expressions as tensors for a BERT-based network."""

from __future__ import annotations

import json
import os.path
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bert.tokenizer import Tokenizer, encode
from data.transforms import Preprocess
from lib.errors import InputError
from refer.refer import REFER


class Sample(TypedDict):
    """One sentence about one object; a loader stacks them along a batch axis B."""

    image: Tensor  # (3, S, S) uint8
    target: Tensor  # (S, S) int64 in {0, 1}
    input_ids: Tensor  # (N_l,) int64
    attention_mask: Tensor  # (N_l,) int64, 1 = real token
    index: int  # of the sample in the data set


@dataclass(frozen=True)
class Record:
    """What a sample is about, for reports."""

    ref_id: int
    sent_id: int
    ann_id: int
    image_id: int
    sentence: str
    file_name: str


class ReferDataset(Dataset[Sample]):
    """Every sentence of every object of a split, in the order of the references.

    A sample depends on its index alone: which of an object's sentences is trained on is the
    sampler's business, so neither worker counts nor resuming can change a draw.

    Args:
        refer: the references.
        split: train, val, test, testA, testB.
        tokenizer: from `bert.load_tokenizer`.
        img_size: side of the square pictures and masks, pixels.
        max_tokens: N_l.
        union_masks: whether pixels covered by several components of an object belong to it.
            The published numbers count them as background.

    Attributes:
        records: what each sample is about.
        samples_of_ref: sample indices of each reference; one without sentences is left out.

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
    ) -> None:
        self.refer = refer
        self.split = split
        self.preprocess = Preprocess(img_size)
        self.union_masks = union_masks
        self.records: list[Record] = []
        self.samples_of_ref: list[list[int]] = []
        for ref in refer.loadRefs(refer.getRefIds(split=split)):
            first = len(self.records)
            file_name = refer.Imgs[ref["image_id"]]["file_name"]
            self.records += [
                Record(
                    ref["ref_id"],
                    sentence["sent_id"],
                    ref["ann_id"],
                    ref["image_id"],
                    sentence["raw"],  # not 'sent': the release feeds raw text
                    file_name,
                )
                for sentence in ref["sentences"]
            ]
            if len(self.records) > first:
                self.samples_of_ref.append(list(range(first, len(self.records))))
        sentences = [record.sentence for record in self.records]
        self.input_ids, self.attention_mask = encode(tokenizer, sentences, max_tokens)
        self._samples_of_image: dict[int, list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            self._samples_of_image[record.image_id].append(i)

    def __repr__(self) -> str:
        return f"{self.refer!r} {self.split}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        image, target = self.preprocess(self.picture(index), self.mask(index))
        return {
            "image": image,
            "target": target,
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "index": index,
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
        other = self._other[index]
        return {
            **self.dataset[index],
            "input_ids": self.dataset.input_ids[other],
            "attention_mask": self.dataset.attention_mask[other],
        }
