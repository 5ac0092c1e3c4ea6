"""A checkpoint's content and the model: published layouts, strict loading, training state."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError
from lib.model import Segmenter, State
from lib.variants import trained_with
from lib.weights import is_state, levels, unwrap

TEXT = "text_encoder."
TRAINING_STATE = ("optimizer", "lr_scheduler", "epoch")  # in addition to the weights


def flat_state(
    content: Mapping[str, Any], path: str | os.PathLike[str], own: Iterable[str] = ()
) -> State:
    """A flat state dict from any published layout.

    Layouts are {model, bert_model}, {model} with BERT inside, or a bare state dict; also in
    another container, and with what wrappers add to names.

    Args:
        content: of the file.
        path: of the file, for messages.
        own: names of the model's weights.

    Raises:
        InputError: it holds no weights.
    """
    held = levels(content)
    state = held[-1]
    text: Any = next((level["bert_model"] for level in held if "bert_model" in level), {})
    if not is_state(state) or not (text == {} or is_state(text)):
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise InputError(
            f"{path} holds no model weights, but {keys}: give a checkpoint of train.py or LAVT's"
        )
    of_text = [name.removeprefix(TEXT) for name in own if name.startswith(TEXT)]
    flat = unwrap(state, own)
    return flat | {TEXT + k: v for k, v in (unwrap(text, of_text) if text else {}).items()}


def load_model(
    model: Segmenter,
    content: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    resize: bool = False,
    recorded: Mapping[str, Any] | None = None,
) -> list[str]:
    """Load a checkpoint's weights into ``model``, strictly.

    Args:
        model: built by :func:`lib.segmentation.build_model`, not wrapped.
        content: of :func:`lib.checkpoint.read_checkpoint`.
        path: of the checkpoint, for messages.
        resize: for a new run, which may be of another variant: resize position embeddings and
            bias tables to the model's.
        recorded: flags that it was trained with; those in the file if None.

    Returns:
        With ``resize``, names of the weights that are not as in the file.

    Raises:
        InputError: a name or shape differs, or the checkpoint was trained with other flags that
            names and shapes do not show; the message says which flags would fit.
    """
    own, recorded = model.state_dict(), recorded or recorded_args(content)
    in_file = state = model.from_published(flat_state(content, path, own))
    if resize:
        from lib.checkpoint.swin import resized

        state = resized(state, own, str(path))
    trained = {} if resize else trained_with(recorded, model.variant)
    asked_for = {name: model.variant[name] for name in trained}
    shapes, held = ({k: v.shape for k, v in each.items()} for each in (own, state))
    if shapes != held or trained != asked_for:
        from lib.checkpoint.mismatch import mismatch

        raise mismatch(path, own, state, asked_for, trained)
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{path} does not fit: {name} is of type {value.dtype}")
    model.load_state_dict(state)
    model.trained_with = recorded
    model.seen_images = _seen_images(content, path)
    changed = [k for k, v in state.items() if resize and v is not in_file.get(k)]
    return [k for k in changed if not k.endswith("relative_position_index")]


def recorded_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint was trained with, plain values alone; {} if it has none."""
    args = content.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    # An untrusted file may hold anything, like tensors, which == does not simply compare.
    return {k: v for k, v in args.items() if v is None or isinstance(v, str | int | float)}


def _seen_images(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Ids of the training images; {} if the file does not tell."""
    seen = content.get("seen_images", {})
    if not isinstance(seen, Mapping) or not all(
        isinstance(name, str) and isinstance(ids, Tensor) and ids.dtype == torch.int64
        for name, ids in seen.items()
    ):
        raise InputError(f"{path}: its list of training images (seen_images) is damaged")
    return dict(seen)


def load_training(
    content: dict[str, Any],
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Load the state of optimizer, schedule and scaler from a checkpoint.

    Raises:
        InputError: it holds weights only, or its optimizer has other parameter groups.
    """
    missing = [k for k in TRAINING_STATE if k not in content]
    if missing:
        raise InputError(
            f"{path} holds no {missing[0]}: it can be tested, not resumed; --init_from starts a "
            "new run with its weights"
        )
    try:
        if type(content["epoch"]) is not int or not _is_number(content.get("best_oIoU", 0.0)):
            raise TypeError("its epoch or best_oIoU is no number")
        # The release's optimizer was not fused; training steps need it to be.
        fused = {"fused": optimizer.defaults.get("fused")}
        groups = [group | fused for group in content["optimizer"]["param_groups"]]
        optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
        _check_optimizer(optimizer)
        scheduler.load_state_dict(content["lr_scheduler"])
        if scaler is not None and "scaler" in content:
            scaler.load_state_dict(content["scaler"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise InputError(
            f"the training state in {path} does not fit ({e}): resume with the flags "
            "(--model, --swin_type, --lang_layers, --norm_decay, --backbone_lr_scale) of the run "
            "that wrote it"
        ) from e


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise an error now for state that would only fail at the first step."""
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "weight_decay", "eps", "betas"):
            value = group.get(key, 0.0)
            if not (all(map(_is_number, value)) if key == "betas" and value else _is_number(value)):
                raise TypeError(f"{key} of its optimizer is a {type(value).__name__}")
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape not in (parameter.shape, ()):
                raise ValueError(f"{key} of its optimizer is of another shape")
