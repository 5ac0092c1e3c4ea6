"""BERT: text encoder and tokenizer, over transformers."""

from bert.text_encoder import build_text_encoder, load_config, load_pretrained

__all__ = ["build_text_encoder", "load_config", "load_pretrained"]
