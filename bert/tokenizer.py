"""BERT's tokenizer, over transformers' fast one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from torch import Tensor, nn

from bert import hub
from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase
else:
    Tokenizer = object

PAD_ID = 0
CHUNK = 256  # expressions at once, so that their tokens stay in the processor's cache
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARIES = ("vocab.txt", "tokenizer.json")


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """Load the fast tokenizer of a BERT.

    Args:
        name_or_dir: a name on the hub (bert-base-uncased) or a folder with vocab.txt or
            tokenizer.json.

    Returns:
        The tokenizer, for `encode`.

    Raises:
        InputError: no vocabulary in the folder, or the hub cannot be reached.
    """
    return _load(*hub.locate(name_or_dir, VOCABULARIES, "tokenizer"))


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """All of a tokenizer as text, that of a ``tokenizer.json``."""
    return _core(tokenizer).to_str()


def tokenizer_from(text: str, where: str) -> Tokenizer:
    """The tokenizer of `tokenizer_text`.

    Args:
        text: of an untrusted file.
        where: names it, for messages.

    Raises:
        InputError: it is damaged, or not of a BERT.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        core = tokenizers.Tokenizer.from_str(text)
        special = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    except Exception as error:  # the tokenizer's core raises bare Exception for damaged texts
        raise InputError(
            f"{where} is damaged ({str(error)[:100]}): give its folder by --bert_tokenizer"
        ) from None
    return _checked(tokenizer, where)


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """A fingerprint of the words, their order, and what becomes of capitals and accents."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    texts = [word for word, _ in words]
    rules = str(_tokenize(tokenizer, [f"{texts[-1].upper()} É é 中"]))
    return hashlib.sha256("\n".join([*texts, rules]).encode()).hexdigest()


def vocabulary_in(folder: str) -> str | None:
    """`vocabulary_of` the tokenizer that comes with weights in a folder; None without one."""
    has_one = any(os.path.isfile(os.path.join(folder, name)) for name in VOCABULARIES)
    return vocabulary_of(load_tokenizer(folder)) if has_one else None


def check_vocabulary(tokenizer: Tokenizer, model: nn.Module, known: Any = None) -> None:
    """Check that a tokenizer belongs to a model.

    Args:
        tokenizer: from `load_tokenizer`.
        model: with BERT's word embeddings, some rows more than words if their number was rounded
            up; another model is not checked.
        known: `vocabulary_of` the tokenizer of the weights; None if that is not known.

    Raises:
        InputError: it does not, or it keeps capitals that its vocabulary does not have.
    """
    remedy = "give the tokenizer that belongs to the weights (--bert_tokenizer, --ck_bert)"
    words = len(tokenizer)
    for name, parameter in model.named_parameters():
        rows = len(parameter) if name.endswith("word_embeddings.weight") else words
        if rows != words and rows not in [-(-words // m) * m for m in (8, 16, 32, 64, 128)]:
            what = "words would be unknown" if words < rows else "words would have no embedding"
            raise InputError(
                f"the tokenizer has {words} words, but the text encoder {rows}: {what}; {remedy}"
            )
    lower = next((w for w in tokenizer.get_vocab() if w.isalpha() and w.islower()), "")
    if tokenizer.unk_token_id in _tokenize(tokenizer, [lower.upper()])[0]:
        raise InputError(
            "the tokenizer keeps capitals, but its vocabulary has none, so that words with them "
            "would be unknown: set do_lower_case to true in its tokenizer_config.json"
        )
    if isinstance(known, str) and known != vocabulary_of(tokenizer):
        raise InputError(
            f"the tokenizer's {words} words are not those that the weights were trained with, or "
            f"it treats capitals or accents otherwise; {remedy}"
        )


def encode(
    tokenizer: Tokenizer, expressions: Sequence[str], max_len: int = 20
) -> tuple[Tensor, Tensor]:
    """Tokenise expressions in one batch.

    A long expression is cut and loses its [SEP], as in the release. An empty one is [CLS] [SEP].
    NUL and zero-width characters are dropped; the release's slow tokenizer made the word around
    them [UNK].

    Args:
        tokenizer: from `load_tokenizer`.
        expressions: N texts.
        max_len: N_l.

    Returns:
        ids: (N, N_l) int64, padded with 0.
        mask: (N, N_l) int64, 1 = real token.
    """
    ids, lengths = encode_compact(tokenizer, expressions, max_len)
    mask = np.arange(max_len) < lengths[:, None]
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def encode_compact(
    tokenizer: Tokenizer, expressions: Sequence[str], max_len: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`encode` with a quarter of the memory.

    Returns:
        ids: (N, N_l) int32, padded with 0.
        lengths: (N,) int32, the number of real tokens.
    """
    ids = np.full((len(expressions), max_len), PAD_ID, np.int32)
    lengths = np.zeros(len(expressions), np.int32)
    for start in range(0, len(expressions), CHUNK):
        # Lone surrogates, as in broken JSON and command lines, cannot be tokenised.
        chunk = expressions[start : start + CHUNK]
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in chunk]
        rows = [row[:max_len] for row in _tokenize(tokenizer, texts)]
        counts = np.array([len(row) for row in rows], np.int32)
        lengths[start : start + CHUNK] = counts
        real = np.arange(max_len) < counts[:, None]
        ids[start : start + CHUNK][real] = np.fromiter(chain.from_iterable(rows), np.int32)
    return ids, lengths


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    core = _core(tokenizer)
    # Older versions have only the one that returns offsets, too.
    encode_batch = getattr(core, "encode_batch_fast", core.encode_batch)
    return [found.ids for found in encode_batch(texts, add_special_tokens=True)]


def _core(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer that transformers wraps, without truncation and padding."""
    core = tokenizer.backend_tokenizer
    core.no_padding()
    core.no_truncation()
    return core


def _load(source: str, offline: bool) -> Tokenizer:
    # Loader workers are forked while the tokenizer's threads are idle, and do not tokenise;
    # without this, older tokenizers print a warning in each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers 5 makes this name at run time, where mypy does not see it.
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    try:
        tokenizer = BertTokenizerFast.from_pretrained(source, local_files_only=offline)
    except Exception as error:  # the tokenizer's core raises bare Exception for damaged files
        raise hub.failure("tokenizer", source, error) from None
    return _checked(tokenizer, f"tokenizer '{source}'")


def _checked(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """The tokenizer, if it has BERT's special tokens and others.

    transformers 5 makes up a vocabulary of the special tokens when it finds no file, and both add
    those that a file lacks behind its end, where the network has no embedding for them.
    """
    size = tokenizer.vocab_size
    added = [t for t in SPECIAL_TOKENS if not tokenizer.get_vocab().get(t, size) < size]
    if size <= len(SPECIAL_TOKENS) + 1 or added:
        raise InputError(
            f"{where} has no BERT vocabulary ({size} tokens; "
            f"{', '.join(added or SPECIAL_TOKENS)} must be among others): {hub.REMEDY}"
        )
    return tokenizer
