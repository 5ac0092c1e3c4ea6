"""Load ImageNet Swin weights, in the official or timm's layout, into the backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.checkpoint.files import read_checkpoint
from lib.errors import InputError
from lib.model import Segmenter

# The classifier, and buffers that the model computes.
DROPPED = re.compile(r"(head|norm)\.|.*\.(attn_mask|relative_position_index)$")
FILE_TYPES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def load_swin_weights(model: Segmenter, source: str) -> str:
    """Load the Swin part of a model; fusion, gates and output norms keep their initial values.

    Args:
        model: its ``swin_name`` maps its names to Swin's.
        source: a file in the official layout ({'model': …} or bare, .pth or .safetensors) or in
            timm's, or the name of a timm model (needs the network).

    Returns:
        One line for the log: what was loaded, resized and ignored.

    Raises:
        InputError: no such file, or a weight is unknown, missing or of another shape.
    """
    state = _read(source)
    content = state.get("model", state)
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise InputError(f"{source} holds no Swin weights: give an ImageNet Swin checkpoint")
    state = _official_names(dict(content))
    dropped = sorted(k for k in state if DROPPED.match(k))
    state = {k: v for k, v in state.items() if k not in dropped}

    names = {name: model.swin_name(name) for name in model.state_dict()}
    own = {
        swin: model.get_parameter(name)
        for name, swin in names.items()
        if swin is not None and not DROPPED.match(swin)
    }
    # An ImageNet Swin has no absolute position unless it was trained with one.
    missing = [k for k in own if k not in state and k != "absolute_pos_embed"]
    unknown = [k for k in state if k not in own]
    if missing or unknown:
        raise InputError(
            f"{source} does not fit this Swin: {len(missing)} weights missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}: choose the --swin_type it was made for"
        )
    for key, value in state.items():
        if not value.is_floating_point():
            raise InputError(f"{source} does not fit this Swin: {key} is of type {value.dtype}")
    resized = [k for k, v in state.items() if v.shape != own[k].shape]
    for key in resized:
        state[key] = _resize(key, state[key], own[key], source)
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


def _read(source: str) -> dict[str, Tensor]:
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


def _official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm has patch merging at the start of the next stage, the official release at the end."""
    if any(k.startswith("layers.0.downsample.") for k in state):
        return state

    def rename(key: str) -> str:
        match = re.match(r"layers\.(\d+)\.downsample\.(.*)", key)
        return f"layers.{int(match[1]) - 1}.downsample.{match[2]}" if match else key

    return {rename(k): v for k, v in state.items()}


def _resize(key: str, value: Tensor, own: Tensor, source: str) -> Tensor:
    """Bicubic resize of a bias table or a position embedding to our size."""
    is_table = key.endswith("relative_position_bias_table")
    if is_table and value.shape[1:] == own.shape[1:] and _is_square(value.shape[0]):
        side, new = round(value.shape[0] ** 0.5), round(own.shape[0] ** 0.5)
        grid = value.float().T.reshape(1, -1, side, side)
        return _bicubic(grid, new).flatten(2)[0].T.to(value.dtype)
    is_position = key == "absolute_pos_embed" and value.ndim == 3
    if is_position and value.shape[2] == own.shape[1] and _is_square(value.shape[1]):
        side = round(value.shape[1] ** 0.5)
        grid = value.float().transpose(1, 2).reshape(1, -1, side, side)
        return _bicubic(grid, own.shape[-1]).to(value.dtype)
    raise InputError(
        f"{source} does not fit this Swin: {key} is {tuple(value.shape)}, not {tuple(own.shape)}: "
        "choose the --swin_type it was made for"
    )


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _bicubic(grid: Tensor, side: int) -> Tensor:
    with torch.no_grad():
        return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
