"""What train.py offers beyond the published recipes: flags, their checks, and what they build.

All of it is off by default; the code that does the work is loaded only where a flag asks for it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from args import select
from data.dataset_refer_bert import ReferDataset
from data.loaders import RandomExpressionSampler
from lib.errors import InputError
from lib.losses import LOSSES
from lib.model import Segmenter
from lib.training import optim

if TYPE_CHECKING:
    from bert.tokenizer import Tokenizer
    from data.mixed import MixedDataset
    from lib.training.ema import WeightAverage
    from lib.training.maskris import MaskRIS

SWITCHES = ("maskris", "mosaic", "model_ema")  # each has flags that begin with its name
UP_TO_ONE = (
    *("maskris_weight", "maskris_ratio", "maskris_text"),
    *("mosaic", "warmup_lr", "model_ema_decay"),
)
FROM_ZERO = ("warmup_steps", "min_lr", "backbone_lr_scale", "bert_lr_scale", *UP_TO_ONE)


def add_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags to those of train.py."""
    add = p.add_argument_group("better training: see docs/training.md").add_argument
    add("--maskris", action="store_true", help="learn from masked images and expressions, too")
    add("--maskris_weight", type=float, default=0.5, help="of the loss without masks")
    add("--maskris_ratio", type=float, default=0.75, help="part of an image that is masked")
    add("--maskris_patch", type=int, default=32, help="side of masked patches, pixels")
    add("--maskris_text", type=float, default=0.15, help="part of the words that are masked")
    add("--mosaic", type=float, default=0.0, metavar="P", help="2 x 2 mosaics with probability P")
    add("--mosaic_directions", action="store_true", help="keep to left, right, top and bottom")
    add("--sched", default="poly", choices=("poly", "cosine"), help="of the learning rate")
    add("--min_lr", type=float, default=0.0, help="the last learning rate")
    add("--warmup_steps", type=int, default=0, help="steps in which the learning rate grows")
    add("--warmup_lr", type=float, default=1e-3, help="the first learning rate, as part of --lr")
    add("--backbone_lr_scale", type=float, default=1.0, help="of --lr, for Swin's own weights")
    add("--bert_lr_scale", type=float, default=1.0, help="of --lr, for BERT's weights")
    add("--model_ema", action="store_true", help="evaluate and save a moving average of weights")
    add("--model_ema_decay", type=float, default=0.9998, help="of a step")
    add("--model_ema_warmup", action="store_true", help="less decay in early steps")
    add("--wandb", nargs="?", const="lavt", metavar="PROJECT", help="track in Weights & Biases")


def check(args: argparse.Namespace, p: argparse.ArgumentParser) -> None:
    """Reject values that have no meaning or would only fail later.

    Raises:
        InputError: naming the flag and what it takes.
    """
    parse_losses(args.loss)
    for name in FROM_ZERO:
        value, most = getattr(args, name), 1 if name in UP_TO_ONE else 2**31
        if not 0 <= value <= most:  # also rejects nan
            limit = "in [0, 1]" if most == 1 else "0 or more"
            raise InputError(f"--{name} {value}: must be {limit}")
    if args.maskris_patch < 1:
        raise InputError(f"--maskris_patch {args.maskris_patch}: must be above 0")
    for name, value in vars(args).items():
        switch = next((s for s in SWITCHES if name.startswith(f"{s}_")), None)
        if switch and value != p.get_default(name) and not getattr(args, switch):
            raise InputError(f"--{name} {value} has no meaning without --{switch}")


def parse_losses(text: str) -> dict[str, float]:
    """The weights of ``--loss``: a name, or several with weights, like ``ce:0.9,dice:0.1``.

    Raises:
        InputError: a name is unknown or given twice, or the weights are not usable.
    """
    weights: dict[str, float] = {}
    for name, colon, weight in (part.partition(":") for part in text.split(",")):
        if name not in LOSSES or name in weights:
            what = "is named twice" if name in weights else f"is none of {', '.join(LOSSES)}"
            raise InputError(f"--loss {text}: '{name}' {what}; give one, or ce:0.9,dice:0.1")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] < float("inf"):  # also rejects nan
            raise InputError(f"--loss {text}: the weight '{weight}' must be a number from 0 on")
    if not any(weights.values()):
        raise InputError(f"--loss {text}: at least one weight must be above 0")
    return weights


def build_maskris(args: argparse.Namespace, tokenizer: Tokenizer) -> MaskRIS | None:
    """Two passes over each batch, with ``--maskris``.

    Raises:
        InputError: images or tokenizer do not fit.
    """
    if not args.maskris:
        return None
    from lib.training import maskris

    return maskris.build_maskris(select(maskris.MaskConfig, args), tokenizer, args.img_size)


def build_average(args: argparse.Namespace, model: Segmenter) -> WeightAverage | None:
    """The moving average of a model's weights, with ``--model_ema``."""
    if not args.model_ema:
        return None
    from lib.training.ema import WeightAverage

    return WeightAverage(model, args.model_ema_decay, args.model_ema_warmup)


def with_mosaics(
    args: argparse.Namespace,
    train_set: ReferDataset | MixedDataset,
    sampler: RandomExpressionSampler,
) -> tuple[Any, Any]:
    """The samples and their sampler, with mosaics among them where ``--mosaic`` asks for it.

    Raises:
        InputError: the images do not allow it.
    """
    if not args.mosaic:
        return train_set, sampler
    from data.mosaic import MosaicDataset, MosaicSampler

    mosaics = MosaicSampler(sampler, train_set, args.mosaic, args.mosaic_directions)
    return MosaicDataset(train_set), mosaics


def refine_groups(
    args: argparse.Namespace, model: Segmenter, groups: list[dict[str, Any]], lr: float
) -> list[dict[str, Any]]:
    """The optimizer's groups, split where rates are scaled or biases alone decay."""
    scales, biases_only = (args.backbone_lr_scale, args.bert_lr_scale), args.norm_decay == "biases"
    if not biases_only and scales == (1.0, 1.0):
        return groups
    from lib.training.groups import refine

    return refine(model, groups, lr, *scales, biases_only=biases_only)


def build_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, lr: float, steps: int
) -> LambdaLR:
    """The schedule of the learning rate; as published unless a flag changes it.

    Raises:
        InputError: ``--min_lr`` is above the learning rate.
    """
    if (args.sched, args.warmup_steps, args.min_lr) == ("poly", 0, 0.0):
        return optim.poly_schedule(optimizer, steps)
    from lib.training import schedule

    config = select(schedule.ScheduleConfig, args)
    return schedule.build_schedule(optimizer, lr, steps, config)
