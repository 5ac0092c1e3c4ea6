"""BERT: text encoder and tokenizer, over transformers."""

from bert.text_encoder import build_text_encoder, load_bert, load_config
from bert.tokenizer import (
    Tokenizer,
    check_vocabulary,
    encode,
    load_tokenizer,
    vocabulary_in,
    vocabulary_of,
)

__all__ = [
    "Tokenizer",
    "build_text_encoder",
    "check_vocabulary",
    "encode",
    "load_bert",
    "load_config",
    "load_tokenizer",
    "vocabulary_in",
    "vocabulary_of",
]
