"""The text encoder: transformers' BERT, without a pooler."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from transformers import BertConfig, BertModel

from lib.errors import InputError

FILES_HELP = (
    "put config.json, vocab.txt, tokenizer_config.json and model.safetensors (or "
    "pytorch_model.bin) of bert-base-uncased into one folder and give it as --ck_bert FOLDER "
    "--bert_tokenizer FOLDER"
)


def load_config(source: BertConfig | str | PathLike[str]) -> BertConfig:
    """A BERT configuration from itself, a folder holding ``config.json``, or a hub name.

    Raises:
        InputError: the folder has no readable config.json, or the hub cannot be reached.
    """
    if isinstance(source, BertConfig):
        return source
    name = fspath(source)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"no config.json in {name}: {FILES_HELP}")
    try:
        return BertConfig.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise InputError(_unreachable(name, e)) from e


def build_text_encoder(source: BertConfig | str | PathLike[str]) -> BertModel:
    """BERT with fresh weights, (B, N_l) -> ``last_hidden_state`` (B, N_l, C_l); no pooler."""
    return BertModel(load_config(source), add_pooling_layer=False)


def load_pretrained(encoder: BertModel, source: str | PathLike[str]) -> None:
    """Fill ``encoder`` with the weights of a folder or hub name; a pooler there is left out.

    Raises:
        InputError: no weights to be had, or of another size.
    """
    name = fspath(source)
    try:
        loaded = BertModel.from_pretrained(name, add_pooling_layer=False)
    except (OSError, ValueError) as e:
        raise InputError(_unreachable(name, e)) from e
    try:
        encoder.load_state_dict(loaded.state_dict())
    except RuntimeError as e:
        raise InputError(f"the BERT weights of {name} do not fit its config.json") from e


def _unreachable(name: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"cannot load BERT from '{name}' ({first_line[:160]}): {FILES_HELP}"
