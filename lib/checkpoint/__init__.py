"""Checkpoint files: saving, resuming, and reading what others published."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.checkpoint.vetting import vet
from lib.errors import InputError
from lib.model import Segmenter, State
from lib.swin import SWIN_SIZES
from lib.variants import trained_with, variant_of_names

BLOCK = re.compile(r"backbone\.(?:layers\.(\d)|(\d)\.layers)\.blocks\.(\d+)\.")
TEXT_LAYER = re.compile(r"(?:text_encoder|lang_stage1)\.encoder\.layer\.(\d+)\.")
TRAINING_STATE = ("optimizer", "lr_scheduler", "epoch")  # what weights alone lack


def read_file(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code in it.

    Only tensors, plain containers, numbers, strings, and ``argparse.Namespace``, which the
    release stores its arguments in.

    Raises:
        InputError: missing, not a checkpoint, damaged, or holding anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give an existing file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    vet(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # on protocols and layouts of old
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # what is damaged further can raise nearly anything
        raise InputError(f"{path} is damaged or no PyTorch checkpoint: get it again") from e
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def _read_safetensors(path: Path) -> State:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as e:  # its own, torch's and Python's
        raise InputError(f"{path} is damaged or no safetensors file: get it again") from e


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_file(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint whole or not at all: a temporary file, fsync, rename.

    Raises:
        InputError: the file cannot be written; what stood there before is untouched.
    """
    partial = write_partial(content, path)
    try:
        os.replace(partial, path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {e.strerror}") from e


def write_partial(content: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write what is to become the file ``path``, whole and on the disk, beside it.

    Returns:
        The temporary file, to be renamed.

    Raises:
        InputError: it cannot be written; nothing of it is left.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One that a killed process left may be a second name of a good file: not to be written to.
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(
            f"cannot write {path} ({e}): free some space or change --output-dir"
        ) from e
    return partial


def flat_state(content: dict[str, Any], path: str | os.PathLike[str]) -> State:
    """One flat state dict from any published layout.

    {model, bert_model}, {model} with text inside, or a bare state dict; with or without
    ``module.`` prefixes.

    Raises:
        InputError: there are no weights in it.
    """
    state, text = content.get("model", content), content.get("bert_model", {})
    if not _is_state(state) or not (text == {} or _is_state(text)):
        raise InputError(f"{path} holds no model weights: give a checkpoint of train.py or LAVT's")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    for key, value in text.items():
        state["text_encoder." + key.removeprefix("module.")] = value
    return state


def _is_state(value: Any) -> bool:
    """Whether ``value`` is names and tensors, and at least one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def load_model(model: Segmenter, content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Fill ``model`` with a checkpoint's weights, strictly.

    Args:
        model: built by :func:`lib.segmentation.build_model`, not wrapped.
        content: of :func:`read_file`.
        path: where it came from, for messages.

    Raises:
        InputError: a name or shape differs, or the checkpoint was trained with other options that
            neither tells; the message says which would fit.
    """
    state = model.from_published(flat_state(content, path))
    own = model.state_dict()
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    trained = trained_with(content.get("args"), model.variant)
    asked_for = {name: model.variant[name] for name in trained}
    if wrong or missing or extra or trained != asked_for:
        asked = describe(own) | variant_of_names(own) | asked_for
        held = describe(state) | variant_of_names(state) | trained
        if held["text_width"] is None:
            raise InputError(f"{path} holds no text encoder (bert_model or text_encoder.*)")
        differ = [k for k in held if held[k] != asked[k]]
        if differ:
            fit = " ".join(_option(k, held[k]) for k in differ)
            raise InputError(f"{path} is of another model than asked for; it would fit: {fit}")
        example = sorted(wrong or missing or extra)[0]
        raise InputError(
            f"{path} does not fit: {len(missing)} weights missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape, like {example}"
        )
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{path} does not fit: {name} is of type {value.dtype}")
    model.load_state_dict(state)


def load_training(
    content: dict[str, Any],
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Continue optimizer, schedule and, where it has one, the loss' scaler from a checkpoint.

    Raises:
        InputError: it holds weights only, or its optimizer's groups are of other parameters.
    """
    missing = [k for k in TRAINING_STATE if k not in content]
    if missing:
        raise InputError(f"{path} holds no {missing[0]}: it can be tested, not resumed")
    try:
        if type(content["epoch"]) is not int or not _is_number(content.get("best_oIoU", 0.0)):
            raise TypeError("its epoch or best_oIoU is no number")
        optimizer.load_state_dict(content["optimizer"])
        _check_optimizer(optimizer)
        scheduler.load_state_dict(content["lr_scheduler"])
        if scaler is not None and "scaler" in content:
            scaler.load_state_dict(content["scaler"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise InputError(
            f"the training state in {path} does not fit ({e}): resume with the options "
            "(--model, --swin_type, --lang_layers) that the run was started with"
        ) from e


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what would only fail at the first step."""
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
    """What a state dict's names and shapes tell of its model; None for what they do not."""

    def shape(suffix: str, axis: int) -> int | None:
        found = [v.shape for k, v in state.items() if k.endswith(suffix) and v.ndim > axis]
        return found[0][axis] if found else None

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
    if value is None:
        return f"no known {key}"
    if key == "window":
        return "--window12" if value == 12 else f"window {value} (no --window12)"
    if key == "ape":
        return f"--ape {value}"
    if key in ("text_width", "text_layers", "vocabulary"):
        return f"--ck_bert and --bert_tokenizer with {key.replace('_', ' ')} {value}"
    return f"--{key} {value}"
