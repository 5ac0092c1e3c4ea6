"""LAVT: BERT, the multi-modal Swin backbone and the mask predictor, end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lib.backbone import MultiModalSwin
from lib.mask_predictor import MaskPredictor, upsample

if TYPE_CHECKING:
    from transformers import BertModel


class LAVT(nn.Module):
    """Language-Aware Vision Transformer (CVPR 2022).

    Args:
        text_encoder: maps (input_ids, attention_mask) to an object with ``last_hidden_state``
            (B, N_l, C_l).
        backbone: maps (image, words, mask) to four maps.
        classifier: maps the four maps to (B, 2, H/4, W/4) logits.
        text_dropout: whether the text encoder's dropout is on while training. The published
            ``lavt`` trains with it off, ``lavt_one`` with it on.
    """

    def __init__(
        self,
        text_encoder: BertModel,
        backbone: MultiModalSwin,
        classifier: MaskPredictor,
        text_dropout: bool,
    ) -> None:
        super().__init__()
        self.text_dropout = text_dropout
        # This order is that of the published state dicts.
        self.backbone = backbone
        self.classifier = classifier
        self.text_encoder = text_encoder

    def train(self, mode: bool = True) -> LAVT:
        """Set train mode; the text encoder stays in eval mode where its dropout is off."""
        super().train(mode)
        if not self.text_dropout:
            self.text_encoder.eval()
        return self

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N_l) ids and mask -> (B, N_l, C_l) word features (LAVT, Sec. 3.1)."""
        output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return output.last_hidden_state

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Segment what the sentences mean.

        Args:
            image: (B, 3, H, W) float, normalised; any H and W.
            input_ids: (B, N_l) int64.
            attention_mask: (B, N_l), 1 = real token.

        Returns:
            (B, 2, H, W) logits of background and object; the mask is their argmax over dim 1.
        """
        lang = self.encode_text(input_ids, attention_mask)
        maps = self.backbone(image, lang, attention_mask)
        return upsample(self.classifier(maps), image.shape[-2:])
