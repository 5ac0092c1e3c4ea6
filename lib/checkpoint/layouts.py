"""A checkpoint's content and the model: published layouts, strict loading, training state."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib.errors import InputError
from lib.model import Segmenter, State
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES
from lib.variants import trained_with, variant_of_names
from lib.weights import is_state, levels, read_checkpoint, unwrap

BLOCK = re.compile(r"backbone\.(?:layers\.(\d)|(\d)\.layers)\.blocks\.(\d+)\.")
TEXT_LAYER = re.compile(r"(?:text_encoder|lang_stage1)\.encoder\.layer\.(\d+)\.")
TEXT = "text_encoder."
# Parts of the names of weights that not every variant has.
OPTIONAL_PARTS = {"absolute_pos_embed", "res_gate", "fusion", "project_mm", "lang_project"}
OPTIONAL_PARTS |= {"vis_project", "image_lang_att", "f_key", "f_query", "f_value", "W", "norm"}
OPTIONAL_PARTS |= {"running_mean", "running_var", "num_batches_tracked"}
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
) -> list[str]:
    """Load a checkpoint's weights into ``model``, strictly.

    Args:
        model: built by :func:`lib.segmentation.build_model`, not wrapped.
        content: of :func:`lib.checkpoint.read_checkpoint`.
        path: of the checkpoint, for messages.
        resize: for a new run, which may be of another variant: resize position embeddings and
            bias tables to the model's.

    Returns:
        With ``resize``, names of the weights that are not as in the file.

    Raises:
        InputError: a name or shape differs, or the checkpoint was trained with other flags that
            names and shapes do not show; the message says which flags would fit.
    """
    own = model.state_dict()
    held_state = state = model.from_published(flat_state(content, path, own))
    if resize:
        state = _resized(state, own, str(path))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    trained = {} if resize else trained_with(recorded_args(content), model.variant)
    asked_for = {name: model.variant[name] for name in trained}
    if wrong or missing or extra or trained != asked_for:
        asked = describe(own) | variant_of_names(own) | asked_for
        held = describe(state) | variant_of_names(state) | trained
        differ = [k for k in held if held[k] != asked[k]]
        known = OPTIONAL_PARTS.union(*(k.split(".") for k in own))
        strange = [k for k in extra if not known.issuperset(re.sub(r"\.\d+", "", k).split("."))]
        if not any(map(BLOCK.match, state)) or (strange and "model" not in differ and missing):
            raise InputError(
                f"{path} has other names than this model, like {(strange or extra)[0]} where "
                f"{missing[0]} is expected: give a checkpoint of train.py or LAVT's"
            )
        if held["text_width"] is None:
            raise InputError(f"{path} holds no text encoder (bert_model or text_encoder.*)")
        if differ and None not in [held[k] for k in differ]:
            fit = " ".join(_option(k, held[k]) for k in differ)
            raise InputError(f"{path} is not of the model of these flags; it would fit: {fit}")
        found = (("missing", missing), ("unknown", extra), ("of another shape", wrong))
        reasons = [f"{len(k)} weights {what}, like {k[0]}" for what, k in found if k]
        raise InputError(f"{path} does not fit this model: {'; '.join(reasons)}")
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{path} does not fit: {name} is of type {value.dtype}")
    model.load_state_dict(state)
    model.trained_with = recorded_args(content)
    changed = [k for k, v in state.items() if resize and v is not held_state.get(k)]
    return [k for k in changed if not k.endswith("relative_position_index")]


def recorded_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint was trained with, plain values alone; {} if it has none."""
    args = content.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    # An untrusted file may hold anything, like tensors, which == does not simply compare.
    return {k: v for k, v in args.items() if v is None or isinstance(v, str | int | float)}


def _resized(state: State, own: State, path: str) -> State:
    from lib.checkpoint.swin import resize_weight  # rarely needed

    grids = ("relative_position_bias_table", "absolute_pos_embed")
    fitted = dict(state)
    for key, value in state.items():
        if key.endswith(grids) and key in own and value.shape != own[key].shape:
            with contextlib.suppress(InputError):  # told with what else does not fit
                fitted[key] = resize_weight(key, value, own[key].shape, path)
    # The model computes its own indices into bias tables, and fresh positions without the file's.
    kept = {
        k: v
        for k, v in own.items()
        if (k.endswith("relative_position_index") and k in state)
        or (k.endswith("absolute_pos_embed") and k not in state)
    }
    return fitted | kept


def load_trained(name: str, path: str | os.PathLike[str], **options: Any) -> Segmenter:
    """A model in eval mode with the weights of a checkpoint.

    Args:
        name, options: of :func:`lib.segmentation.build_model`.
        path: of the checkpoint.

    Raises:
        InputError: the checkpoint cannot be read, or is of another model.
    """
    content = read_checkpoint(path)
    model = build_model(name, **options)
    load_model(model, content, path)
    return model.eval()


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
            "(--model, --swin_type, --lang_layers) of the run that wrote it"
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


def describe(state: State) -> dict[str, Any]:
    """The flags that a state dict's names and shapes show; None for the others."""

    def shape(suffix: str, axis: int) -> int | None:
        shapes = [v.shape for k, v in state.items() if k.endswith(suffix) and v.ndim > axis]
        return shapes[0][axis] if shapes else None

    width = shape("patch_embed.proj.weight", 0)
    blocks = {match.groups("") for k in state if (match := BLOCK.match(k))}
    depths = [sum(i in (a, b) for a, b, _ in blocks) for i in "0123"]
    types = [
        name
        for name, size in SWIN_SIZES.items()
        if size.embed_dim == width and list(size.depths) == depths
    ]
    table = shape("blocks.0.attn.relative_position_bias_table", 0)
    return {
        "model": "crossvlt" if any(k.startswith("lang_stage1.") for k in state) else "lavt",
        "swin_type": types[0] if types else None,
        "window": (int(table**0.5) + 1) // 2 if table else None,
        "ape": shape("absolute_pos_embed", 2) or 0,
        "text_width": shape("embeddings.word_embeddings.weight", 1),
        "text_layers": len({match[1] for k in state if (match := TEXT_LAYER.match(k))}),
        "vocabulary": shape("embeddings.word_embeddings.weight", 0),
    }


def _option(key: str, value: Any) -> str:
    if key == "window":
        return "--window12" if value == 12 else f"window {value} (no --window12)"
    if key == "ape":
        return f"--ape {value}"
    if key in ("text_width", "text_layers", "vocabulary"):
        return f"--ck_bert and --bert_tokenizer with {key.replace('_', ' ')} {value}"
    return f"--{key} {value}"
