"""Where a training run stands, and how a checkpoint keeps it, within an epoch too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError
from lib.model import Segmenter
from lib.training.steps import Step


@dataclass
class Run:
    """What a training run carries from step to step.

    Attributes:
        epoch: the last one finished, its validation included.
        step: steps done in the epoch after it.
        loss_sum, loss_count: of that epoch's losses that were logged.
        recent: its steps since the last log line.
        skipped: steps of the run that were not made, because their numbers were not finite.
    """

    model: Segmenter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    epoch: int = -1
    step: int = 0
    best_oIoU: float = -1.0
    loss_sum: float = 0.0
    loss_count: int = 0
    recent: list[Step] = field(default_factory=list)
    skipped: int = 0

    def content(self, arguments: dict[str, Any], progress: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint of this moment, in the published layout and with what is beyond it.

        Args:
            arguments: the run's: plain values, so that safe loading needs no allow-list.
            progress: of :meth:`progress`.
        """
        return {
            **self.model.to_published(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "best_oIoU": self.best_oIoU,
            "args": arguments,
            "progress": progress,
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def float_buffers(self) -> dict[str, Tensor]:
        """Batch norm statistics, which on the CPU are each process' own within an epoch."""
        return {n: b for n, b in self.model.named_buffers() if b.is_floating_point()}

    def share(self, rng: list[Tensor]) -> dict[str, Any]:
        """What of the state is this process' own.

        Args:
            rng: where its generators stand.
        """
        return {"rng": rng, "buffers": {n: b.cpu() for n, b in self.float_buffers().items()}}

    def progress(self, steps: int, shares: list[dict[str, Any]], world: int) -> dict[str, Any]:
        """Of a begun epoch: what a resumed run needs beside weights, optimizer and schedule.

        Args:
            steps: of an epoch.
            shares: of :meth:`share`, of every process; [] once the processes' buffers are one.
            world: number of processes.
        """
        return {
            "steps": steps,
            "world": world,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "skipped": self.skipped,
            "recent": [[s.loss.item(), s.lr, s.grad_norm.item()] for s in self.recent if s.finite],
            "shares": shares,
        }

    def restore(
        self, saved: dict[str, Any], steps: int, rank: int, world: int
    ) -> dict[str, Any] | None:
        """Go on within the epoch that a checkpoint's ``progress`` tells of.

        Args:
            saved: of :meth:`progress`; {} from a checkpoint without.
            steps: of an epoch of this run.
            rank, world: number of this process, and of all.

        Returns:
            This process' :meth:`share`, for :meth:`take`; None where all processes' are one.

        Raises:
            InputError: the epoch was divided among other processes or batches, or what was saved
                is damaged.
        """
        try:
            return self._restore(saved, steps, rank, world)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise InputError(f"--resume: its 'progress' is damaged ({reason}): get it again") from e

    def _restore(
        self, saved: dict[str, Any], steps: int, rank: int, world: int
    ) -> dict[str, Any] | None:
        self.skipped = saved.get("skipped", 0)
        if not saved.get("step"):
            return None
        if (saved["steps"], saved["world"]) != (steps, world):
            raise InputError(
                f"--resume: saved within an epoch of {saved['steps']} steps by {saved['world']} "
                f"processes, but this run has {steps} steps and {world} processes: "
                "give the same processes, --batch-size, --accumulate and data"
            )
        self.step = saved["step"]
        self.loss_sum, self.loss_count = saved["loss_sum"], saved["loss_count"]
        device = next(self.model.parameters()).device
        self.recent = [
            Step(torch.tensor(loss, device=device), lr, torch.tensor(norm), torch.tensor(True), [])
            for loss, lr, norm in saved["recent"]
        ]
        share = saved["shares"][rank] if saved["shares"] else None
        if share is not None:
            self._check_share(share)
        return share

    def _check_share(self, share: dict[str, Any]) -> None:
        for name, buffer in self.float_buffers().items():
            if share["buffers"][name].shape != buffer.shape:
                raise ValueError(f"shape of {name}")
        state, own = share["rng"][0], torch.get_rng_state()
        if (state.shape, state.dtype) != (own.shape, own.dtype):
            raise ValueError("state of the random generator")

    def take(self, share: dict[str, Any]) -> list[Tensor]:
        """Take over this process' buffers; returns where its generators stood.

        To be called after DDP has given every process the main one's.
        """
        for name, buffer in self.float_buffers().items():
            buffer.copy_(share["buffers"][name])
        return share["rng"]
