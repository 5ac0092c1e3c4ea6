"""The text encoder: transformers' BERT, without a pooler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import ModelOutput

from bert import hub
from lib.errors import InputError
from lib.weights import is_state, levels, read_checkpoint, unwrap

# What is added to the attention logits of a padded word: no weight is left, and it is a number in
# every type that a forward pass may run in.
HIDDEN = torch.finfo(torch.float16).min

# Names of norms in the first BERT files.
NEW = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
OLD = re.compile("|".join(map(re.escape, NEW)))

WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# What is taken of a config.json, with its lowest and highest value. All else stays there: a
# configuration can also name code, other files, and sizes of lists to be made.
NUMBERS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 10_000_000),
    "hidden_size": (1, 16_384),
    "num_hidden_layers": (1, 200),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 65_536),
    "max_position_embeddings": (1, 1_000_000),
    "type_vocab_size": (1, 1024),
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "initializer_range": (0, 10),
    "layer_norm_eps": (0, 1),
    "pad_token_id": (0, 10_000_000),
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


def load_config(source: BertConfig | str | PathLike[str]) -> BertConfig:
    """A BERT configuration from itself, a folder holding ``config.json``, or a hub name.

    Raises:
        InputError: the folder has no readable config.json, it is not of a BERT, or the hub cannot
            be reached.
    """
    if isinstance(source, BertConfig):
        return source
    name, offline = hub.locate(source, ("config.json",), "BERT")
    try:
        content, _ = BertConfig.get_config_dict(name, local_files_only=offline)
    except Exception as e:  # damaged JSON of many kinds
        raise hub.failure("BERT's config.json of", name, e) from e
    return config_from(content, f"config.json of BERT '{name}'")


def config_values(config: BertConfig) -> dict[str, Any]:
    """What makes a BERT, as plain values; :func:`config_from` reads them."""
    return {key: getattr(config, key) for key in (*NUMBERS, "hidden_act")}


def config_from(content: Any, where: str) -> BertConfig:
    """A BERT configuration from a dictionary; what does not make a BERT is left out.

    Args:
        content: of an untrusted file.
        where: names it, for messages.

    Raises:
        InputError: it is not of a BERT, or a number is not within its limits.
    """

    def wrong(key: str) -> InputError:
        return InputError(f"{where} has {key} {str(content[key])[:40]!r}")

    if not isinstance(content, Mapping):
        raise InputError(f"{where} is no JSON object: {hub.REMEDY}")
    for key, usual in (("model_type", ("bert",)), ("hidden_act", ACTIVATIONS)):
        if content.get(key, usual[0]) not in usual:
            raise wrong(key)
    if content.get("position_embedding_type", "absolute") != "absolute":
        raise wrong("position_embedding_type")
    given = {key: content[key] for key in (*NUMBERS, "hidden_act") if content.get(key) is not None}
    for key, (low, high) in NUMBERS.items():
        kinds = (int,) if high > 10 else (int, float)
        if key in given and not (type(given[key]) in kinds and low <= given[key] <= high):
            raise wrong(key)
    width, heads = (given.get("hidden_size", 768), given.get("num_attention_heads", 12))
    if width % heads:
        raise InputError(f"{where} has {heads} heads for a width of {width}")
    return BertConfig(**given)


class TextEncoder(BertModel):
    """BERT without a pooler, which computes the same whatever the mask holds.

    transformers looks into the mask first, to do without one that hides nothing, and a GPU's queue
    would run empty at every step.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        """Encode sentences.

        Args:
            input_ids: (B, N_l) int64.
            attention_mask: (B, N_l), 1 = real token.

        Returns:
            An output with ``last_hidden_state`` (B, N_l, C_l).
        """
        words = self.embeddings(input_ids=input_ids)
        hidden = (1 - attention_mask.to(words.dtype)) * HIDDEN
        return self.encoder(words, attention_mask=hidden[:, None, None])


def build_text_encoder(source: BertConfig | str | PathLike[str]) -> TextEncoder:
    """BERT with fresh weights, and without a pooler."""
    return TextEncoder(load_config(source), add_pooling_layer=False)


def load_bert(source: str | PathLike[str]) -> BertModel:
    """BERT with the weights of a folder or hub name; a pooler and heads there are left out.

    Raises:
        InputError: no weights to be had, or they lack a part of BERT.
    """
    name, offline = hub.locate(source, WEIGHTS, "BERT")
    model = BertModel(load_config(name), add_pooling_layer=False)
    own = model.state_dict()
    path = hub.file_of(name, WEIGHTS, offline)
    content = levels(read_checkpoint(path))
    found = next((level["bert_model"] for level in content if "bert_model" in level), content[-1])
    if not is_state(found):
        raise InputError(f"{path} holds no weights of a BERT: {hub.REMEDY}")
    renamed = {OLD.sub(lambda m: NEW[m[0]], key): value for key, value in found.items()}
    state = unwrap(renamed, own)
    missing = [key for key in own if key not in state]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of BERT's {len(own)} weights: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; it has "
            f"{next(iter(found))}: give the complete weights by --ck_bert"
        )
    further = f"encoder.layer.{model.config.num_hidden_layers}."
    if any(key.startswith(further) for key in state):
        raise InputError(f"{path} has more layers than the config.json there: {further}")
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        key, shapes = wrong[0], (tuple(state[wrong[0]].shape), tuple(own[wrong[0]].shape))
        raise InputError(f"{path}: {key} is {shapes[0]}, but {shapes[1]} by the config.json there")
    if whole := [key for key in own if not state[key].is_floating_point()]:
        raise InputError(f"{path}: {whole[0]} is of type {state[whole[0]].dtype}, not of floats")
    model.load_state_dict({key: state[key] for key in own})
    return model.eval()
