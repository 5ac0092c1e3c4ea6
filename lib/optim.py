"""Parameter groups, AdamW and the polynomial schedule of the published recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lib.lavt import LAVT

NO_DECAY = ("norm", "absolute_pos_embed", "relative_position_bias_table")
PUBLISHED_LANG_LAYERS = 10


def parameter_groups(
    model: LAVT, weight_decay: float, lang_layers: int | None = PUBLISHED_LANG_LAYERS
) -> list[dict[str, Any]]:
    """Split the parameters as the release does.

    Args:
        model: not wrapped in DDP.
        weight_decay: of all groups but the backbone's norms, position embedding and bias tables.
        lang_layers: the first so many BERT layers are trained; BERT's embeddings and later layers
            are in no group, as published. None trains all of BERT, the embeddings too.

    Returns:
        Groups {name, params, param_names, weight_decay}: backbone without decay, backbone,
        decoder, BERT. Parameters in none are :func:`not_optimised`.
    """
    names: dict[str, list[str]] = {
        "backbone_no_decay": [],
        "backbone": [],
        "decoder": [],
        "text": [],
    }
    for name, _ in model.named_parameters():
        if name.startswith("backbone."):
            exempt = any(part in name for part in NO_DECAY)
            names["backbone_no_decay" if exempt else "backbone"].append(name)
        elif name.startswith("classifier."):
            names["decoder"].append(name)
        elif lang_layers is None or _text_layer(name) in range(lang_layers):
            names["text"].append(name)
    parameters = dict(model.named_parameters())
    return [
        {
            "name": group,
            "params": [parameters[n] for n in members],
            "param_names": members,
            "weight_decay": 0.0 if group == "backbone_no_decay" else weight_decay,
        }
        for group, members in names.items()
        if members
    ]


def _text_layer(name: str) -> int | None:
    """Layer number in ``text_encoder.encoder.layer.N.…``, None for the embeddings."""
    head, _, tail = name.partition("encoder.layer.")
    return int(tail.split(".")[0]) if head == "text_encoder." and tail else None


def not_optimised(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the parameters in no group, in the model's order."""
    grouped = {n for group in groups for n in group["param_names"]}
    return [n for n, _ in model.named_parameters() if n not in grouped]


def freeze_unused(model: LAVT, groups: Iterable[dict[str, Any]]) -> None:
    """Ask for no gradient where none is used: outside the groups, and in the last stage's gate.

    Updates stay the same; backward is cheaper, and DDP need not search for unused parameters.
    """
    gate = f"backbone.layers.{len(model.backbone.stage_dims) - 1}.res_gate."
    unused = set(not_optimised(model, groups))
    for name, parameter in model.named_parameters():
        if name in unused or name.startswith(gate):
            parameter.requires_grad_(False)


def build_optimizer(
    groups: list[dict[str, Any]], lr: float, weight_decay: float, amsgrad: bool = False
) -> torch.optim.AdamW:
    """AdamW over the groups (LAVT, Sec. 4.2)."""
    # param_names would be taken for torch's own named-parameter feature, which wants all of them
    # in one form; the names are kept by this module's functions instead.
    plain = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    return torch.optim.AdamW(plain, lr=lr, weight_decay=weight_decay, amsgrad=amsgrad)


def poly_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, power: float = 0.9
) -> LambdaLR:
    """lr * (1 - step / total)^0.9, to be stepped after every iteration (LAVT, Sec. 4.2)."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps) ** power)
