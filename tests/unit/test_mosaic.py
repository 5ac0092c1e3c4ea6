"""Mosaics: what is in their cells, and how they are drawn."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import RandomExpressionSampler, build_loader
from data.mixed import MixedDataset
from data.mosaic import Mosaic, MosaicDataset, MosaicSampler, agreeing
from lib.errors import InputError
from refer import REFER
from tests.scripts import Shapes

SIZE = 48


@pytest.fixture(scope="module")
def train_set(shapes: Shapes) -> ReferDataset:
    refer = REFER(str(shapes.root), "refcoco", "unc")
    return ReferDataset(refer, "train", load_tokenizer(shapes.root / "bert"), SIZE)


def sampler_of(
    dataset: ReferDataset | MixedDataset, p: float = 1.0, directions: bool = False, **options: int
) -> MosaicSampler:
    batches = RandomExpressionSampler(dataset.training_samples, 4, 7, **options)
    return MosaicSampler(batches, dataset, p, directions)


def test_pixels_of_a_mosaic(train_set: ReferDataset) -> None:
    """Each image is resized to half; the mask is in its cell, and nowhere else."""
    item = next(iter(sampler_of(train_set)))[0]
    assert isinstance(item, Mosaic)
    sample = MosaicDataset(train_set)[item]
    shown = list(item.others)
    shown.insert(item.cell, item.index)
    assert len({int(train_set.image_ids[i]) for i in shown}) == 4
    half = SIZE // 2
    for cell, index in enumerate(shown):
        y, x = half * (cell // 2), half * (cell % 2)
        image = train_set.original_image(index).resize((half, half), Image.Resampling.BILINEAR)
        window = sample["image"][:, y : y + half, x : x + half].permute(1, 2, 0)
        assert np.array_equal(window.numpy(), np.asarray(image))
        target = sample["target"][y : y + half, x : x + half].numpy()
        if index == item.index:
            mask = Image.fromarray(train_set.mask(index).astype(np.uint8))
            resized = mask.resize((half, half), Image.Resampling.NEAREST)
            assert np.array_equal(target, np.asarray(resized))
            assert target.any()
        else:
            assert not target.any()
    plain = train_set[item.index]
    assert torch.equal(sample["input_ids"], plain["input_ids"])
    assert torch.equal(sample["attention_mask"], plain["attention_mask"])
    assert sample["index"] == item.index
    for key in ("image", "target"):
        assert sample[key].shape == plain[key].shape  # type: ignore[literal-required]
        assert sample[key].dtype == plain[key].dtype  # type: ignore[literal-required]


def test_samples_that_are_no_mosaic_are_the_datasets(train_set: ReferDataset) -> None:
    sampler = sampler_of(train_set, 0.5)
    plain = list(sampler.sampler)
    drawn = list(sampler)
    items = [item for batch in drawn for item in batch]
    assert 0 < sum(isinstance(item, Mosaic) for item in items) < len(items)
    indices = [[i.index if isinstance(i, Mosaic) else i for i in batch] for batch in drawn]
    assert indices == plain
    index = next(i for i in items if not isinstance(i, Mosaic))
    assert torch.equal(MosaicDataset(train_set)[index]["image"], train_set[index]["image"])


def test_draws_depend_on_seed_epoch_and_sample_alone(train_set: ReferDataset) -> None:
    """So neither on the processes, nor on interruptions or workers."""
    whole = list(sampler_of(train_set))
    later = sampler_of(train_set)
    later.set_epoch(0, skip=2)
    assert len(later) == len(whole) - 2
    assert list(later) == whole[2:]
    other = sampler_of(train_set)
    other.set_epoch(1)
    everything = {item for batch in whole for item in batch}
    assert not everything & {item for batch in other for item in batch}
    ranks = [list(sampler_of(train_set, rank=rank, world=2)) for rank in range(2)]
    assert {item for rank in ranks for batch in rank for item in batch} <= everything
    for workers in (0, 2):
        sampler = sampler_of(train_set)
        loader = build_loader(MosaicDataset(train_set), sampler, workers)
        batch = next(iter(loader))
        assert torch.equal(batch["image"][0], MosaicDataset(train_set)[whole[0][0]]["image"])
        assert batch["image"].shape == (4, 3, SIZE, SIZE)


def test_cells_and_other_images_are_uniform(train_set: ReferDataset) -> None:
    sampler = sampler_of(train_set)
    cells: Counter[int] = Counter()
    others: Counter[int] = Counter()
    for epoch in range(500):
        sampler.set_epoch(epoch)
        item = sampler.draw(0)
        assert isinstance(item, Mosaic)
        cells[item.cell] += 1
        others.update(int(train_set.image_ids[i]) for i in item.others)
    assert [cells[c] for c in range(4)] == pytest.approx([125] * 4, abs=45)
    images = set(train_set.image_ids.tolist()) - {int(train_set.image_ids[0])}
    assert others.keys() == images
    expected = 1500 / len(images)
    assert list(others.values()) == pytest.approx([expected] * len(images), rel=0.3)


@pytest.mark.parametrize(
    ("expression", "cells"),
    [
        ("the red circle", (0, 1, 2, 3)),
        ("Left circle", (0, 2)),
        ("circle on the right", (1, 3)),
        ("topmost one", (0, 1)),
        ("bottom LEFT", (2,)),
        ("top right corner", (1,)),
        ("left of the right one", (0, 1, 2, 3)),
        ("left of the right one at the bottom", (2, 3)),
        ("the leftover on a desktop, copyright", (0, 1, 2, 3)),
    ],
)
def test_cells_that_agree_with_an_expression(expression: str, cells: tuple[int, ...]) -> None:
    assert agreeing(expression) == cells


def test_directions_are_kept(train_set: ReferDataset) -> None:
    records = train_set.records
    named = [i for i, r in enumerate(records) if len(agreeing(r.expression)) < 4]
    assert named
    sampler, free = sampler_of(train_set, directions=True), sampler_of(train_set)
    left = 0
    for epoch in range(12):
        for s in (sampler, free):
            s.set_epoch(epoch)
        for index in named:
            item, loose = sampler.draw(index), free.draw(index)
            assert isinstance(item, Mosaic)
            assert isinstance(loose, Mosaic)
            allowed = agreeing(records[index].expression)
            assert item.cell in allowed
            left += loose.cell not in allowed
    assert left  # without the flag, any cell


def test_images_that_are_not_trained_on_are_in_no_mosaic(shapes: Shapes, tmp_path: Path) -> None:
    """Of several datasets, those without the images of other splits."""
    root = tmp_path / "data"
    shutil.copytree(shapes.root, root)
    shutil.copytree(root / "refcoco", root / "refcoco+", dirs_exist_ok=True)
    path = root / "refcoco+/refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    held_out = min(ref["image_id"] for ref in refs if ref["split"] == "train")
    for ref in refs:
        ref["split"] = "val" if ref["image_id"] == held_out else ref["split"]
    path.write_bytes(pickle.dumps(refs))
    tokenizer = load_tokenizer(root / "bert")
    parts = [
        ReferDataset(REFER(str(root), name, "unc"), "train", tokenizer, SIZE)
        for name in ("refcoco", "refcoco+")
    ]
    mixed = MixedDataset(parts)
    sampler = sampler_of(mixed)
    shown: set[int] = set()
    for batch in sampler:
        for item in batch:
            assert isinstance(item, Mosaic)
            ids = []
            for index in (item.index, *item.others):
                part, inner = mixed.place(index)
                ids.append(int(part.image_ids[inner]))
            assert len(set(ids)) == 4  # though both datasets have each image
            shown.update(ids)
    assert held_out in parts[0].image_ids
    assert held_out not in shown
    item = next(iter(sampler))[0]
    assert MosaicDataset(mixed)[item]["index"] == item.index  # type: ignore[union-attr]


def test_a_sample_without_target_stays_as_it_is(
    train_set: ReferDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = train_set.no_target.copy()
    none[3] = True
    monkeypatch.setattr(train_set, "no_target", none)
    sampler = sampler_of(train_set)
    assert sampler.draw(3) == 3
    assert isinstance(sampler.draw(2), Mosaic)


def test_what_cannot_be_a_mosaic(train_set: ReferDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_set, "img_size", 57)
        with pytest.raises(InputError, match="--mosaic: --img_size 57 must be even"):
            sampler_of(train_set)
    monkeypatch.setattr(train_set, "image_ids", train_set.image_ids % 3)
    with pytest.raises(InputError, match="--mosaic needs 4 training images, there are 3"):
        sampler_of(train_set)
