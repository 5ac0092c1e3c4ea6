"""Why the weights of a file do not fit a model, in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lib.errors import InputError
from lib.model import State
from lib.swin import SWIN_SIZES

BLOCK = re.compile(r"backbone\.(?:layers\.(\d)|(\d)\.layers)\.blocks\.(\d+)\.")
TEXT_LAYER = re.compile(r"(?:text_encoder|lang_stage1)\.encoder\.layer\.(\d+)\.")
# Parts of the names of weights that not every variant has.
OPTIONAL_PARTS = {"absolute_pos_embed", "res_gate", "fusion", "project_mm", "lang_project"}
OPTIONAL_PARTS |= {"vis_project", "image_lang_att", "f_key", "f_query", "f_value", "W", "norm"}
OPTIONAL_PARTS |= {"no_target_head", "running_mean", "running_var", "num_batches_tracked"}


def mismatch(
    path: str | os.PathLike[str],
    own: State,
    state: State,
    asked_for: dict[str, str],
    trained: dict[str, str],
) -> InputError:
    """The error to raise for weights that do not fit.

    Args:
        path: of the file.
        own: the model's weights.
        state: the file's.
        asked_for, trained: flags that names and shapes need not show, of the model and of the file.
    """
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    asked = describe(own) | variant_of_names(own) | asked_for
    held = describe(state) | variant_of_names(state) | trained
    differ = [k for k in held if held[k] != asked[k]]
    known = OPTIONAL_PARTS.union(*(k.split(".") for k in own))
    strange = [k for k in extra if not known.issuperset(re.sub(r"\.\d+", "", k).split("."))]
    if not any(map(BLOCK.match, state)) or (strange and "model" not in differ and missing):
        return InputError(
            f"{path} has other names than this model, like {(strange or extra)[0]} where "
            f"{missing[0]} is expected: give a checkpoint of train.py or LAVT's"
        )
    if held["text_width"] is None:
        return InputError(f"{path} holds no text encoder (bert_model or text_encoder.*)")
    if differ and None not in [held[k] for k in differ]:
        fit = " ".join(flag(k, held[k]) for k in differ)
        return InputError(f"{path} is not of the model of these flags; it would fit: {fit}")
    found = (("missing", missing), ("unknown", extra), ("of another shape", wrong))
    reasons = [f"{len(k)} weights {what}, like {k[0]}" for what, k in found if k]
    return InputError(f"{path} does not fit this model: {'; '.join(reasons)}")


def shape(state: State, suffix: str, axis: int) -> int | None:
    """The length of an axis of the first weight whose name ends so."""
    shapes = [v.shape for k, v in state.items() if k.endswith(suffix) and v.ndim > axis]
    return shapes[0][axis] if shapes else None


def describe(state: State) -> dict[str, Any]:
    """The flags that a state dict's names and shapes show; None for the others."""
    width = shape(state, "patch_embed.proj.weight", 0)
    blocks = {match.groups("") for k in state if (match := BLOCK.match(k))}
    depths = [sum(i in (a, b) for a, b, _ in blocks) for i in "0123"]
    types = [
        name
        for name, size in SWIN_SIZES.items()
        if size.embed_dim == width and list(size.depths) == depths
    ]
    table = shape(state, "blocks.0.attn.relative_position_bias_table", 0)
    return {
        "model": "crossvlt" if any(k.startswith("lang_stage1.") for k in state) else "lavt",
        "swin_type": types[0] if types else None,
        "window": (int(table**0.5) + 1) // 2 if table else None,
        "ape": shape(state, "absolute_pos_embed", 2) or 0,
        "no_target_head": "no_target_head.weight" in state,
        "text_width": shape(state, "embeddings.word_embeddings.weight", 1),
        "text_layers": len({match[1] for k in state if (match := TEXT_LAYER.match(k))}),
        "vocabulary": shape(state, "embeddings.word_embeddings.weight", 0),
    }


def flag(key: str, value: Any) -> str:
    """A flag and its value as on a command line."""
    if key == "window":
        return "--window12" if value == 12 else f"window {value} (no --window12)"
    if key == "ape":
        return f"--ape {value}"
    if key == "no_target_head":
        return "--no_target_head" if value else "no --no_target_head"
    if key in ("text_width", "text_layers", "vocabulary"):
        return f"--ck_bert and --bert_tokenizer with {key.replace('_', ' ')} {value}"
    return f"--{key} {value}"


def variant_of_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What names and shapes of weights show of the variant, as flags and their values."""

    def has(part: str) -> bool:
        return any(part in name for name in state)

    project = [v for k, v in state.items() if k.endswith(".fusion.project_mm.0.weight")]
    join = "concat" if project and project[0].shape[1] > project[0].shape[0] else "add or mul"
    affine = "batch" if has(".f_query.1.norm.running_mean") else "layer"
    no_gate = has(".fusion.") and not has(".res_gate.")
    only_words = has(".image_lang_att.") and not has(".fusion.vis_project.")
    return {
        "fusion": join if has(".fusion.lang_project.") else "pwam",
        "pwam_norm": affine if has(".f_query.1.norm.") else "instance or none",
        "pwam_combine": "words" if only_words else "mul or add",
        "lang_path": "off (or --gate off)" if no_gate else "on",
    }
