"""Parameter groups, AdamW and the polynomial schedule of the published recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lib.errors import InputError
from lib.model import Frozen, Segmenter

PUBLISHED_LANG_LAYERS = 10
NORM_DECAY = ("published", "none", "all", "biases")


def parameter_groups(
    model: Segmenter,
    weight_decay: float,
    lang_layers: int | None = PUBLISHED_LANG_LAYERS,
    norm_decay: str = "published",
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, as in the release of the model.

    Args:
        model: not wrapped in DDP.
        weight_decay: of all groups but ``*_no_decay``.
        lang_layers: train the first so many BERT layers, but not its embeddings, as published;
            None trains all of BERT.
        norm_decay: which norms and biases have weight decay: 'all', 'none', or, as 'published', all
            but the backbone's norms, position embedding and bias tables.

    Returns:
        Groups {name, params, param_names, weight_decay} in the model's order, without empty ones.

    Raises:
        InputError: the model does not say what to do with a parameter.
    """
    no_decay = "_no_decay"
    members: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in model.groups}
    unknown = []
    for name, parameter in model.named_parameters():
        group = model.parameter_group(name, lang_layers)
        if group is None:
            unknown.append(name)
        elif isinstance(group, str):
            if norm_decay == "none" and parameter.ndim < 2 and not group.endswith(no_decay):
                group += no_decay
            members.setdefault(group, []).append((name, parameter))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"parameters in no optimizer group: {', '.join(unknown[:3])}{more}: return a group's "
            f"name or Frozen(reason) for them in {type(model).__name__}.parameter_group"
        )
    return [
        {
            "name": group,
            "params": [parameter for _, parameter in named],
            "param_names": [name for name, _ in named],
            "weight_decay": weight_decay
            if norm_decay == "all" or not group.endswith(no_decay)
            else 0.0,
        }
        for group, named in members.items()
        if named
    ]


def not_optimised(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the parameters in no group, in the model's order."""
    grouped = {n for group in groups for n in group["param_names"]}
    return [n for n, _ in model.named_parameters() if n not in grouped]


def freeze_unused(model: Segmenter, groups: Iterable[dict[str, Any]]) -> None:
    """Turn off gradients of parameters in no group, and of those that no output depends on.

    Updates stay the same; backward is cheaper, and DDP need not search for unused parameters.
    """
    for name in {*not_optimised(model, groups), *model.unused_parameters()}:
        model.get_parameter(name).requires_grad_(False)


def describe_groups(
    model: Segmenter, groups: Iterable[dict[str, Any]], lr: float, lang_layers: int | None
) -> list[str]:
    """Lines for the log: every group, and what is not trained with the reason.

    Args:
        model, groups, lang_layers: of :func:`parameter_groups`.
        lr: initial learning rate.
    """
    unused = model.unused_parameters()
    frozen: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        group = model.parameter_group(name, lang_layers)
        reason = group.reason if isinstance(group, Frozen) else unused.get(name)
        if reason is not None:
            frozen.setdefault(reason, []).append(name)

    def size(names: list[str]) -> str:
        parameters = sum(model.get_parameter(name).numel() for name in names)
        return f"{len(names)} tensors, {parameters:,} parameters"

    lines = [
        f"group {g['name']}: {size(g['param_names'])}, lr {g.get('lr', lr):g}, "
        f"weight decay {g['weight_decay']:g}"
        for g in groups
    ]
    return lines + [f"not trained: {size(names)}: {why}" for why, names in frozen.items()]


def scaled_lr(lr: float, total_batch: int, base: int) -> float:
    """The learning rate for a batch of another size, in proportion.

    Args:
        lr: for batches of ``base``.
        total_batch: samples of a step, of all processes and accumulated batches.
        base: 0 for no scaling.
    """
    return lr * total_batch / base if base else lr


def build_optimizer(
    groups: list[dict[str, Any]],
    lr: float,
    amsgrad: bool = False,
) -> torch.optim.AdamW:
    """AdamW over the groups, fused into one kernel (LAVT, Sec. 4.2).

    Args:
        groups: of :func:`parameter_groups`, each with its weight decay.
        lr, amsgrad: AdamW's.
    """
    # AdamW would save param_names in its state, which published optimizer states do not have.
    plain = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    return torch.optim.AdamW(plain, lr=lr, amsgrad=amsgrad, fused=True)


def poly_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, power: float = 0.9
) -> LambdaLR:
    """lr * (1 - step / total_steps)^power, stepped after every training step (LAVT, Sec. 4.2)."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps) ** power)


def move_schedule(scheduler: LambdaLR, step: int) -> None:
    """Set the schedule to ``step`` of its steps, and the learning rates to that step's."""
    scheduler.last_epoch = step
    rates = [
        lr * factor(step)
        for lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
