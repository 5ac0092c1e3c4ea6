"""Samplers, which make batches of sample indices, and the loader of the batches.

Every draw is made in the main process from a generator seeded by (seed, epoch), so the samples
depend neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data.transforms import normalize
from lib.errors import InputError

Batch = dict[str, Any]  # tensors; the run lengths of ground truth masks are strings

GRACE = 30  # seconds that a worker stays for its main process to finish and save


class RandomExpressionSampler(Sampler[list[int]]):
    """One random expression of each reference per epoch, in random order, in full batches.

    All ranks draw the same order; rank r takes the r-th part of each global batch.
    References that do not fill a last global batch are dropped in that epoch.

    Args:
        samples_of_ref: sample indices of each reference, none empty.
        batch_size: of one process.
        seed: of the run.
        rank: of this process.
        world: number of processes.
        accumulate: the number of batches is a multiple of this, the batches of a step.
        reorder: changes the order of the drawn samples, in the same way on all ranks.

    Raises:
        InputError: too few references for one step.
    """

    def __init__(
        self,
        samples_of_ref: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        reorder: Callable[[list[int]], list[int]] = list,
    ) -> None:
        _check_ranks(batch_size, rank, world)
        self.samples_of_ref = samples_of_ref
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.reorder = reorder
        self.epoch = 0
        self.skip = 0
        step = world * batch_size * accumulate
        self.batches = len(samples_of_ref) // step * accumulate
        if not self.batches:
            processes = f"{world} processes x " if world > 1 else ""
            times = f" x --accumulate {accumulate}" if accumulate > 1 else ""
            raise InputError(
                f"too few samples for one batch: {len(samples_of_ref)} references to train on, "
                f"{processes}--batch_size {batch_size}{times} needs {step}; "
                f"lower --batch_size{' or use fewer processes' if world > 1 else ''}"
            )

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch, which seeds the order and the choice of expressions.

        Args:
            epoch: counted from 0.
            skip: number of batches already trained on in a resumed epoch.
        """
        self.epoch = epoch
        self.skip = skip

    def __len__(self) -> int:
        return self.batches - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        seed = [self.seed, self.epoch]
        drawn = self.reorder(draw_expressions(self.samples_of_ref, seed, shuffle=True))
        for batch in range(self.skip, self.batches):
            start = (batch * self.world + self.rank) * self.batch_size
            yield drawn[start : start + self.batch_size]


class ShardedBatches(Sampler[list[int]]):
    """Cuts a list of samples into batches and takes every world-th of them.

    Nothing is padded or dropped, and the batches do not depend on the number of processes.

    Args:
        indices: of the samples, in order.
        batch_size: of one process.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self, indices: Iterable[int], batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        _check_ranks(batch_size, rank, world)
        indices = list(indices)
        starts = range(rank * batch_size, len(indices), world * batch_size)
        self.batches = [indices[start : start + batch_size] for start in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def draw_expressions(
    samples_of_ref: Sequence[Sequence[int]], seed: Sequence[int], *, shuffle: bool
) -> list[int]:
    """Draw one sample of each reference.

    Args:
        samples_of_ref: sample indices of each reference, none empty.
        seed: of the generator.
        shuffle: whether the references come in random order too.

    Returns:
        One sample index per reference.
    """
    rng = np.random.default_rng(list(seed))
    number = len(samples_of_ref)
    order = rng.permutation(number) if shuffle else np.arange(number)
    counts = np.array([len(samples) for samples in samples_of_ref], np.int64)
    choice = rng.integers(0, counts)
    return [samples_of_ref[i][choice[i]] for i in order]


def one_expression_per_reference(
    samples_of_ref: Sequence[Sequence[int]], seed: int, epoch: int
) -> list[int]:
    """One random expression per reference, in order: how the release validates after an epoch."""
    return draw_expressions(samples_of_ref, [seed, epoch, 1], shuffle=False)


def build_loader(
    dataset: Dataset[Any],
    batch_sampler: Sampler[Any],
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of the sampler's batches: dicts of stacked tensors.

    Args:
        dataset: of samples as dicts.
        batch_sampler: yields lists of sample indices, or of what else the dataset takes.
        workers: processes that read and decode; 0 does it in this one.
        pin_memory: page-locked batches, for faster copies to a GPU.

    Returns:
        The loader. Workers stay from epoch to epoch.
    """
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=workers > 0,
        collate_fn=collate,
        worker_init_fn=_ignore_signals,
        # Starting an epoch draws a seed for the workers. Without a generator of its own the
        # loader would draw it from the model's, and shift the dropout of a resumed run.
        generator=torch.Generator(),
    )


def collate(samples: list[Any]) -> Any:
    """Stack samples; images stay channels-last in memory, which a device converts faster."""
    if not isinstance(samples[0], dict) or "image" not in samples[0]:
        return default_collate(samples)
    rows = [sample | {"image": sample["image"].permute(1, 2, 0)} for sample in samples]
    batch = default_collate(rows)
    return batch | {"image": batch["image"].permute(0, 3, 1, 2)}


def prepare_batch(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device and normalise its images there: bytes are faster to move.

    Returns:
        {image: (B, 3, S, S) float32, normalised; target: (B, S, S) int64; input_ids and
        attention_mask: (B, N_l) int64, with eval_mode 'mean' (B, K, N_l); index: (B,)}, and what
        else the batch has.
    """
    moved = {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }
    moved["image"] = normalize(moved["image"])
    target = moved.get("target")
    if target is not None and target.dtype == torch.uint8:
        moved["target"] = target.long()
    return moved


def _ignore_signals(worker: int) -> None:
    """Leave signals sent to the whole job to the main process, which needs its workers."""
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        # The main process ends its workers; SIGTERM is for the case that it cannot.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def _check_ranks(batch_size: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} processes")
