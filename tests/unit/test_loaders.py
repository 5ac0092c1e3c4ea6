"""Batches: which samples, in which order, on which process."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bert import encode, load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import (
    RandomExpressionSampler,
    ShardedBatches,
    build_loader,
    one_expression_per_reference,
    prepare_batch,
)
from data.transforms import as_tensor, normalize, resize_image
from lib.errors import InputError
from refer import REFER
from tests.refer_files import TINY_BERT, write_root

OBJECTS = [list(range(10 * i, 10 * i + 1 + i % 4)) for i in range(23)]


def epoch_of(world: int, batch_size: int, seed: int = 3, epoch: int = 0) -> list[list[list[int]]]:
    """Each rank's batches."""
    ranks = []
    for rank in range(world):
        sampler = RandomExpressionSampler(OBJECTS, batch_size, seed, rank, world)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_one_expression_an_object(world: int, batch_size: int) -> None:
    ranks = epoch_of(world, batch_size)
    drawn = [sample for batches in ranks for batch in batches for sample in batch]
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    assert {len(batches) for batches in ranks} == {len(OBJECTS) // world // batch_size}
    assert max(Counter(sample // 10 for sample in drawn).values()) == 1
    assert all(sample in OBJECTS[sample // 10] for sample in drawn)


def test_processes_share_one_drawing() -> None:
    """Joint batches are those of one process with the joint batch size."""
    alone = epoch_of(1, 6)[0]
    first, second, third = epoch_of(3, 2)
    assert [a + b + c for a, b, c in zip(first, second, third, strict=True)] == alone


def test_draws_depend_on_seed_and_epoch() -> None:
    assert epoch_of(1, 2) == epoch_of(1, 2)
    assert epoch_of(1, 2, epoch=1) != epoch_of(1, 2)
    assert epoch_of(1, 2, seed=4) != epoch_of(1, 2)


def test_every_expression_gets_its_turn() -> None:
    sampler = RandomExpressionSampler(OBJECTS, 1, 0)
    drawn: Counter[int] = Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        drawn.update(sample for batch in sampler for sample in batch)
    assert set(drawn) == {sample for samples in OBJECTS for sample in samples}
    of_four = [drawn[sample] for sample in OBJECTS[3]]
    assert min(of_four) > 60  # 100 expected


def test_resume_within_an_epoch() -> None:
    sampler = RandomExpressionSampler(OBJECTS, 3, 0)
    sampler.set_epoch(5)
    whole = list(sampler)
    sampler.set_epoch(5, skip=4)
    assert list(sampler) == whole[4:]
    assert len(sampler) == len(whole) - 4
    sampler.set_epoch(6)
    assert len(sampler) == len(whole)


def test_too_few_samples() -> None:
    with pytest.raises(InputError) as caught:
        RandomExpressionSampler(OBJECTS, 8, 0, 0, 3)
    message = "23 references to train on, 3 processes x --batch_size 8 needs 24; lower --batch_size"
    assert message in str(caught.value)
    with pytest.raises(InputError, match="0 references to train on, --batch_size 2 needs 2"):
        RandomExpressionSampler([], 2, 0)
    with pytest.raises(InputError, match="--batch_size must be at least 1, not 0"):
        RandomExpressionSampler(OBJECTS, 0, 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ShardedBatches([1], 1, 2, 2)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_drop_and_pad_nothing(world: int) -> None:
    indices = list(range(100, 123))
    alone = list(ShardedBatches(indices, 4))
    parts = [list(ShardedBatches(indices, 4, rank, world)) for rank in range(world)]
    assert [sum(map(len, part)) for part in parts] == [
        sum(map(len, alone[rank::world])) for rank in range(world)
    ]
    assert all(part == alone[rank::world] for rank, part in enumerate(parts))
    assert [i for batch in alone for i in batch] == indices
    assert len(ShardedBatches([], 4)) == 0


def test_one_expression_for_validation() -> None:
    drawn = one_expression_per_reference(OBJECTS, 0, 0)
    assert [sample // 10 for sample in drawn] == list(range(23))
    assert drawn == one_expression_per_reference(OBJECTS, 0, 0)
    assert drawn != one_expression_per_reference(OBJECTS, 0, 1)


@pytest.fixture
def dataset(tmp_path: Path) -> ReferDataset:
    refer = REFER(write_root(tmp_path), "refcoco", "unc")
    return ReferDataset(refer, "train", load_tokenizer(TINY_BERT), 16)


def test_batches_do_not_depend_on_workers(dataset: ReferDataset) -> None:
    loaders = [
        build_loader(dataset, RandomExpressionSampler(dataset.samples_of_ref, 2, 0), workers)
        for workers in (0, 1, 2)
    ]
    for _ in range(2):  # workers stay for the second epoch
        epochs = [list(loader) for loader in loaders]
        for batches in epochs[1:]:
            assert len(batches) == len(epochs[0]) == 1
            for key, value in epochs[0][0].items():
                assert torch.equal(batches[0][key], value)
    batch = epochs[0][0]
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["index"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_bytes_become_the_samples(dataset: ReferDataset, workers: int) -> None:
    """The second sample of an image is made from the same decoded image."""
    (batch,) = build_loader(dataset, ShardedBatches(range(4), 4), workers)
    assert batch["image"].dtype == batch["target"].dtype == torch.uint8
    moved = prepare_batch(batch, torch.device("cpu"))
    assert moved["image"].is_contiguous()
    assert moved["target"].dtype == torch.int64
    for i in range(4):
        image = as_tensor(resize_image(dataset.original_image(i), dataset.img_size))
        assert torch.equal(moved["image"][i], normalize(image))
        mask = Image.fromarray(dataset.mask(i).astype(np.uint8))
        target = mask.resize((dataset.img_size,) * 2, Image.Resampling.NEAREST)
        assert np.array_equal(moved["target"][i], np.asarray(target))
        assert torch.equal(moved["input_ids"][i], dataset.text(i)["input_ids"])


def test_samples_do_not_share_memory(dataset: ReferDataset) -> None:
    """One image and one object, decoded and drawn once."""
    expected = {k: v.clone() for k, v in dataset[0].items() if isinstance(v, torch.Tensor)}
    spoiled = dataset[1]
    spoiled["image"].fill_(1)
    spoiled["target"].fill_(1)
    for key in ("image", "target"):
        assert torch.equal(dataset[1][key], expected[key])


def test_data_sets_can_be_sent_to_spawned_workers(dataset: ReferDataset) -> None:
    sent = pickle.loads(pickle.dumps(dataset))
    for i in range(len(dataset)):
        for key, value in dataset[i].items():
            assert torch.equal(torch.as_tensor(sent[i][key]), torch.as_tensor(value))


def test_loading_leaves_the_random_state_alone(dataset: ReferDataset) -> None:
    loader = build_loader(dataset, ShardedBatches(range(4), 2), 1)
    before = torch.get_rng_state()
    assert len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_file_in_a_worker_is_one_line(dataset: ReferDataset) -> None:
    path = dataset.refer.image_path(101)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError) as caught:
        list(build_loader(dataset, ShardedBatches(range(4), 2), 1))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"image {path} cannot be read")


def test_forked_workers_are_silent(
    dataset: ReferDataset, capfd: pytest.CaptureFixture[str]
) -> None:
    """Older tokenizers print a warning in every process forked after they used threads."""
    encode(load_tokenizer(TINY_BERT), ["left square"] * 1000)
    assert len(list(build_loader(dataset, ShardedBatches(range(4), 2), 2))) == 2
    assert capfd.readouterr() == ("", "")
