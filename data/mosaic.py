"""Mosaics: four images in one, an expression about one of them; loaded with --mosaic only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.dataset_refer_bert import ReferDataset, Sample
from data.loaders import RandomExpressionSampler
from data.mixed import MixedDataset
from data.transforms import as_tensor, resize_image, resize_mask
from lib.errors import InputError

CELLS: tuple[int, ...] = (0, 1, 2, 3)  # top left, top right, bottom left, bottom right
IN_DIRECTION = {"left": (0, 2), "right": (1, 3), "top": (0, 1), "bottom": (2, 3)}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
DIRECTION = re.compile(r"\b(left|right|top|bottom)(?:most)?\b", re.IGNORECASE)
SEED = 2  # tells these draws from others of the same seed and epoch


@dataclass(frozen=True)
class Mosaic:
    """A sample to be shown in a mosaic."""

    index: int  # of the sample whose expression and mask it has
    cell: int  # that has its image, one of CELLS
    others: tuple[int, int, int]  # samples whose images are in the other cells, in their order


class MosaicSampler(Sampler[list[int | Mosaic]]):
    """Batches in which some samples are mosaics.

    Whether a sample is one, its cell and the other images depend on (seed, epoch, index) alone, and
    are drawn in the main process. The other images are drawn uniformly among those that are trained
    on. A sample without target stays as it is: another image could have what it refers to.

    Args:
        sampler: of the batches.
        dataset: of the samples.
        probability: of a mosaic.
        directions: the cell agrees with "left", "right", "top" and "bottom" in the expression.

    Raises:
        InputError: there are fewer than four images, or they cannot be halved.
    """

    def __init__(
        self,
        sampler: RandomExpressionSampler,
        dataset: ReferDataset | MixedDataset,
        probability: float,
        directions: bool = False,
    ) -> None:
        self.sampler, self.dataset = sampler, dataset
        self.probability, self.directions = probability, directions
        parts = [dataset] if isinstance(dataset, ReferDataset) else dataset.parts
        if parts[0].img_size % 2:
            raise InputError(f"--mosaic: --img_size {parts[0].img_size} must be even")
        names = {name: i for i, name in enumerate({p.refer.image_source: 0 for p in parts})}
        source = np.concatenate([np.full(len(p), names[p.refer.image_source]) for p in parts])
        keys = np.stack([source, np.concatenate([p.image_ids for p in parts])])
        # The place of each sample's image among all images, and whether it is trained on.
        images, self._image = np.unique(keys, axis=1, return_inverse=True)
        first = np.full(images.shape[1], -1)
        for samples in reversed(dataset.training_samples):
            first[self._image[samples.start]] = samples.start
        self._place = np.cumsum(first >= 0) - 1  # among those that are trained on
        self._first = first[first >= 0]  # a sample of each of them
        if len(self._first) < len(CELLS):
            raise InputError(f"--mosaic needs 4 training images, there are {len(self._first)}")

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """As of the sampler of the batches."""
        self.sampler.set_epoch(epoch, skip)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int | Mosaic]]:
        for batch in self.sampler:
            yield [self.draw(index) for index in batch]

    def draw(self, index: int) -> int | Mosaic:
        """A sample's index, or its mosaic in this epoch."""
        rng = np.random.default_rng([self.sampler.seed, self.sampler.epoch, index, SEED])
        if rng.random() >= self.probability or self.dataset.no_target[index]:
            return index
        cells = CELLS
        if self.directions:
            part, inner = place(self.dataset, index)
            cells = agreeing(part.records[inner].expression)
        cell = int(rng.choice(cells))
        drawn = rng.choice(len(self._first) - 1, len(CELLS) - 1, replace=False)
        own = self._place[self._image[index]]
        first, second, third = self._first[drawn + (drawn >= own)].tolist()
        return Mosaic(index, cell, (first, second, third))


def agreeing(expression: str) -> tuple[int, ...]:
    """The cells that agree with the directions in an expression; opposite ones do not count."""
    named = {word.lower() for word in DIRECTION.findall(expression)}
    cells = CELLS
    for word in named:
        if OPPOSITE[word] not in named:
            cells = tuple(cell for cell in cells if cell in IN_DIRECTION[word])
    return cells


class MosaicDataset(Dataset[Sample]):
    """Samples of a dataset, and their mosaics, by what :class:`MosaicSampler` yields.

    Args:
        dataset: of the samples.
    """

    def __init__(self, dataset: ReferDataset | MixedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | Mosaic) -> Sample:
        if not isinstance(item, Mosaic):
            return self.dataset[item]
        part, inner = place(self.dataset, item.index)
        half = part.img_size // 2
        image = torch.empty(2 * half, 2 * half, 3, dtype=torch.uint8).permute(2, 0, 1)
        target = torch.zeros(2 * half, 2 * half, dtype=torch.uint8)
        others = iter(item.others)
        for cell in CELLS:
            shown = item.index if cell == item.cell else next(others)
            window(image, cell).copy_(self._small(shown, half))
        window(target, item.cell).copy_(resize_mask(part.mask(inner), half))
        return {"image": image, "target": target, **part.text(inner), "index": item.index}

    def _small(self, index: int, size: int) -> Tensor:
        part, inner = place(self.dataset, index)
        return as_tensor(resize_image(part.original_image(inner), size))

    @property
    def seen_images(self) -> dict[str, Tensor]:
        """As of the dataset; mosaics have no other images."""
        return self.dataset.seen_images

    def name_samples(self, indices: Iterable[int]) -> list[str]:
        """As of the dataset."""
        return self.dataset.name_samples(indices)


def window(whole: Tensor, cell: int) -> Tensor:
    """The part of (..., 2 s, 2 s) that is a cell, (..., s, s)."""
    half = whole.shape[-1] // 2
    row, column = divmod(cell, 2)
    return whole[..., row * half : (row + 1) * half, column * half : (column + 1) * half]


def place(dataset: ReferDataset | MixedDataset, index: int) -> tuple[ReferDataset, int]:
    """The dataset that a sample is of, and its index there."""
    return (dataset, index) if isinstance(dataset, ReferDataset) else dataset.place(index)
