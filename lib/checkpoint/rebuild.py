"""A trained model from its file alone: what the file records, else what its weights show."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

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
from lib.swin import SWIN_SIZES
from lib.variants import CHOICES, ONE_HEAD, PUBLISHED, Variant
from lib.weights import levels, read_checkpoint

T = TypeVar("T")

# Flags that make a model. A file that tells them decides; see :func:`open_trained`.
OF_MODEL = ("model", "swin_type", "window", "ape", "mha", "fusion_drop", "no_target_head", *CHOICES)
OF_USE = ("img_size", "max_tokens", "text", "mask_mode", "dataset", "splitBy")
OF_BERT = ("ck_bert", "bert_tokenizer")
POSSIBLE: Mapping[str, Collection[str]] = {
    "model": MODELS,
    "swin_type": SWIN_SIZES,
    "text": TEXTS,
    "mask_mode": MASK_MODES,
    **CHOICES,
}
# Names by which weights of a model are found below those that wrappers add.
PROBES = (
    "backbone.patch_embed.proj.weight",
    "backbone.0.patch_embed.proj.weight",
    "text_encoder.embeddings.word_embeddings.weight",
)
# Attention heads of the published BERTs by their width; weights do not show them.
HEADS = {128: 2, 256: 4, 384: 12, 512: 8, 768: 12, 1024: 16}
PLAIN_BERT = "bert-base-uncased"
NAME = re.compile(r"(?!\.+$)[\w.+-]+(,(?!\.+$)[\w.+-]+)*")  # of datasets: folders, no paths
MAX_SIDE = 16384  # pixels


@dataclass(frozen=True)
class Trained:
    """A trained model, with what using it needs.

    Attributes:
        model: in eval mode, on the CPU.
        tokenizer: of its text encoder.
        settings: values of :data:`OF_MODEL`, img_size, max_tokens and text; dataset, splitBy and
            mask_mode where the file records them.
        recorded: names of the settings that the file tells; the others were given, or are the
            published defaults.
        assumed: what is taken as published because nothing tells it, in words.
        summary: one line for the log.
    """

    model: Segmenter
    tokenizer: Tokenizer
    settings: dict[str, Any]
    recorded: frozenset[str]
    assumed: tuple[str, ...]
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
    recorded = _recorded(content, path)
    known = _known_flags(content, recorded, state)
    for name, value in given.items():
        if name in known and not _same(name, value, known[name], recorded):
            raise InputError(
                f"{flag(name, value)} contradicts {path}, which is of "
                f"{flag(name, known[name])}: leave the flag out"
            )
    settings: dict[str, Any] = {"mha": ONE_HEAD, "fusion_drop": 0.0, "ape": 0, "swin_type": "base"}
    settings |= {"window": 12, **_published_variant(known, given, state, path)}
    settings |= known | {k: v for k, v in given.items() if k in OF_MODEL}
    usual = Protocol(max_tokens=MODELS[settings["model"]].max_tokens)
    settings |= {name: getattr(usual, name) for name in ("img_size", "max_tokens", "text")}
    settings |= {name: recorded[name] for name in OF_USE if name in recorded}
    config, bert_known = _text_config(content, recorded, given, state, path)
    try:
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
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    # What the record lacks is known by now.
    load_model(model, content, path, recorded=recorded | {k: settings[k] for k in OF_MODEL})
    tokenizer = _tokenizer(content, recorded, given, path)
    check_vocabulary(tokenizer, model, recorded.get("vocabulary"))
    told = frozenset(known.keys() | (recorded.keys() & OF_USE))
    assumed = _assumed(settings, told | given.keys(), bert_known, config)
    summary = _summary(path, settings, told | given.keys(), assumed)
    return Trained(model.eval(), tokenizer, settings, told, assumed, summary)


def _recorded(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file records in ``args``, as far as it is of use here.

    Raises:
        InputError: a value is not possible.
    """
    args = content.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    plain = recorded_args(content)
    found = {}
    for name in {*OF_MODEL, *OF_USE, *OF_BERT, "vocabulary"} & args.keys():
        value = args[name]
        if value is None:
            continue
        if name in ("img_size", "max_tokens"):
            fine = type(value) is int and 0 < value <= MAX_SIDE
        elif name in ("window", "ape"):
            fine = type(value) is int and 0 <= value <= MAX_SIDE
        elif name == "fusion_drop":
            fine = type(value) in (int, float) and 0 <= value < 1
        elif name == "no_target_head":
            fine = type(value) is bool
        elif name in POSSIBLE:
            fine = isinstance(value, str) and value in POSSIBLE[name]
        elif name in ("dataset", "splitBy"):
            fine = isinstance(value, str) and bool(NAME.fullmatch(value))
        else:
            fine = isinstance(value, str)
        if not fine or name not in plain:
            raise InputError(f"{path} records {name} {str(value)[:40]!r}: it is damaged")
        found[name] = value
    return found


def _known_flags(
    content: Mapping[str, Any], recorded: Mapping[str, Any], state: State
) -> dict[str, Any]:
    """Values of :data:`OF_MODEL` that the file tells, by its record or by its weights."""
    seen = describe(state)
    known = {name: recorded[name] for name in OF_MODEL if name in recorded}
    if "mha" in known:
        known["mha"] = known["mha"] or ONE_HEAD
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
    unknown = [
        f"--{name} {value}"
        for name, value in variant_of_names(state).items()
        if not (name in known or name in given or getattr(PUBLISHED, name) in value.split(" or "))
        and not (name == "lang_path" and "off" in (known.get("gate"), given.get("gate")))
    ]
    if unknown:
        raise InputError(f"{path} does not tell its variant: give {' and '.join(unknown)}")
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
    recorded: Mapping[str, Any],
    given: Mapping[str, Any],
    state: State,
    path: str | os.PathLike[str],
) -> tuple[BertConfig, bool]:
    """The configuration of the text encoder, and whether the file or the user told all of it.

    Raises:
        InputError: nothing tells it, or what does is damaged or contradicts the file.
    """
    shown = _text_shapes(state)
    folder = given.get("ck_bert")
    if "bert" in content:
        config = config_from(_bert(content, path)["config"], f"{path}: its record of BERT")
        source = "its record"
        if folder and folder != recorded.get("ck_bert"):
            wanted, has = config_values(_own(load_config, folder, path)), config_values(config)
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


def _bert(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The record of the text encoder: its configuration and its tokenizer.

    Raises:
        InputError: it is damaged.
    """
    held = content["bert"]
    if not (isinstance(held, Mapping) and isinstance(held.get("tokenizer"), str)):
        raise InputError(f"{path}: its record of BERT is damaged")
    return {"config": held.get("config"), "tokenizer": held["tokenizer"]}


def _own(load: Callable[[str], T], source: str, path: str | os.PathLike[str]) -> T:
    """Load what was given although the file has its own."""
    try:
        return load(source)
    except InputError as e:
        raise InputError(f"{path} has its own BERT, leave the flag out; {e}") from e


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
    content: Mapping[str, Any],
    recorded: Mapping[str, Any],
    given: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> Tokenizer:
    """The tokenizer that was given, else that of the file, else bert-base-uncased's."""
    source = given.get("bert_tokenizer")
    if "bert" not in content:
        return load_tokenizer(source or PLAIN_BERT)
    if source and source != recorded.get("bert_tokenizer"):
        return _own(load_tokenizer, source, path)
    return tokenizer_from(_bert(content, path)["tokenizer"], f"the tokenizer in {path}")


def _assumed(
    settings: Mapping[str, Any], told: Collection[str], bert_known: bool, config: BertConfig
) -> tuple[str, ...]:
    """What is taken as published because neither file nor user tells it."""
    names = ["img_size", "max_tokens", "text"]
    of_lavt = settings["model"] in ("lavt", "lavt_one")
    found = [f"{n} {settings[n]}" for n in ["mha"] * of_lavt + names if n not in told]
    silent = ("gate", "pwam_attention", "pwam_combine", "decoder_features")
    if of_lavt and not set(silent).issubset(told):
        found.append("the variant as far as weights do not show it")
    if not bert_known:
        found.append(f"BERT's heads {config.num_attention_heads} and its {config.hidden_act}")
    return tuple(found)


def _summary(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    told: Collection[str],
    assumed: Sequence[str],
) -> str:
    """What the model is, and what of it is assumed."""
    usual = {"fusion_drop": 0.0, "ape": 0, "mha": ONE_HEAD, "text": "raw", "no_target_head": False}
    usual |= {name: getattr(PUBLISHED, name) for name in CHOICES}
    names = [*OF_MODEL, "img_size", "max_tokens", "text"]
    shown = [f"{n} {settings[n]}" for n in names if n in told and settings[n] != usual.get(n)]
    line = f"{path}: {', '.join(shown)}"
    if "dataset" in told:
        line += f"; trained on {settings['dataset']} ({settings.get('splitBy', '?')})"
    return line + (f"; not in the file, taken as published: {', '.join(assumed)}" * bool(assumed))
