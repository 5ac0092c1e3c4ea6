"""Schedules of the learning rate with a warm-up, a cosine, or a lower limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from lib.training.methods import Methods
from utils import log


def factor(
    how: Methods, optimizer: torch.optim.Optimizer, total_steps: int
) -> Callable[[int], float]:
    """The function from a step, counted from 0, to the part of the full learning rate."""
    warmup = how.warmup_steps

    def at(step: int) -> float:
        if step < warmup:
            return how.warmup_start + (1 - how.warmup_start) * step / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        left = (1 - done) ** 0.9 if how.sched == "poly" else (1 + math.cos(math.pi * done)) / 2
        # A resumed optimizer has the rates of its checkpoint.
        full = max(group["initial_lr"] for group in optimizer.param_groups)
        least = min(1.0, how.min_lr / full)
        return least + (1 - least) * left

    return at


def build_schedule(optimizer: torch.optim.Optimizer, total_steps: int, how: Methods) -> LambdaLR:
    """The schedule, stepped after every training step.

    Args:
        optimizer: its groups have their full learning rates; the highest is that of groups whose
            rate is not scaled.
        total_steps: of the run.
        how: the schedule.
    """
    if how.warmup_steps >= total_steps:
        log.warning("--warmup_steps %d: all %d steps warm up", how.warmup_steps, total_steps)
    return LambdaLR(optimizer, factor(how, optimizer, total_steps))
