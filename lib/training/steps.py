"""Training steps over a loader's batches. No distributed code here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.loaders import Batch, to_device
from lib.runtime import autocast


class Step(NamedTuple):
    """What happened in a training step; tensors stay on the device until somebody reads them.

    Attributes:
        loss: scalar, the mean over the step's batches.
        lr: learning rate of the first group.
        grad_norm: scalar, L2 norm of all gradients, before clipping.
        finite: scalar bool; where False, the weights were left as they were.
        indices: the step's samples in the data set, of this process.
    """

    loss: Tensor
    lr: float
    grad_norm: Tensor
    finite: Tensor
    indices: list[int]


@dataclass(frozen=True)
class StepOptions:
    """How a training step is made; the defaults are the published recipe's.

    Attributes:
        amp: see :func:`autocast`.
        accumulate: batches whose gradients are averaged into one step.
        clip_grad: largest L2 norm of all gradients together; 0 does not clip.
        spare_buffers: a step that is not finite leaves the batch norm statistics alone, too.
    """

    amp: str = "off"
    accumulate: int = 1
    clip_grad: float = 0.0
    spare_buffers: bool = False


def train_steps(
    objective: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
    options: StepOptions = StepOptions(),
    scaler: torch.amp.GradScaler | None = None,
    agree: Callable[[Tensor], Tensor] = lambda finite: finite,
) -> Iterator[Step]:
    """Train over a loader once, yielding after each step.

    A step whose loss or gradients are not finite does not touch weights and optimizer.

    Args:
        objective: maps a batch to named losses: :class:`lib.model.Objective`, in DDP or bare.
        loader: batches of :class:`data.dataset_refer_bert.ReferDataset`.
        optimizer, scheduler: the schedule is stepped after every iteration.
        device: where the model lives.
        options: how a step is made.
        scaler: of the loss, for float16.
        agree: whether all processes' losses were finite, from whether this one's was.
    """
    objective.train()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norms = [m for m in objective.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [b for m in norms for b in m.buffers()]
    for batches in _grouped(loader, options.accumulate):
        before = [b.clone() for b in buffers] if options.spare_buffers else []
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(objective, batches, device, options, scaler)
        scaler.unscale_(optimizer)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if options.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, options.clip_grad, norm)
        finite = agree(loss.isfinite())
        if not scaler.is_enabled():  # a scaler looks for overflows itself, which are no accident
            finite = finite & norm.isfinite()
        lr = optimizer.param_groups[0]["lr"]
        _update(optimizer, scaler, finite)
        for buffer, old in zip(buffers, before, strict=False):
            buffer.copy_(torch.where(finite, buffer, old))
        scheduler.step()
        yield Step(loss, lr, norm, finite, [i for b in batches for i in b["index"].tolist()])


def _grouped(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The loader's batches, so many at a time."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _backward(
    objective: nn.Module,
    batches: list[Batch],
    device: torch.device,
    options: StepOptions,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Gradients of the mean loss of some batches; returns that loss, (), detached."""
    losses = []
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)
        # DDP averages gradients over the processes in a backward pass: only the last need.
        alone = nullcontext() if last else getattr(objective, "no_sync", nullcontext)()
        with alone:
            with autocast(device, options.amp):
                loss = torch.stack(list(objective(to_device(batch, device)).values())).sum()
            scaler.scale(loss / len(batches)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """The optimizer's step, unless the gradients are not finite."""
    fused = finite.is_cuda and all(group.get("fused") for group in optimizer.param_groups)
    if fused and not scaler.is_enabled():
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read on the GPU
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif finite:  # on a GPU this waits for it
        scaler.step(optimizer)
    scaler.update()
