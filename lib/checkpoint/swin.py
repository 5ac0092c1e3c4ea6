"""Swin weights: ImageNet's in the official, timm's or transformers' layout; other sizes."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import InputError
from lib.model import Segmenter, State
from lib.weights import is_state, levels, read_checkpoint, unwrap

# Classifier, output norms, buffers that the model computes, the token of masked pretraining.
DROPPED = re.compile(r"(head|norm\d?)\.|mask_token$|.*\.(attn_mask|relative_position_index)$")
BLOCK = re.compile(r"layers\.\d+\.blocks\.\d+\.")
FILE_TYPES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def load_swin_weights(model: Segmenter, source: str) -> str:
    """Load the Swin part of a model; fusion, gates and output norms keep their initial values.

    Args:
        model: its ``swin_name`` maps its names to Swin's.
        source: a file (.pth or .safetensors; bare, in a container, or below wrappers' names), or
            the name of a timm model (needs the network).

    Returns:
        One line for the log: what was loaded, resized and ignored.

    Raises:
        InputError: no such file, or a weight is unknown, missing or of another shape.
    """
    content = levels(_read(source))[-1]
    if not is_state(content):
        raise InputError(f"{source} holds no Swin weights: give an ImageNet Swin checkpoint")
    names = {name: model.swin_name(name) for name in model.state_dict()}
    own = {
        swin: model.get_parameter(name)
        for name, swin in names.items()
        if swin is not None and not DROPPED.match(swin)
    }
    state = _official_names(unwrap(_from_transformers(content), own))
    dropped = sorted(k for k in state if DROPPED.match(k))
    state = {k: v for k, v in state.items() if k not in dropped}
    # An ImageNet Swin has no absolute position unless it was trained with one.
    missing = [k for k in own if k not in state and k != "absolute_pos_embed"]
    unknown = [k for k in state if k not in own]
    if any(".fusion." in k for k in unknown):
        raise InputError(
            f"{source} is a trained model, not an ImageNet Swin: start from it with --init_from"
        )
    if unknown == ["absolute_pos_embed"] and not missing:
        side = math.isqrt(state["absolute_pos_embed"].shape[1])
        raise InputError(f"{source} has a position embedding: give --ape {side}")
    if missing or unknown:
        blocks = [{m[0] for k in names if (m := BLOCK.match(k))} for names in (own, state)]
        lacks = (
            f"{len(missing)} weights missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}"
        )
        size = blocks[1] and blocks[0] != blocks[1]
        hint = "choose the --swin_type it was made for" if size else "the names differ"
        raise InputError(f"{source} does not fit this Swin: {lacks}: {hint}")
    for key, value in state.items():
        if not value.is_floating_point():
            raise InputError(f"{source} does not fit this Swin: {key} is of type {value.dtype}")
    resized = [k for k, v in state.items() if v.shape != own[k].shape]
    for key in resized:
        state[key] = resize_weight(key, state[key], own[key].shape, source)
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
    fresh = sum(name.startswith("backbone.") for name, _ in model.named_parameters()) - len(state)
    kinds = sorted({re.sub(r".*\.(?=attn_mask|relative)|\..*", "", k) for k in dropped})
    left_out = f"{len(dropped)} ignored" + (f" ({', '.join(kinds)})" if kinds else "")
    return (
        f"Swin weights of {source}: {len(state)} loaded, {len(resized)} of them resized, "
        f"{left_out}, {fresh} others keep their initial values"
    )


def _read(source: str) -> Mapping[str, Any]:
    path = Path(source)
    if path.is_file() or path.suffix in FILE_TYPES or len(path.parts) > 1:
        return read_checkpoint(path)
    import timm

    if not timm.is_model(source):  # knows names with a tag too: swin_…_224.ms_in1k
        raise InputError(
            f"--pretrained_swin_weights {source}: neither a file nor a model known to timm"
        )
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except (OSError, RuntimeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        raise InputError(
            f"timm could not get {source} ({reason}): give a file by --pretrained_swin_weights"
        ) from e


# transformers' names and the official ones.
TRANSFORMERS = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (r"encoder\.layers\.", "layers."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"attention\.(self|relative_position_bias)\.(?=relative)", "attn."),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"(?<=\d\.)intermediate\.dense\.", "mlp.fc1."),
    (r"(?<=\d\.)output\.dense\.", "mlp.fc2."),
    (r"(^|\.)layernorm\.", r"\1norm."),
    (r"^classifier\.", "head."),
)
KV = ("key", "value")
QUERY = re.compile(r"(.*)attention\.(self\.query|q_proj)\.(weight|bias)$")


def _from_transformers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Official names for transformers', which has queries, keys and values apart."""
    if not any("embeddings.patch_embeddings.projection." in key for key in state):
        return state
    state = dict(state)
    for key in [k for k in state if QUERY.match(k)]:
        keys = [key, *(key.replace("query", n).replace("q_proj", f"{n[0]}_proj") for n in KV)]
        if all(k in state for k in keys):
            joined = torch.cat([state.pop(k) for k in keys])
            state[QUERY.sub(r"\1attn.qkv.\3", key)] = joined
    renamed = {}
    for key, value in state.items():
        for theirs, official in TRANSFORMERS:
            key = re.sub(theirs, official, key)
        renamed[key] = value
    return renamed


def _official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm has patch merging at the start of the next stage, the official release at the end."""
    state = {re.sub(r"^layers_(?=\d)", "layers.", k): v for k, v in state.items()}
    if any(k.startswith("layers.0.downsample.") for k in state):
        return state

    def rename(key: str) -> str:
        match = re.match(r"layers\.(\d+)\.downsample\.(.*)", key)
        return f"layers.{int(match[1]) - 1}.downsample.{match[2]}" if match else key

    return {rename(k): v for k, v in state.items()}


def resized(state: State, own: State, path: str) -> State:
    """The weights of a trained model with position embedding and bias tables of another's size.

    A no-target head that the file lacks stays as the model's.

    Args:
        state: of the file.
        own: of the model.
        path: of the file, for messages.
    """
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
        or (k.startswith("no_target_head.") and k not in state)
    }
    return fitted | kept


def resize_weight(key: str, value: Tensor, shape: torch.Size, source: str) -> Tensor:
    """Bicubic resize of a bias table or a position embedding.

    Args:
        key: name of the weight.
        value: of a file; a position embedding is (1, N, C), as of ImageNet, or (1, C, H, W).
        shape: of the model's weight.
        source: name of the file, for the message.

    Raises:
        InputError: the shapes differ in more than such a grid.
    """
    if key.endswith("relative_position_bias_table"):
        if value.ndim == 2 and value.shape[1] == shape[1] and _is_square(len(value)):
            grid = value.T.unflatten(1, (round(len(value) ** 0.5), -1))
            return _bicubic(grid[None], round(shape[0] ** 0.5)).flatten(2)[0].T
    elif key.endswith("absolute_pos_embed"):
        if value.ndim == 3 and _is_square(value.shape[1]):
            value = value.transpose(1, 2).unflatten(2, (round(value.shape[1] ** 0.5), -1))
        if value.ndim == 4 and value.shape[:2] == shape[:2]:
            return _bicubic(value, shape[-1])
    raise InputError(
        f"{source} does not fit this model: {key} is {tuple(value.shape)}, not {tuple(shape)}: "
        "choose the --swin_type and --ck_bert it was made for"
    )


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _bicubic(grid: Tensor, side: int) -> Tensor:
    with torch.no_grad():
        resized = F.interpolate(grid.float(), (side, side), mode="bicubic", align_corners=False)
        return resized.to(grid.dtype)
