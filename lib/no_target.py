"""LAVT with a head that says whether an expression refers to anything in the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.lavt import LAVT
from lib.losses import CLASS_WEIGHTS, Loss, named_losses
from lib.mask_predictor import upsample
from lib.model import Frozen, at_least_float32

LOSS_WEIGHT = 0.1
HEAD = "no_target_head"


class NoTargetLAVT(LAVT):
    """LAVT whose deepest fused features, averaged over the image, are classified too.

    Args:
        parts: positional arguments of :class:`lib.lavt.LAVT`.
        dim: channels of the deepest features.
    """

    def __init__(self, *parts: Any, dim: int) -> None:
        super().__init__(*parts)
        self.no_target_head = nn.Linear(dim, 2)  # class 1: no target

    def encode(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, 2, H, W) logits of the mask and (B, 2) of the head; arguments as of forward."""
        maps = self.fused_features(image, input_ids, attention_mask)
        logits = upsample(self.classifier(maps), image.shape[-2:])
        return logits, self.no_target_head(maps[-1].mean((2, 3)))

    def losses(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        target: Tensor,
        segmentation: Loss,
    ) -> dict[str, Tensor]:
        """The segmentation loss, and ``no_target``, a weighted cross entropy of the head.

        A sample has no target if its mask, at the model's size, is empty.
        """
        logits, said = map(at_least_float32, self.encode(image, input_ids, attention_mask))
        empty = (target.flatten(1).amax(1) == 0).long()
        no_target = F.cross_entropy(said, empty, said.new_tensor(CLASS_WEIGHTS))
        seg = named_losses(segmentation, logits, target)
        return seg | {"no_target": LOSS_WEIGHT * no_target}

    def parameter_group(self, name: str, lang_layers: int | None) -> str | Frozen | None:
        """The head trains as the decoder does."""
        if name.startswith(HEAD):
            return "decoder"
        return super().parameter_group(name, lang_layers)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of any module; evaluation calls :meth:`encode`."""
        super().compile(*args, **kwargs)
        self.encode = torch.compile(self.encode, *args, **kwargs)  # type: ignore[method-assign]
