"""A trained model from its file alone: what the file records, else what its weights show."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import BertConfig

from bert import (
    check_vocabulary,
    config_from,
    config_values,
    load_config,
    load_tokenizer,
    tokenizer_from,
)
from bert.tokenizer import Tokenizer
from lib.checkpoint.layouts import flat_state, load_model, recorded_args
from lib.checkpoint.mismatch import describe, flag, shape, variant_of_names
from lib.errors import InputError
from lib.evaluation.protocol import MASK_MODES, TEXTS, Protocol
from lib.model import Segmenter, State
from lib.segmentation import MODELS, build_model
from lib.variants import CHOICES, ONE_HEAD, PUBLISHED, Variant
from lib.weights import levels, read_checkpoint

# Flags that make a model. A file that tells them decides; see :func:`open_trained`.
OF_MODEL = ("model", "swin_type", "window", "ape", "mha", "fusion_drop", "no_target_head", *CHOICES)
# Names by which weights of a model are found below those that wrappers add.
PROBES = (
    "backbone.patch_embed.proj.weight",
    "backbone.0.patch_embed.proj.weight",
    "text_encoder.embeddings.word_embeddings.weight",
)
# Attention heads of the published BERTs by their width; weights do not show them.
HEADS = {128: 2, 256: 4, 384: 12, 512: 8, 768: 12, 1024: 16}
PLAIN_BERT = "bert-base-uncased"
NAME = re.compile(r"(?!\.+$)[\w.+-]+")  # of a dataset: a folder, no path
MAX_SIDE = 16384  # pixels


@dataclass(frozen=True)
class Trained:
    """A trained model, with what using it needs.

    Attributes:
        model: in eval mode, on the CPU.
        tokenizer: of its text encoder.
        settings: values of :data:`OF_MODEL`, img_size, max_tokens and text; dataset, splitBy and
            mask_mode where the file records them.
        recorded: names of the settings that the file tells; the others are the published defaults.
        summary: one line for the log.
    """

    model: Segmenter
    tokenizer: Tokenizer
    settings: dict[str, Any]
    recorded: frozenset[str]
    summary: str


def open_trained(
    path: str | os.PathLike[str],
    given: Mapping[str, Any] = MappingProxyType({}),
    *,
    accelerate: bool = True,
) -> Trained:
    """Rebuild a trained model from its file.

    Checkpoints of train.py record everything. Of published ones, names and shapes of the weights
    tell most; the rest are the published defaults.

    Args:
        path: a checkpoint, or a folder of ``tools.export --format pretrained``.
        given: values of :data:`OF_MODEL` that the user gave; ``max_tokens``, if another than the
            file's; ``ck_bert`` and ``bert_tokenizer``, folders or hub names, for a file that has
            no text configuration or vocabulary.
        accelerate: see :func:`lib.segmentation.build_model`.

    Raises:
        InputError: the file cannot be read, is not of a model, or contradicts what is given; or it
            has no vocabulary, and none is to be had.
    """
    if Path(path).is_dir():
        from lib.checkpoint.pretrained import read_folder

        content = read_folder(Path(path))
    else:
        content = read_checkpoint(path)
    state = flat_state(content, path, PROBES)
    recorded = recorded_args(content)
    known = _known_flags(content, recorded, state, path)
    for name, value in given.items():
        if name in known and not _same(name, value, known[name], recorded):
            raise InputError(
                f"{flag(name, value)} contradicts {path}, which is of "
                f"{flag(name, known[name])}: leave the flag out"
            )
    settings: dict[str, Any] = {"mha": ONE_HEAD, "fusion_drop": 0.0, "ape": 0, "swin_type": "base"}
    settings |= {"window": 12, **_published_variant(known, given, state, path)}
    settings |= known | {k: v for k, v in given.items() if k in OF_MODEL}
    protocol = _protocol(recorded, path)
    usual = Protocol(max_tokens=MODELS[settings["model"]].max_tokens)
    settings |= {name: getattr(usual, name) for name in ("img_size", "max_tokens", "text")}
    settings |= protocol
    config, bert_known = _text_config(content, given, state, path)
    model = build_model(
        settings["model"],
        swin_type=settings["swin_type"],
        window_size=settings["window"],
        text_config=config,
        drop_path=0.0,
        ape_grid=settings["ape"],
        mha="" if settings["mha"] in ("", ONE_HEAD) else settings["mha"],
        fusion_drop=settings["fusion_drop"],
        no_target_head=settings["no_target_head"],
        max_tokens=given.get("max_tokens") or settings["max_tokens"],
        variant=Variant(**{name: settings[name] for name in CHOICES}),
        accelerate=accelerate,
    )
    load_model(model, content, path)
    tokenizer = _tokenizer(content, given, path)
    check_vocabulary(tokenizer, model, recorded.get("vocabulary"))
    known |= protocol
    summary = _summary(path, settings, known, bert_known, config)
    return Trained(model.eval(), tokenizer, settings, frozenset(known), summary)


def _known_flags(
    content: Mapping[str, Any],
    recorded: Mapping[str, Any],
    state: State,
    path: str | os.PathLike[str],
) -> dict[str, Any]:
    """Values of :data:`OF_MODEL` that the file tells, by its record or by its weights.

    Raises:
        InputError: a value is not possible.
    """
    for name in recorded.keys() & OF_MODEL:
        kinds: dict[str, Any] = {"window": int, "ape": int, "fusion_drop": (int, float)}
        kind = (kinds | {"no_target_head": bool}).get(name, str)
        value = recorded[name]
        if not (value is None or isinstance(value, kind)):
            raise InputError(f"{path} records {name} {str(value)[:40]!r}: it is damaged")
    seen = describe(state)
    known = {name: recorded[name] for name in OF_MODEL if recorded.get(name) is not None}
    if "mha" in known:
        known["mha"] = known["mha"] or ONE_HEAD
    if known.get("model", "lavt") not in MODELS:
        raise InputError(f"{path} is of model '{known['model']}': there are {', '.join(MODELS)}")
    if "model" not in known:
        separate = any("bert_model" in level for level in levels(content))
        lavt = "lavt" if separate else "lavt_one"
        known["model"] = "crossvlt" if seen["model"] == "crossvlt" else lavt
    # Shapes cannot be wrong.
    known |= {k: seen[k] for k in ("swin_type", "window") if seen[k] is not None}
    known["no_target_head"] = seen["no_target_head"]
    if seen["swin_type"] is not None:
        known["ape"] = seen["ape"]
    if known["model"] in ("lavt", "lavt_one"):
        shown = variant_of_names(state)
        known = {k: v for k, v in shown.items() if v in CHOICES[k]} | known
    return known


def _published_variant(
    known: Mapping[str, Any], given: Mapping[str, Any], state: State, path: str | os.PathLike[str]
) -> dict[str, str]:
    """The published value of each flag of the variant that neither file nor user tells.

    Raises:
        InputError: the weights are not of the published network, nor of a single other one.
    """
    if known["model"] not in ("lavt", "lavt_one"):
        return {name: getattr(PUBLISHED, name) for name in CHOICES}
    for name, value in variant_of_names(state).items():
        if name in known or name in given or getattr(PUBLISHED, name) in value.split(" or "):
            continue
        if not (name == "lang_path" and known.get("gate", given.get("gate")) == "off"):
            raise InputError(f"{path} does not tell its variant: give --{name} {value}")
    return {name: getattr(PUBLISHED, name) for name in CHOICES}


def _same(name: str, given: Any, known: Any, recorded: Mapping[str, Any]) -> bool:
    """Whether a flag agrees with the file."""
    if name == "mha":
        return bool((given or ONE_HEAD) == known)
    if name == "model" and "model" not in recorded:  # one network, two layouts of its files
        return given == known or {given, known} == {"lavt", "lavt_one"}
    return bool(given == known)


def _text_config(
    content: Mapping[str, Any],
    given: Mapping[str, Any],
    state: State,
    path: str | os.PathLike[str],
) -> tuple[BertConfig, bool]:
    """The configuration of the text encoder, and whether the file or the user told all of it.

    Raises:
        InputError: nothing tells it, or what does is damaged or contradicts the file.
    """
    shown = _text_shapes(state)
    held = content.get("bert")
    folder = given.get("ck_bert")
    if isinstance(held, Mapping) and "config" in held:
        config = config_from(held["config"], f"{path}: its record of BERT")
        source = str(path)
        if folder:
            wanted, has = config_values(load_config(folder)), config_values(config)
            for key in ("hidden_act", *shown, "num_attention_heads", "layer_norm_eps"):
                if wanted[key] != has[key]:
                    raise InputError(
                        f"--ck_bert {folder} has {key} {wanted[key]}, {path} {has[key]}: leave the "
                        "flag out"
                    )
    elif folder or Path(given.get("bert_tokenizer") or "", "config.json").is_file():
        source = folder or given["bert_tokenizer"]
        config = load_config(source)
    else:
        width = shown.get("hidden_size")
        if width is None:
            raise InputError(f"{path} holds no text encoder (bert_model or text_encoder.*)")
        if width not in HEADS:
            raise InputError(
                f"{path} does not tell the heads of its BERT of width {width}: give its folder or "
                "hub name by --ck_bert"
            )
        return BertConfig(**shown, num_attention_heads=HEADS[width]), False
    for key, value in shown.items():
        stages = key == "num_hidden_layers" and any(k.startswith("lang_stage1.") for k in state)
        if not stages and getattr(config, key) != value:
            raise InputError(
                f"{path}: its text encoder has {key} {value}, but {source} {getattr(config, key)}"
            )
    return config, True


def _text_shapes(state: State) -> dict[str, Any]:
    """What the shapes of weights tell of the text encoder's configuration."""
    shown = {
        "vocab_size": shape(state, "embeddings.word_embeddings.weight", 0),
        "hidden_size": shape(state, "embeddings.word_embeddings.weight", 1),
        "num_hidden_layers": describe(state)["text_layers"] or None,
        "intermediate_size": shape(state, "layer.0.intermediate.dense.weight", 0),
        "max_position_embeddings": shape(state, "embeddings.position_embeddings.weight", 0),
        "type_vocab_size": shape(state, "embeddings.token_type_embeddings.weight", 0),
    }
    return {key: value for key, value in shown.items() if value is not None}


def _tokenizer(
    content: Mapping[str, Any], given: Mapping[str, Any], path: str | os.PathLike[str]
) -> Tokenizer:
    held = content.get("bert")
    text = held.get("tokenizer") if isinstance(held, Mapping) else None
    if given.get("bert_tokenizer") or not isinstance(text, str):
        return load_tokenizer(given.get("bert_tokenizer") or PLAIN_BERT)
    return tokenizer_from(text, f"the tokenizer in {path}")


def _protocol(recorded: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file records of its input and data.

    Raises:
        InputError: a value is not possible.
    """
    found = {}
    for name in ("img_size", "max_tokens", "text", "mask_mode", "dataset", "splitBy"):
        value = recorded.get(name)
        if value is None:
            continue
        if name in ("img_size", "max_tokens"):
            fine = type(value) is int and 0 < value <= MAX_SIDE
        elif name in ("text", "mask_mode"):
            fine = value in (TEXTS if name == "text" else MASK_MODES)
        else:
            fine = isinstance(value, str) and bool(NAME.fullmatch(value))
        if not fine:
            raise InputError(f"{path} records {name} {str(value)[:40]!r}: it is damaged")
        found[name] = value
    return found


def _summary(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    known: Mapping[str, Any],
    bert_known: bool,
    config: BertConfig,
) -> str:
    """What the model is, and what of it the file does not tell."""
    usual = {"fusion_drop": 0.0, "ape": 0, "mha": ONE_HEAD, "text": "raw", "no_target_head": False}
    usual |= {name: getattr(PUBLISHED, name) for name in CHOICES}
    names = [*OF_MODEL, "img_size", "max_tokens", "text"]
    shown = [f"{n} {settings[n]}" for n in names if n in known and settings[n] != usual.get(n)]
    line = f"{path}: {', '.join(shown)}"
    if "dataset" in known:
        line += f"; trained on {settings['dataset']} ({settings.get('splitBy', '?')})"
    of_no_matter = {"fusion_drop", *CHOICES}  # for training alone; published, or names would tell
    assumed = [f"{n} {settings[n]}" for n in names if not (n in known or n in of_no_matter)]
    if not bert_known:
        assumed.append(f"BERT's heads {config.num_attention_heads}")
    return line + (f"; not in the file: {', '.join(assumed)}" if assumed else "")
