"""Builds what train.py offers beyond the published recipes; loads the code of what is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lib.errors import InputError
from lib.model import Segmenter
from lib.training import optim

if TYPE_CHECKING:
    from bert.tokenizer import Tokenizer
    from data.dataset_refer_bert import ReferDataset
    from data.loaders import RandomExpressionSampler
    from data.mixed import MixedDataset
    from lib.training.ema import WeightAverage
    from lib.training.maskris import MaskRIS


@dataclass(frozen=True)
class Methods:
    """The training methods of a run; the names and defaults are those of train.py's flags.

    With the defaults nothing differs from the published recipes.

    Attributes:
        maskris: make a second pass over masked images and expressions.
        maskris_weight: of the first pass; the second has the rest.
        maskris_ratio, maskris_patch: part of the patches that is masked; their side, pixels.
        maskris_text: probability with which a word is selected.
        mosaic: probability of a 2 x 2 mosaic in place of an image.
        mosaic_directions: the cell agrees with "left", "right", "top" and "bottom".
        sched: 'poly', of power 0.9, or 'cosine'.
        min_lr: the last learning rate, for groups of the full one; in proportion for others.
        warmup_steps: the learning rate grows linearly for so many steps; then the schedule begins.
        warmup_start: the first learning rate, as a part of the full one.
        backbone_lr_scale: of the learning rate of Swin's and BERT's weights.
        norm_decay: 'biases' exempts norms and embeddings; the others are of the published groups.
        model_ema: evaluate and save a moving average of the weights.
        model_ema_decay: of each step.
        model_ema_warmup: less decay in early steps.
    """

    maskris: bool = False
    maskris_weight: float = 0.5
    maskris_ratio: float = 0.75
    maskris_patch: int = 32
    maskris_text: float = 0.15
    mosaic: float = 0.0
    mosaic_directions: bool = False
    sched: str = "poly"
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_start: float = 1e-3
    backbone_lr_scale: float = 1.0
    norm_decay: str = "published"
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False

    def build_maskris(self, tokenizer: Tokenizer, img_size: int) -> MaskRIS | None:
        """Two passes over each batch, or None.

        Raises:
            InputError: images or tokenizer do not fit.
        """
        if not self.maskris:
            return None
        from lib.training.maskris import build_maskris

        return build_maskris(self, tokenizer, img_size)

    def with_mosaics(
        self, train_set: ReferDataset | MixedDataset, sampler: RandomExpressionSampler
    ) -> tuple[Any, Any]:
        """The samples and their sampler, with mosaics among them if there are to be any.

        Raises:
            InputError: the images do not allow it.
        """
        if not self.mosaic:
            return train_set, sampler
        from data.mosaic import MosaicDataset, MosaicSampler

        mosaics = MosaicSampler(sampler, train_set, self.mosaic, self.mosaic_directions)
        return MosaicDataset(train_set), mosaics

    def refine_groups(
        self, model: Segmenter, groups: list[dict[str, Any]], lr: float
    ) -> list[dict[str, Any]]:
        """The optimizer's groups, split where rates are scaled or biases alone decay."""
        biases_only = self.norm_decay == "biases"
        if not biases_only and self.backbone_lr_scale == 1.0:
            return groups
        from lib.training.groups import refine

        return refine(model, groups, lr, self.backbone_lr_scale, biases_only=biases_only)

    def build_schedule(
        self, optimizer: torch.optim.Optimizer, lr: float, steps: int, *, resumed: bool = False
    ) -> LambdaLR:
        """The schedule of the learning rate.

        Args:
            optimizer: of the run.
            lr: its full learning rate; a resumed run has that of its checkpoint.
            steps: of the run.
            resumed: whether it goes on with a checkpoint.

        Raises:
            InputError: ``min_lr`` is above the learning rate.
        """
        if (self.sched, self.warmup_steps, self.min_lr) == ("poly", 0, 0.0):
            return optim.poly_schedule(optimizer, steps)
        if self.min_lr > lr and not resumed:
            raise InputError(f"--min_lr {self.min_lr:g} is above the learning rate, {lr:g}")
        from lib.training.schedule import build_schedule

        return build_schedule(optimizer, steps, self)

    def build_average(self, model: Segmenter) -> WeightAverage | None:
        """The moving average of a model's weights, or None."""
        if not self.model_ema:
            return None
        from lib.training.ema import WeightAverage

        return WeightAverage(model, self.model_ema_decay, self.model_ema_warmup)
