"""The moving average of a model's weights; loaded with --model_ema only."""

from __future__ import annotations

import os
from typing import Any

from timm.utils import ModelEmaV3

from lib.errors import InputError
from lib.model import Segmenter

RAW = "raw_model"  # in checkpoints: the weights that training resumes from


class WeightAverage:
    """A copy of a model whose weights and float buffers follow those of training slowly.

    After step n they are decay * average + (1 - decay) * weights; after step 1 a copy.

    Args:
        model: whose weights, as they are now, are the average so far.
        decay: of each step.
        warmup: use at most 1 - n^(-2/3) at step n, so that early weights are forgotten.
    """

    def __init__(self, model: Segmenter, decay: float, warmup: bool) -> None:
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=warmup)
        self.model: Segmenter = self.ema.module.requires_grad_(False)

    def update(self, model: Segmenter, step: int) -> None:
        """Follow the weights after a step, counted from 1."""
        self.ema.update(model, step)


def load_raw_weights(
    model: Segmenter, content: dict[str, Any], path: str | os.PathLike[str]
) -> None:
    """Set the weights to those that training resumes from.

    Raises:
        InputError: they do not fit the model.
    """
    try:
        model.load_state_dict(content[RAW])
    except (RuntimeError, TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{path}: its '{RAW}' is damaged ({str(e)[:100]})") from e
