"""Schedules of the learning rate with a warm-up, a cosine, or a lower limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from lib.errors import InputError
from utils import log


@dataclass(frozen=True)
class ScheduleConfig:
    """A schedule; the names are those of train.py's flags.

    Attributes:
        sched: 'poly', of power 0.9, or 'cosine'.
        warmup_steps: the learning rate grows linearly for so many steps; then the schedule begins.
        warmup_start: the first learning rate, as a part of the full one.
        min_lr: the last learning rate, for groups of the full one; in proportion for others.
    """

    sched: str = "poly"
    warmup_steps: int = 0
    warmup_start: float = 1e-3
    min_lr: float = 0.0


def factor(config: ScheduleConfig, lr: float, total_steps: int) -> Callable[[int], float]:
    """The function from a step, counted from 0, to the part of the full learning rate."""
    warmup, least = config.warmup_steps, config.min_lr / lr

    def at(step: int) -> float:
        if step < warmup:
            return config.warmup_start + (1 - config.warmup_start) * step / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        left = (1 - done) ** 0.9 if config.sched == "poly" else (1 + math.cos(math.pi * done)) / 2
        return least + (1 - least) * left

    return at


def build_schedule(
    optimizer: torch.optim.Optimizer, lr: float, total_steps: int, config: ScheduleConfig
) -> LambdaLR:
    """The schedule, stepped after every training step.

    Args:
        optimizer: its groups have their full learning rates.
        lr: the full learning rate of groups whose rate is not scaled.
        total_steps: of the run.
        config: the schedule.

    Raises:
        InputError: the lower limit is above the learning rate.
    """
    if config.min_lr > lr:
        raise InputError(f"--min_lr {config.min_lr:g} is above the learning rate, {lr:g}")
    if config.warmup_steps >= total_steps:
        log.warning("--warmup_steps %d: all %d steps warm up", config.warmup_steps, total_steps)
    return LambdaLR(optimizer, factor(config, lr, total_steps))
