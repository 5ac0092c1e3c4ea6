"""Parameter groups beyond the published ones: rates of pretrained parts, decay of biases alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from lib.model import NO_DECAY, Segmenter

BERT_GROUPS = ("text", "lang_stage1")
NEW = "_new"  # ends the group of what a pretrained part's group has beside pretrained weights


def refine(
    model: Segmenter,
    groups: list[dict[str, Any]],
    lr: float,
    scale: float = 1.0,
    *,
    biases_only: bool = False,
) -> list[dict[str, Any]]:
    """Split groups by learning rate and weight decay.

    Args:
        model: of the parameters.
        groups: of :func:`lib.training.optim.parameter_groups`.
        lr: of parameters whose rate is not scaled.
        scale: of the learning rate of BERT, and of the weights that ImageNet Swin has. Fusion,
            gates and output norms, which begin at random, have the full rate.
        biases_only: norms, embeddings and position tables have no weight decay, biases have.

    Returns:
        Groups {name, params, param_names, weight_decay, lr}; those of the highest rate come first,
        since a run's log shows the rate of the first.
    """
    decay = max(group["weight_decay"] for group in groups)
    refined: dict[str, dict[str, Any]] = {}
    for group in groups:
        base = group["name"].removesuffix("_no_decay")
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            full, key = lr, base
            pretrained = base in BERT_GROUPS and ".proj." not in name
            if pretrained or model.swin_name(name) is not None:
                full = lr * scale
            elif base.startswith(("backbone", *BERT_GROUPS)):
                key += NEW
            rate = group["weight_decay"]
            if biases_only:
                rate = 0.0 if without_decay(model, name) else decay
            if not rate:
                key += "_no_decay"
            entry = {"name": key, "params": [], "param_names": [], "weight_decay": rate}
            entry = refined.setdefault(key, entry | {"lr": full})
            entry["params"].append(parameter)
            entry["param_names"].append(name)
    return sorted(refined.values(), key=lambda group: -group["lr"])


def without_decay(model: nn.Module, name: str) -> bool:
    """Whether a parameter is of a norm, an embedding, or a position table."""
    stem, _, last = name.rpartition(".")
    module = model.get_submodule(stem)
    if isinstance(module, nn.Embedding) or any(part in last for part in NO_DECAY):
        return True
    weight = getattr(module, "weight", None)  # of norms alone it has one dimension
    return isinstance(weight, nn.Parameter) and weight.ndim < 2
