"""All models by name: :func:`build_model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from bert import load_config
from lib.errors import InputError
from lib.lavt import build_lavt
from lib.model import Segmenter
from lib.swin import SWIN_SIZES, SwinSize
from lib.variants import PUBLISHED, Variant

if TYPE_CHECKING:
    from transformers import BertConfig


@dataclass(frozen=True)
class Entry:
    """A model and the settings of its release.

    Attributes:
        build: maps (size, window_size, text_config, …) to the module.
        max_tokens: N_l, tokens of an expression.
        lr: initial learning rate.
        batch_size: per process.
        val_expressions: validation uses 'one' random expression per reference, or 'all'.
    """

    build: Callable[..., Segmenter]
    max_tokens: int = 20
    lr: float = 5e-5
    batch_size: int = 8
    val_expressions: str = "one"


def _build_crossvlt(
    size: SwinSize,
    window_size: int,
    text_config: BertConfig,
    *,
    drop_path: float = 0.3,
    ape_grid: int = 0,
) -> Segmenter:
    from lib.crossvlt import CrossVLT  # imported only when needed: LAVT does without it

    return CrossVLT(size, window_size, text_config, drop_path, ape_grid)


MODELS: dict[str, Entry] = {
    "lavt": Entry(partial(build_lavt, text_dropout=False, separate_text=True)),
    "lavt_one": Entry(partial(build_lavt, text_dropout=True, separate_text=False)),
    "crossvlt": Entry(_build_crossvlt, max_tokens=21, lr=3e-5, batch_size=6, val_expressions="all"),
}


def build_model(
    name: str,
    *,
    swin_type: str = "base",
    window_size: int = 12,
    text_config: BertConfig | str | PathLike[str],
    drop_path: float = 0.3,
    ape_grid: int = 0,
    mha: str = "",
    fusion_drop: float = 0.0,
    text_dropout: bool | None = None,
    max_tokens: int = 0,
    variant: Variant = PUBLISHED,
    no_target_head: bool = False,
    accelerate: bool = True,
) -> Segmenter:
    """Build a model with randomly initialised weights.

    Args:
        name: a key of :data:`MODELS`. 'lavt' and 'lavt_one' are the same network; they differ in
            BERT's dropout while training and in the layout of their checkpoints.
        swin_type: a key of :data:`lib.swin.SWIN_SIZES`.
        window_size: side of Swin's windows; 7 and 12 are published.
        text_config: a transformers ``BertConfig``, a folder with ``config.json``, or a hub name.
        drop_path: stochastic depth rate of the last Swin block.
        ape_grid: side of an absolute position embedding, 0 (published) for none.
        mha: heads of LAVT's four PWAMs, ``a-b-c-d``; '' is 1-1-1-1.
        fusion_drop: dropout in LAVT's PWAMs.
        text_dropout: overrides LAVT's default (lavt: off, lavt_one: on).
        max_tokens: N_l; only compared with the number of positions of the text encoder.
        variant: LAVT's forms of fusion, gate and decoder input; default as published.
        no_target_head: LAVT with a head that says whether there is a target at all.
        accelerate: use :mod:`lib.cpu` where this machine's CPU gains from it.

    Returns:
        A module ``forward(image (B,3,H,W), input_ids (B,N_l), attention_mask (B,N_l))`` ->
        logits (B, 2, H, W).

    Raises:
        InputError: unknown name or size, a flag that the model does not have or that does not fit
            it, or no text configuration.
    """
    if name not in MODELS:
        raise InputError(f"unknown model '{name}': choose one of {', '.join(MODELS)}")
    if swin_type not in SWIN_SIZES:
        raise InputError(f"unknown swin type '{swin_type}': choose one of {', '.join(SWIN_SIZES)}")
    if window_size < 1:
        raise InputError(f"window size {window_size}: must be above 0")
    build = MODELS[name].build
    options: dict[str, Any] = {"drop_path": drop_path, "ape_grid": ape_grid}
    special: dict[str, tuple[Any, Any]]
    special = {"mha": (mha, ""), "fusion_drop": (fusion_drop, 0.0)}
    special["text_dropout"] = (text_dropout, None)
    special["variant"] = (variant, PUBLISHED)
    special["no_target_head"] = (no_target_head, False)
    for option, (value, default) in special.items():
        if value == default:
            continue
        if option not in inspect.signature(build).parameters:
            asked = variant.flags() if option == "variant" else f"--{option} {value}"
            asked = asked.removesuffix(" True")
            raise InputError(f"{asked}: {name} has no such option")
        options[option] = value
    config = load_config(text_config)
    if max_tokens > config.max_position_embeddings:
        raise InputError(
            f"--max_tokens {max_tokens}: the text encoder has {config.max_position_embeddings} "
            "positions, give no more"
        )
    model = build(SWIN_SIZES[swin_type], window_size, config, **options)
    model.text_config = config
    if accelerate:
        from lib import cpu  # the network itself does not need it

        if cpu.pays():
            cpu.accelerate(model)
    return model
