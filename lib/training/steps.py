"""Training steps over a loader's batches: forward, backward, update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import utils
from data.loaders import Batch, prepare_batch
from lib.runtime import autocast

if TYPE_CHECKING:
    from lib.training.maskris import MaskRIS

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Step(NamedTuple):
    """The numbers of one training step; tensors stay on the device until they are read.

    Attributes:
        loss: scalar, the sum of ``losses``.
        losses: scalars by name, each the mean over the step's batches.
        lr: learning rate of the first group.
        grad_norm: scalar, L2 norm of all gradients, before clipping.
        finite: scalar bool; False if the loss of any rank or, without a scaler, the gradient norm
            is not finite. The weights are then unchanged. (A scaler skips steps whose gradients
            overflow, too; these count as finite.)
        indices: dataset indices of the step's samples on this rank.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    lr: float
    grad_norm: Tensor
    finite: Tensor
    indices: list[int]


@dataclass(frozen=True)
class StepOptions:
    """How a training step is made; the defaults are those of the published recipe.

    Attributes:
        amp: see :func:`lib.runtime.autocast`.
        accumulate: number of batches whose gradients are averaged into one step.
        clip_grad: upper limit of the L2 norm of all gradients together; 0 does not clip.
        restore_buffers: undo the change of batch norm statistics if a step is not finite.
        maskris: two passes over each batch; needs its objective.
    """

    amp: str = "off"
    accumulate: int = 1
    clip_grad: float = 0.0
    restore_buffers: bool = False
    maskris: MaskRIS | None = None


def train_steps(
    objective: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.AdamW,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
    options: StepOptions = StepOptions(),
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[Step]:
    """Train over a loader once and yield after each step.

    If the loss of any rank or the gradient norm is not finite, the weights and the optimizer
    stay as they are.

    Args:
        objective: maps a batch to named losses: :class:`lib.model.Objective`, bare or in DDP.
        loader: batches of :class:`data.dataset_refer_bert.ReferDataset`.
        optimizer: fused AdamW, which skips a step on the device itself.
        scheduler: stepped after every iteration.
        device: where the model is.
        options: how a step is made.
        scaler: of the loss, for float16.
    """
    objective.train()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norms = [m for m in objective.modules() if isinstance(m, BATCH_NORMS)]
    buffers = [b for m in norms for b in m.buffers()]
    iterator = iter(loader)
    while batches := list(islice(iterator, options.accumulate)):
        before = [b.clone() for b in buffers] if options.restore_buffers else []
        optimizer.zero_grad(set_to_none=True)
        losses = _backward(objective, batches, device, options, scaler)
        loss = total_loss(losses)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if options.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, options.clip_grad, norm)
        finite = utils.all_true(loss.isfinite())
        if not scaler.is_enabled():  # with a scaler, an overflow of the gradients is expected
            finite = finite & norm.isfinite()
        lr = optimizer.param_groups[0]["lr"]
        _update(optimizer, scaler, finite)
        for buffer, old in zip(buffers, before, strict=False):
            buffer.copy_(torch.where(finite, buffer, old))
        scheduler.step()
        indices = [i for batch in batches for i in batch["index"].tolist()]
        yield Step(loss, losses, lr, norm, finite, indices)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The loss that is minimised: the sum of all named losses."""
    first, *others = losses.values()
    return sum(others, start=first)


def _backward(
    objective: nn.Module,
    batches: list[Batch],
    device: torch.device,
    options: StepOptions,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """Compute the gradients of the mean loss of some batches; return the mean losses, detached."""
    collected: dict[str, list[Tensor]] = {}
    run = options.maskris.passes if options.maskris else lambda module, batch: [module(batch)]
    passes = chain.from_iterable(run(objective, prepare_batch(b, device)) for b in batches)
    number = len(batches) * (2 if options.maskris else 1)
    for i in range(number):
        # DDP averages gradients over the ranks in a backward pass: only the last one needs to.
        last = i + 1 == number
        with nullcontext() if last else getattr(objective, "no_sync", nullcontext)():
            with autocast(device, options.amp):
                losses = next(passes)
            scaler.scale(total_loss(losses) / len(batches)).backward()
        for name, loss in losses.items():
            collected.setdefault(name, []).append(loss.detach())
    return {k: torch.stack(v).mean() if v[1:] else v[0] for k, v in collected.items()}


def _update(optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Step the optimizer, unless the gradients are not finite; never waits for the GPU."""
    if scaler.is_enabled():
        scaler.step(optimizer)  # looks for infinite gradients itself
        scaler.update()
        return
    # Fused AdamW reads this attribute on the device and skips the step where it is 1.
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
