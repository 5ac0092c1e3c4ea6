"""The one place that knows all models: a name and sizes in, a module out."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from bert import build_text_encoder
from lib.backbone import MultiModalSwin
from lib.config import SWIN_SIZES
from lib.errors import InputError
from lib.lavt import LAVT
from lib.mask_predictor import MaskPredictor

if TYPE_CHECKING:
    from transformers import BertConfig

MODELS = ("lavt", "lavt_one")


def parse_heads(mha: str, stages: int = 4) -> tuple[int, ...]:
    """Heads of the PWAMs from ``a-b-c-d``; '' is one head each.

    Raises:
        InputError: not ``stages`` positive integers joined by dashes.
    """
    if not mha:
        return (1,) * stages
    parts = mha.split("-")
    if len(parts) != stages or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"--mha {mha}: give {stages} head counts joined by dashes, like 1-1-1-1")
    return tuple(int(p) for p in parts)


def build_model(
    name: str,
    *,
    swin_type: str = "base",
    window_size: int = 12,
    text_config: BertConfig | str | PathLike[str],
    mha: str = "",
    fusion_drop: float = 0.0,
    drop_path: float = 0.3,
    ape_grid: int = 0,
    text_dropout: bool | None = None,
) -> LAVT:
    """Build a model with fresh weights.

    Args:
        name: 'lavt' or 'lavt_one'. Both are the same network; they differ in whether BERT's
            dropout is on while training, and in the layout of their checkpoints.
        swin_type: a key of :data:`lib.config.SWIN_SIZES`.
        window_size: side of Swin's windows; 7 and 12 are published.
        text_config: a transformers ``BertConfig``, a folder with ``config.json``, or a hub name.
            The width of the text is taken from it.
        mha: heads of the four PWAMs, ``a-b-c-d``; '' is 1-1-1-1.
        fusion_drop: dropout in the PWAMs.
        drop_path: stochastic depth rate of the last Swin block.
        ape_grid: side of an absolute position embedding, 0 (published) for none.
        text_dropout: overrides the model's default (lavt: off, lavt_one: on).

    Returns:
        A module ``forward(image (B,3,H,W), input_ids (B,N_l), attention_mask (B,N_l))`` ->
        logits (B, 2, H, W).

    Raises:
        InputError: unknown name or size, a head count that does not divide its stage's width,
            or no text configuration to be had.
    """
    if name not in MODELS:
        raise InputError(f"unknown model '{name}': choose one of {', '.join(MODELS)}")
    if swin_type not in SWIN_SIZES:
        raise InputError(f"unknown swin type '{swin_type}': choose one of {', '.join(SWIN_SIZES)}")
    size = SWIN_SIZES[swin_type]
    heads = parse_heads(mha, len(size.depths))
    for dim, h in zip(size.stage_dims, heads, strict=True):
        if dim % h:
            raise InputError(f"--mha {mha}: {h} heads do not divide the {dim} channels of a stage")
    text_encoder = build_text_encoder(text_config)
    backbone = MultiModalSwin(
        size,
        window_size,
        lang_dim=text_encoder.config.hidden_size,
        fusion_heads=heads,
        fusion_drop=fusion_drop,
        drop_path=drop_path,
        ape_grid=ape_grid,
    )
    if text_dropout is None:
        text_dropout = name == "lavt_one"
    return LAVT(text_encoder, backbone, MaskPredictor(size.stage_dims), text_dropout)
