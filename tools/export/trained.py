"""A trained model from its checkpoint alone; stands in for lib.checkpoint.open_trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from args import model_options, parse_test
from bert import Tokenizer, check_vocabulary, load_tokenizer
from lib import checkpoint
from lib.errors import InputError
from lib.model import Segmenter
from lib.variants import CHOICES

NAMES = ("model", "swin_type", "mha", "ape", "ck_bert", "bert_tokenizer", "max_tokens", *CHOICES)


@dataclass
class Trained:
    """A trained model, in eval mode on the CPU, with what belongs to it."""

    model: Segmenter
    tokenizer: Tokenizer
    settings: dict[str, Any]


def open_trained(path: str, given: Mapping[str, Any]) -> Trained:
    """Build a checkpoint's model from the flags that are stored in it; ``given`` ones win."""
    stored = checkpoint.read_checkpoint(path).get("args")
    stored = vars(stored) if hasattr(stored, "__dict__") else stored
    if not isinstance(stored, dict):
        raise InputError(f"{path} does not say which model it holds")
    settings = {**stored, **given}
    words = [f"--{name}={settings[name]}" for name in NAMES if settings.get(name) not in (None, "")]
    words += ["--window12"] if settings.get("window") == 12 else []
    args = parse_test(["--resume", path, "--accelerate", "off", *words])
    model = checkpoint.load_trained(args.model, path, **model_options(args)).eval()
    tokenizer = load_tokenizer(args.bert_tokenizer)
    check_vocabulary(tokenizer, model, model.trained_with.get("vocabulary"))
    return Trained(model, tokenizer, {**vars(args), **settings})
