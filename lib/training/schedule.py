"""Schedules of the learning rate with a warm-up, a cosine, or a lower limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from lib.errors import InputError
from lib.training.methods import Methods
from utils import log


def factor(how: Methods, lr: float, total_steps: int) -> Callable[[int], float]:
    """The function from a step, counted from 0, to the part of the full learning rate."""
    warmup, least = how.warmup_steps, how.min_lr / lr

    def at(step: int) -> float:
        if step < warmup:
            return how.warmup_start + (1 - how.warmup_start) * step / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        left = (1 - done) ** 0.9 if how.sched == "poly" else (1 + math.cos(math.pi * done)) / 2
        return least + (1 - least) * left

    return at


def build_schedule(
    optimizer: torch.optim.Optimizer, lr: float, total_steps: int, how: Methods
) -> LambdaLR:
    """The schedule, stepped after every training step.

    Args:
        optimizer: its groups have their full learning rates.
        lr: the full learning rate of groups whose rate is not scaled.
        total_steps: of the run.
        how: the schedule.

    Raises:
        InputError: the lower limit is above the learning rate.
    """
    if how.min_lr > lr:
        raise InputError(f"--min_lr {how.min_lr:g} is above the learning rate, {lr:g}")
    if how.warmup_steps >= total_steps:
        log.warning("--warmup_steps %d: all %d steps warm up", how.warmup_steps, total_steps)
    return LambdaLR(optimizer, factor(how, lr, total_steps))
