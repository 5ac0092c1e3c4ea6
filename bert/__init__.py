"""BERT: text encoder and tokenizer, over transformers."""

from bert.text_encoder import build_text_encoder, load_bert, load_config
from bert.tokenizer import Tokenizer, encode, load_tokenizer

__all__ = [
    "Tokenizer",
    "build_text_encoder",
    "encode",
    "load_bert",
    "load_config",
    "load_tokenizer",
]
