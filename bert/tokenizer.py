"""BERT's tokenizer, over transformers' fast one."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase
else:
    Tokenizer = object

FILES = "config.json, vocab.txt, tokenizer_config.json and model.safetensors (or pytorch_model.bin)"
REMEDY = f"put {FILES} into a folder and pass it as --bert_tokenizer FOLDER --ck_bert FOLDER"
HUB_TIMEOUT = 10.0  # seconds
PAD_ID = 0
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """Load the fast tokenizer of a BERT.

    Args:
        name_or_dir: a name on the hub (bert-base-uncased) or a folder with vocab.txt or
            tokenizer.json.

    Returns:
        The tokenizer, for `encode`.

    Raises:
        InputError: no vocabulary there, or no network and the name not in the hub's cache.
    """
    name = str(name_or_dir)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("vocab.txt", "tokenizer.json")):
            raise InputError(f"folder {folder} has no vocab.txt: {REMEDY}")
        return _load(str(folder), offline=True)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise InputError(f"'{name}' is not a folder (--bert_tokenizer): {REMEDY}")
    offline = _cached(name)
    if not offline and not hub_answers(name):
        raise InputError(
            f"tokenizer '{name}' is neither a folder nor in the cache, and the hub cannot be "
            f"reached: {REMEDY}"
        )
    return _load(name, offline)


def encode(
    tokenizer: Tokenizer, sentences: Sequence[str], max_len: int = 20
) -> tuple[Tensor, Tensor]:
    """Tokenise sentences in one batch.

    An expression is tokenised whole, then cut, so that a long one loses its [SEP], as in the
    release. An empty one is [CLS] [SEP]. Two kinds of text get other ids than the release's
    slow tokenizer gave: NUL and zero-width characters are dropped here, while that made the
    word around them [UNK].

    Args:
        tokenizer: from `load_tokenizer`.
        sentences: N texts.
        max_len: N_l.

    Returns:
        ids: (N, N_l) int64, padded with 0.
        mask: (N, N_l) int64, 1 = real token.
    """
    ids = np.full((len(sentences), max_len), PAD_ID, np.int64)
    mask = np.zeros_like(ids)
    # Half a surrogate pair, as broken JSON and command lines have it, cannot be tokenised.
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in sentences]
    for i, row in enumerate(_tokenize(tokenizer, texts)):
        kept = row[:max_len]
        ids[i, : len(kept)] = kept
        mask[i, : len(kept)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts over BERT's 512 tokens: they are cut afterwards
    )["input_ids"]


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a model's files.

    transformers itself retries for minutes where there is no network.

    Args:
        name: of the model.

    Returns:
        True where the hub answered at all, within `HUB_TIMEOUT` seconds.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(
        f"{constants.ENDPOINT}/{name}/resolve/main/config.json", method="HEAD"
    )
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
                answered.set()
        except urllib.error.HTTPError:  # an answer too; transformers explains it
            answered.set()
        except (OSError, ValueError):
            pass

    # A thread, because looking up the host's name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answered.is_set()


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("vocab.txt", "tokenizer.json")
    )


def _load(source: str, offline: bool) -> Tokenizer:
    # The tokenizer's threads are idle when loader workers are forked, and workers do not
    # tokenise; unset, each fork would print a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import BertTokenizerFast

    try:
        tokenizer = BertTokenizerFast.from_pretrained(source, local_files_only=offline)
    except Exception as error:  # the tokenizer's core raises bare Exception for damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load tokenizer '{source}' ({lines[0][:160]}): {REMEDY}") from None
    vocabulary = tokenizer.get_vocab()
    # transformers 5 makes up a vocabulary of five special tokens when it finds no file.
    if len(vocabulary) <= 5 or any(token not in vocabulary for token in SPECIAL_TOKENS):
        raise InputError(
            f"tokenizer '{source}' has no BERT vocabulary ({len(vocabulary)} tokens; "
            f"{', '.join(SPECIAL_TOKENS)} are needed): {REMEDY}"
        )
    return tokenizer
