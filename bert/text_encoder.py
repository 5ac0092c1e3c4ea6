"""The text encoder: transformers' BERT, without a pooler."""

from __future__ import annotations

from os import PathLike

import transformers
from transformers import BertConfig, BertModel

from bert import hub

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_config(source: BertConfig | str | PathLike[str]) -> BertConfig:
    """A BERT configuration from itself, a folder holding ``config.json``, or a hub name.

    Raises:
        InputError: the folder has no readable config.json, or the hub cannot be reached.
    """
    if isinstance(source, BertConfig):
        return source
    name, offline = hub.locate(source, ("config.json",), "BERT")
    try:
        return BertConfig.from_pretrained(name, local_files_only=offline)
    except (OSError, ValueError, TypeError) as e:
        raise hub.failure("BERT's config.json of", name, e) from e


def build_text_encoder(source: BertConfig | str | PathLike[str]) -> BertModel:
    """BERT with fresh weights, (B, N_l) -> ``last_hidden_state`` (B, N_l, C_l); no pooler."""
    return BertModel(load_config(source), add_pooling_layer=False)


def load_bert(source: str | PathLike[str]) -> BertModel:
    """BERT with the weights of a folder or hub name; a pooler there is left out.

    Raises:
        InputError: no weights to be had.
    """
    name, offline = hub.locate(source, WEIGHTS, "BERT")
    # It would report the pooler, which is left out on purpose, in a dozen lines.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return BertModel.from_pretrained(name, add_pooling_layer=False, local_files_only=offline)
    except Exception as e:  # damaged files surface as errors of several libraries
        raise hub.failure("BERT's weights of", name, e) from e
