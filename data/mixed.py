"""Several datasets in one training run, without the images that any of them is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from bert.tokenizer import Tokenizer
from data.dataset_refer_bert import ReferDataset, Sample, merge
from lib.errors import InputError
from refer.arrays import Ints
from refer.refer import REFER, in_split

TRAIN = "train"


class MixedDataset(Dataset[Sample]):
    """The training samples of several datasets, one dataset after the other.

    Args:
        parts: train splits.

    Attributes:
        training_samples: as :attr:`ReferDataset.training_samples`, less those whose image is in
            another split of any of the datasets.
        no_target: (N,) bool, as that of :class:`ReferDataset`.
        counts: ``before`` and ``after`` that, each with the number of references, expressions and
            images.

    Raises:
        InputError: no reference is left.
    """

    def __init__(self, parts: Sequence[ReferDataset]) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.no_target: npt.NDArray[np.bool_] = np.concatenate([p.no_target for p in parts])
        held_out = _held_out([part.refer for part in parts])
        self._kept = [~np.isin(p.image_ids, held_out[p.refer.image_source]) for p in parts]
        self.training_samples: list[range] = []
        for start, part, kept in zip(self._starts[:-1].tolist(), parts, self._kept, strict=True):
            self.training_samples += [
                range(start + samples.start, start + samples.stop)
                for samples in part.training_samples
                if kept[samples.start]
            ]
        every = [np.ones_like(kept) for kept in self._kept]
        self.counts = {"before": self._count(every), "after": self._count(self._kept)}
        if not self.training_samples:
            raise InputError(
                "no reference is left to train on: each image of the train splits is in another "
                "split of these datasets"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        part, inner = self.place(index)
        sample: Sample = {**part[inner], "index": index}
        return sample

    @property
    def seen_images(self) -> dict[str, Tensor]:
        """Ids of the images that training draws from, see :class:`ReferDataset`."""
        pairs = zip(self.parts, self._kept, strict=True)
        return merge(*(part.images_of(kept) for part, kept in pairs))

    def __repr__(self) -> str:
        return ", ".join(repr(part) for part in self.parts)

    def check_images(self) -> None:
        """Check that every image of the parts exists.

        Raises:
            InputError: some are missing.
        """
        for part in self.parts:
            part.check_images()

    def name_samples(self, indices: Iterable[int]) -> list[str]:
        """Samples in words, for messages."""
        places = map(self.place, indices)
        return [f"{part.refer!r} {part.name_samples([inner])[0]}" for part, inner in places]

    def place(self, index: int) -> tuple[ReferDataset, int]:
        """The part that a sample is of, and its index there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def _count(self, kept: Sequence[npt.NDArray[np.bool_]]) -> dict[str, int]:
        pairs = list(zip(self.parts, kept, strict=True))
        images = merge(*(part.images_of(rows) for part, rows in pairs))
        references = [rows[[s.start for s in part.samples_of_ref]].sum() for part, rows in pairs]
        return {
            "references": int(sum(references)),
            "expressions": int(sum(rows.sum() for rows in kept)),
            "images": sum(map(len, images.values())),
        }


def _held_out(refers: Sequence[REFER]) -> dict[str, Ints]:
    """Ids of the images of all splits that are not for training, by their source."""
    found: dict[str, list[Ints]] = {refer.image_source: [] for refer in refers}
    for refer in refers:
        arrays = refer.arrays
        other = np.array([not in_split(label, TRAIN) for label in arrays.split], bool)
        found[refer.image_source].append(arrays.image_id[other])
    return {source: np.unique(np.concatenate(ids)) for source, ids in found.items()}


def open_mixed(
    pairs: Sequence[tuple[str, str]],
    refer_options: Mapping[str, Any],
    tokenizer: Tokenizer,
    options: Mapping[str, Any],
) -> MixedDataset:
    """The training samples of several datasets.

    Args:
        pairs: (dataset, splitBy) of each.
        refer_options: the other keywords of :class:`refer.refer.REFER`.
        tokenizer, options: of :class:`ReferDataset`.

    Raises:
        InputError: data are missing or damaged.
    """
    refers = [REFER(**{**refer_options, "dataset": name, "splitBy": by}) for name, by in pairs]
    return MixedDataset([ReferDataset(refer, TRAIN, tokenizer, **options) for refer in refers])
