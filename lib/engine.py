"""The two loops: one epoch of training, one pass of evaluation. No distributed code here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.transforms import normalize
from lib.errors import InputError
from lib.metrics import Counts

Batch = dict[str, Tensor]
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16}
AMP = (*AMP_DTYPES, "auto")


class Step(NamedTuple):
    """What happened in a training step; ``loss`` stays on the device until somebody reads it."""

    loss: Tensor
    lr: float


def resolve_amp(amp: str, device: torch.device) -> str:
    """'auto' becomes 'bf16' where the hardware multiplies in bfloat16, else 'off'."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    # Private to torch, so their absence must do no harm: then it is merely slower.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bf16" if native else "off"


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision of a forward pass: one of :data:`AMP`; 'off' is float32."""
    dtype = AMP_DTYPES[resolve_amp(amp, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch and normalise its picture there, which sends a quarter of the bytes."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    moved["image"] = normalize(moved["image"])
    return moved


def train_steps(
    objective: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
    amp: str = "off",
) -> Iterator[Step]:
    """Train over a loader once, yielding after each step.

    Args:
        objective: maps a batch to a scalar: :class:`lib.model.Objective`, in DDP or bare.
        loader: batches of :class:`data.dataset_refer_bert.ReferDataset`.
        optimizer, scheduler: the schedule is stepped after every iteration.
        device: where the model lives.
        amp: see :func:`autocast`.
    """
    objective.train()
    for batch in loader:
        batch = to_device(batch, device)
        with autocast(device, amp):
            loss = objective(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        yield Step(loss.detach(), lr)


def check_finite(loss: float, where: str) -> None:
    """Stop a run whose loss is no number any more.

    Raises:
        InputError: naming the step and the usual remedies.
    """
    if not math.isfinite(loss):
        raise InputError(f"the loss is {loss} at {where}: lower --lr, or check the data")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    size: int,
    device: torch.device,
    amp: str = "off",
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Counts:
    """Count intersections and unions at the size of the model's input (LAVT, Sec. 4.1).

    Args:
        model: unwrapped, so that no forward communicates and shards may differ in length.
        loader: this process' batches.
        size: number of samples of the whole data set.
        device: where the model lives.
        amp: see :func:`autocast`.
        progress: wraps the loader, to show how far it is.

    Returns:
        Counts of this process' samples.
    """
    model.eval()
    counts = Counts(size, device)
    for batch in progress(loader):
        batch = to_device(batch, device)
        with autocast(device, amp):
            logits = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        counts.add(batch["index"], logits.argmax(1), batch["target"])
    return counts
