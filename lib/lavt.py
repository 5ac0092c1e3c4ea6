"""LAVT: BERT, the multi-modal Swin backbone and the mask predictor, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from bert import build_text_encoder
from lib.backbone import MultiModalSwin
from lib.errors import InputError
from lib.mask_predictor import MaskPredictor, upsample
from lib.model import Frozen, Segmenter, State, bert_group, decay_group, fill_text
from lib.swin import SwinSize
from lib.variants import PUBLISHED, Variant

if TYPE_CHECKING:
    from transformers import BertConfig, BertModel

TEXT = "text_encoder."


class LAVT(Segmenter):
    """Language-Aware Vision Transformer (CVPR 2022).

    Args:
        text_encoder: maps (input_ids, attention_mask) to an object with ``last_hidden_state``
            (B, N_l, C_l).
        backbone: maps (image, words, mask) to four feature maps.
        classifier: maps the four feature maps to (B, 2, H/4, W/4) logits.
        text_dropout: whether the text encoder uses dropout in train mode. The published ``lavt``
            does not, ``lavt_one`` does.
        separate_text: whether checkpoints are {model, bert_model}, as of the published ``lavt``,
            or one dictionary, as of ``lavt_one``.
        variant: see :class:`lib.model.Segmenter`.
    """

    groups = ("backbone_no_decay", "backbone", "decoder", "text")

    def __init__(
        self,
        text_encoder: BertModel,
        backbone: MultiModalSwin,
        classifier: MaskPredictor,
        text_dropout: bool,
        separate_text: bool = False,
        variant: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.variant = variant
        self.separate_text = separate_text
        self.text_dropout = text_dropout
        # This order is that of the published state dicts.
        self.backbone = backbone
        self.classifier = classifier
        self.text_encoder = text_encoder

    def train(self, mode: bool = True) -> LAVT:
        """Set the mode; without text dropout the text encoder stays in eval mode."""
        super().train(mode)
        if not self.text_dropout:
            self.text_encoder.eval()
        return self

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N_l) ids and mask -> (B, N_l, C_l) word features (LAVT, Sec. 3.1)."""
        output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return output.last_hidden_state

    def fused_features(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """The decoder's input, four maps (B, C_i, H_i, W_i), from the arguments of forward."""
        lang = self.encode_text(input_ids, attention_mask)
        return self.backbone(image, lang, attention_mask)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, 3, H, W) images and (B, N_l) expressions -> (B, 2, H, W) logits."""
        maps = self.fused_features(image, input_ids, attention_mask)
        return upsample(self.classifier(maps), image.shape[-2:])

    def parameter_group(self, name: str, lang_layers: int | None) -> str | Frozen | None:
        """Backbone, decoder and BERT, as published."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            return decay_group(name)
        if part == "classifier":
            return "decoder"
        return bert_group(rest, lang_layers, "text") if part == "text_encoder" else None

    def unused_parameters(self) -> dict[str, str]:
        """The last stage's gate, unless the decoder reads its output."""
        if self.variant.get("decoder_features") == "V":
            return {}
        gate = f"backbone.layers.{len(self.backbone.layers) - 1}.res_gate."
        reason = "the last stage's gate is not used: no stage follows"
        return {name: reason for name, _ in self.named_parameters() if name.startswith(gate)}

    def swin_name(self, name: str) -> str | None:
        """The name within the backbone; Swin has no fusion, gates and output norms."""
        part, _, rest = name.partition(".")
        added = (".fusion." in rest) or (".res_gate." in rest) or rest.startswith("norm")
        return rest if part == "backbone" and not added else None

    def load_text(self, bert: BertModel) -> None:
        """Copy ``bert`` into the text encoder."""
        fill_text(self.text_encoder, bert)

    def to_published(self) -> dict[str, State]:
        """{model, bert_model} or {model}."""
        state = self.state_dict()
        if not self.separate_text:
            return {"model": state}
        text = {k: v for k, v in state.items() if k.startswith(TEXT)}
        return {
            "model": {k: v for k, v in state.items() if k not in text},
            "bert_model": {k.removeprefix(TEXT): v for k, v in text.items()},
        }

    def from_published(self, state: Mapping[str, Tensor]) -> State:
        """Without BERT's pooler and ``position_ids``, which published files may hold."""
        leftovers = (TEXT + "pooler.", TEXT + "embeddings.position_ids")
        return {k: v for k, v in state.items() if not k.startswith(leftovers)}


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


def build_lavt(
    size: SwinSize,
    window_size: int,
    text_config: BertConfig,
    *,
    drop_path: float = 0.3,
    ape_grid: int = 0,
    mha: str = "",
    fusion_drop: float = 0.0,
    text_dropout: bool,
    separate_text: bool,
    variant: Variant = PUBLISHED,
    no_target_head: bool = False,
) -> LAVT:
    """LAVT from sizes; arguments as in :func:`lib.segmentation.build_model` and :class:`LAVT`.

    Raises:
        InputError: a number of heads does not divide its stage's channels, or the fusion has none.
    """
    heads = parse_heads(mha, len(size.depths))
    for dim, h in zip(size.stage_dims, heads, strict=True):
        if dim % h:
            raise InputError(f"--mha {mha}: {h} heads do not divide the {dim} channels of a stage")
    if variant.fusion != "pwam" and max(heads) > 1:
        raise InputError(f"--mha {mha} has no meaning with --fusion {variant.fusion}")
    backbone = MultiModalSwin(
        size,
        window_size,
        lang_dim=text_config.hidden_size,
        fusion_heads=heads,
        fusion_drop=fusion_drop,
        drop_path=drop_path,
        ape_grid=ape_grid,
        variant=variant,
    )
    classifier = MaskPredictor(size.stage_dims)
    text_encoder = build_text_encoder(text_config)
    chosen = asdict(variant) | {"mha": "-".join(map(str, heads))}
    parts = (text_encoder, backbone, classifier, text_dropout, separate_text, chosen)
    if no_target_head:
        from lib.no_target import NoTargetLAVT  # imported only when needed

        return NoTargetLAVT(*parts, dim=size.stage_dims[-1])
    return LAVT(*parts)
