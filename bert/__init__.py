"""BERT: text encoder and tokenizer, over transformers."""

from bert.text_encoder import (
    build_text_encoder,
    config_from,
    config_values,
    load_bert,
    load_config,
)
from bert.tokenizer import (
    Tokenizer,
    check_vocabulary,
    encode,
    load_tokenizer,
    tokenizer_from,
    tokenizer_text,
    vocabulary_in,
    vocabulary_of,
)

__all__ = [
    "Tokenizer",
    "build_text_encoder",
    "check_vocabulary",
    "config_from",
    "config_values",
    "encode",
    "load_bert",
    "load_config",
    "load_tokenizer",
    "tokenizer_from",
    "tokenizer_text",
    "vocabulary_in",
    "vocabulary_of",
]
