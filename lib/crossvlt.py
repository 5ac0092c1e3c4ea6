"""CrossVLT (IEEE TMM 2023): vision and language encoders of four stages that attend to each other.

Swin blocks, patch merging, gates, decoder and BERT's layers are those of LAVT. Attribute names are
those of the published weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import (
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfOutput,
)

from bert import build_text_encoder
from lib.backbone import embed, init_linear, position_embedding
from lib.errors import InputError
from lib.fusion import LanguageGate, TokenConv1d, TokenInstanceNorm, split_heads, word_bias
from lib.losses import Loss, cross_entropy, named_losses
from lib.mask_predictor import MaskPredictor, upsample
from lib.model import (
    Frozen,
    Segmenter,
    State,
    at_least_float32,
    bert_group,
    decay_group,
    fill_text,
)
from lib.swin import (
    PatchEmbed,
    PatchMerging,
    SwinSize,
    align_rows,
    drop_path_rates,
    swin_blocks,
)

if TYPE_CHECKING:
    from transformers import BertConfig, BertModel

ALIGN_DIM = 256  # width of the space in which pixels and expressions are compared
HEAD_WIDTH = 64  # channels per head of the pixel-word attention
STAGE1_LAYERS = 6  # BERT layers of language stage 1; stages 2-4 have one each


class CrossVLTOutput(NamedTuple):
    """The outputs from which the losses are computed.

    Attributes:
        logits: (B, 2, H, W) of background and object.
        similarity: four maps (B, 1, H_i, W_i) of stride 4, 8, 16, 32: cosine of each visual token
            and the expression, divided by the stage's temperature. Of the weights' type, also
            under autocast.
    """

    logits: Tensor
    similarity: list[Tensor]


class WordFusion(nn.Module):
    """Fusion of words into visual tokens: GELU(Conv(V + W)), W the attended words of each token.

    Args:
        vis_dim: channels C of the visual tokens.
        lang_dim: channels C_l of the word features.
        width: channels of the attention, a multiple of 64.

    Raises:
        InputError: ``width`` is not.
    """

    def __init__(self, vis_dim: int, lang_dim: int, width: int) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            raise InputError(
                f"crossvlt: an attention of {width} channels is no multiple of {HEAD_WIDTH}: "
                "give a larger --swin_type"
            )
        self.num_heads = width // HEAD_WIDTH
        self.v_q = nn.Sequential(TokenConv1d(vis_dim, width), TokenInstanceNorm())
        self.l_q = nn.Linear(lang_dim, width)
        self.values_l = nn.Linear(lang_dim, width)
        self.w_v = nn.Sequential(TokenConv1d(width, vis_dim), TokenInstanceNorm())
        self.project_mm = nn.Sequential(TokenConv1d(vis_dim, vis_dim), nn.GELU())

    def attention(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Attention weights (B, heads, HW, N_l); arguments as in :meth:`forward`."""
        query = split_heads(self.v_q(vis.flatten(1, 2)), self.num_heads)
        key = split_heads(self.l_q(lang), self.num_heads)
        logits = query @ key.transpose(-2, -1) * HEAD_WIDTH**-0.5
        return (logits + word_bias(lang_mask, query.dtype)).softmax(dim=-1)

    def forward(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Fused feature map (B, H, W, C).

        Args:
            vis: (B, H, W, C) feature map.
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.
        """
        tokens = vis.flatten(1, 2)  # (B, HW, C)
        query = split_heads(self.v_q(tokens), self.num_heads)  # (B, heads, HW, 64)
        key = split_heads(self.l_q(lang), self.num_heads)  # (B, heads, N_l, 64)
        value = split_heads(self.values_l(lang), self.num_heads)
        bias = align_rows(word_bias(lang_mask, query.dtype))[..., : lang_mask.shape[1]]
        gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        words = self.w_v(gathered.transpose(1, 2).flatten(2))  # (B, HW, C)
        return self.project_mm(tokens + words).view_as(vis)


class FusedStage(nn.Module):
    """Swin blocks, then fusion and gate before and after patch merging.

    Args:
        dim: channels C of the stage.
        depth, num_heads, window_size, drop_paths: of the Swin blocks.
        lang_dim: channels C_l of the word features.
        width: channels of the first fusion's attention.
        last: the stage ends after the first fusion. Its gate is in the published weights, but not
            computed.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: int,
        drop_paths: list[float],
        lang_dim: int,
        width: int,
        last: bool,
    ) -> None:
        super().__init__()
        self.last = last
        self.blocks = swin_blocks(dim, depth, num_heads, window_size, drop_paths)
        self.proj = nn.Linear(dim, ALIGN_DIM)
        # The order of the attributes is that of the published state dict.
        self.attn1 = WordFusion(dim, lang_dim, width)
        if not last:
            self.attn2 = WordFusion(2 * dim, lang_dim, 2 * dim)
            self.linear2 = LanguageGate(2 * dim)
        self.linear1 = LanguageGate(dim)
        if not last:
            self.downsample = PatchMerging(dim)

    def forward(
        self, x: Tensor, lang: Tensor, lang_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the stage.

        Args:
            x: (B, H, W, C).
            lang: (B, N_l, C_l).
            lang_mask: (B, N_l), 1 = real token.

        Returns:
            The feature map before fusion, the fused one (the decoder's input), both (B, H, W, C),
            and the input of the next stage of both encoders, (B, ceil(H/2), ceil(W/2), 2C), None
            after the last stage.
        """
        for block in self.blocks:
            x = block(x)
        fused = self.attn1(x, lang, lang_mask)
        if self.last:
            return x, fused, None
        merged = self.downsample(torch.addcmul(x, self.linear1(fused), fused))
        refined = self.attn2(merged, lang, lang_mask)
        return x, fused, torch.addcmul(merged, self.linear2(refined), refined)


class VisionStage(nn.Module):
    """A stage with its output norm; the first one also has the patch embedding.

    Args:
        size: widths, depths and heads of the Swin.
        index: number of the stage, from 0.
        window_size, drop_paths: of the Swin blocks.
        lang_dim: channels C_l of the word features.
        ape_grid: as in :class:`lib.backbone.MultiModalSwin`.
    """

    def __init__(
        self,
        size: SwinSize,
        index: int,
        window_size: int,
        drop_paths: list[float],
        lang_dim: int,
        ape_grid: int = 0,
    ) -> None:
        super().__init__()
        dim = size.stage_dims[index]
        if index == 0:
            self.patch_embed = PatchEmbed(4, dim)
            if ape_grid:
                self.absolute_pos_embed = nn.Parameter(position_embedding(dim, ape_grid))
        self.layers = FusedStage(
            dim,
            size.depths[index],
            size.num_heads[index],
            window_size,
            drop_paths,
            lang_dim,
            # As released: stage 1's first fusion is as wide as its second.
            width=2 * dim if index == 0 else dim,
            last=index == len(size.depths) - 1,
        )
        self.norm_name = f"norm{index}"
        self.add_module(self.norm_name, nn.LayerNorm(dim))
        self.apply(init_linear)

    def embed(self, image: Tensor) -> Tensor:
        """Patch and position embedding, (B, 3, H, W) -> (B, H/4, W/4, C); first stage only."""
        return embed(image, self.patch_embed, getattr(self, "absolute_pos_embed", None))

    def forward(
        self, x: Tensor, lang: Tensor, lang_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :class:`FusedStage`; the decoder's input is normalised and (B, C, H, W)."""
        vis, fused, following = self.layers(x, lang, lang_mask)
        return vis, getattr(self, self.norm_name)(fused).permute(0, 3, 1, 2), following


class CrossAttention(nn.Module):
    """Attention of words over visual tokens, as BERT's, with keys and values of another width.

    Not transformers' own module, whose arguments differ between its versions.

    Args:
        config: of BERT.
        vis_dim: channels of the visual tokens.
    """

    def __init__(self, config: BertConfig, vis_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        dim = config.hidden_size
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(dim, dim),
                "key": nn.Linear(vis_dim, dim),
                "value": nn.Linear(vis_dim, dim),
            }
        )
        self.output = BertSelfOutput(config)  # projection, residual, LayerNorm

    def forward(self, lang: Tensor, vis: Tensor) -> Tensor:
        """(B, N_l, C_l) words and (B, HW, C) visual tokens -> (B, N_l, C_l)."""
        query = split_heads(self.self["query"](lang), self.num_heads)
        key = split_heads(self.self["key"](vis), self.num_heads)
        value = split_heads(self.self["value"](vis), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        gathered = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.output(gathered.transpose(1, 2).flatten(2), lang)


class LanguageStage(nn.Module):
    """Stages 2-4 of the language encoder: cross attention to the image, then one BERT layer.

    Args:
        config: of BERT.
        vis_dim: channels of the visual tokens.
    """

    def __init__(self, config: BertConfig, vis_dim: int) -> None:
        super().__init__()
        self.crossattention = CrossAttention(config, vis_dim)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.layer = nn.ModuleList([BertLayer(config)])
        self.proj = nn.Linear(config.hidden_size, ALIGN_DIM)
        _init_text(self, config.initializer_range)

    def forward(self, lang: Tensor, vis: Tensor, lang_mask: Tensor) -> Tensor:
        """Word features (B, N_l, C_l).

        Args:
            lang: (B, N_l, C_l), of the stage before.
            vis: (B, HW, C) visual tokens, of the stage before.
            lang_mask: (B, N_l), 1 = real token.
        """
        lang = self.crossattention(lang, vis)
        lang = self.output(self.intermediate(lang), lang)
        lang = self.layer[0](lang, word_bias(lang_mask, lang.dtype))
        # A tuple in transformers 4.
        return lang[0] if isinstance(lang, tuple) else lang


class CrossVLT(Segmenter):
    """Cross-aware early fusion with stage-divided vision and language transformer encoders.

    Args:
        size: widths, depths and heads of the Swin.
        window_size: 12 in the published models; 7 is possible.
        text_config: of BERT. Language stage 1 has its first six layers, or as many as there are;
            stages 2-4 have its widths and heads.
        drop_path: rate of the last Swin block; the others grow linearly from 0.
        ape_grid: side of an absolute position embedding, 0 (published) for none.
    """

    groups = (
        "backbone_no_decay",
        "backbone",
        "decoder",
        "lang_stage1",
        "lang_stage2",
        "lang_stage3",
        "lang_stage4",
    )

    def __init__(
        self,
        size: SwinSize,
        window_size: int,
        text_config: BertConfig,
        drop_path: float = 0.3,
        ape_grid: int = 0,
    ) -> None:
        super().__init__()
        text_config = copy.deepcopy(text_config)
        text_config.num_hidden_layers = min(STAGE1_LAYERS, text_config.num_hidden_layers)
        lang_dim, dims = text_config.hidden_size, size.stage_dims
        rates = drop_path_rates(size.depths, drop_path)
        self.temp = nn.Parameter(torch.ones(len(dims)))
        self.backbone = nn.ModuleList(
            VisionStage(size, i, window_size, rates[i], lang_dim, ape_grid)
            for i in range(len(dims))
        )
        self.lang_stage1 = build_text_encoder(text_config)
        # Within the encoder, as in the published weights.
        self.lang_stage1.encoder.proj = nn.Linear(lang_dim, ALIGN_DIM)
        _init_text(self.lang_stage1.encoder.proj, text_config.initializer_range)
        # The encoder's own config also has the attention implementation that transformers chose.
        config = self.lang_stage1.config
        self.lang_stage2 = LanguageStage(config, dims[1])
        self.lang_stage3 = LanguageStage(config, dims[2])
        self.lang_stage4 = LanguageStage(config, dims[3])
        self.classifier = MaskPredictor(dims)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, 3, H, W) images and (B, N_l) expressions -> (B, 2, H, W) logits."""
        return self.encode(image, input_ids, attention_mask, alignment=False).logits

    def encode(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, alignment: bool = True
    ) -> CrossVLTOutput:
        """Logits and, with ``alignment``, the similarity maps (else an empty list).

        Arguments as in :meth:`forward`; the first of the ``input_ids`` is [CLS], whose features
        represent the expression.
        """
        stages = cast("list[VisionStage]", list(self.backbone))
        later = (self.lang_stage2, self.lang_stage3, self.lang_stage4)
        first = self.lang_stage1.encoder.get_submodule("proj")
        projections = (first, *(stage.proj for stage in later))
        lang = self.lang_stage1(input_ids, attention_mask).last_hidden_state
        x = stages[0].embed(image)
        maps, similarity = [], []
        for i, stage in enumerate(stages):
            if i > 0:
                lang = later[i - 1](lang, x.flatten(1, 2), attention_mask)
            vis, fused, x = stage(x, lang, attention_mask)
            maps.append(fused)
            if alignment:
                vis, expression = stage.layers.proj(vis), projections[i](lang[:, 0])
                similarity.append(self._similarity(vis, expression, self.temp[i]))
        return CrossVLTOutput(upsample(self.classifier(maps), image.shape[-2:]), similarity)

    def losses(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        target: Tensor,
        segmentation: Loss,
    ) -> dict[str, Tensor]:
        """Twice the segmentation loss, and the alignment loss of each stage."""
        output = self.encode(image, input_ids, attention_mask)
        output = output._replace(logits=at_least_float32(output.logits))
        return crossvlt_losses(output, target, segmentation)

    @staticmethod
    def _similarity(vis: Tensor, expression: Tensor, temperature: Tensor) -> Tensor:
        """(B, H, W, C) tokens, (B, C), () -> (B, 1, H, W): their cosine over the temperature."""
        # Under autocast both are bfloat16, too coarse for a loss.
        vis, expression = vis.to(temperature.dtype), expression.to(temperature.dtype)
        return F.cosine_similarity(vis, expression[:, None, None], dim=-1)[:, None] / temperature

    def parameter_group(self, name: str, lang_layers: int | None) -> str | Frozen | None:
        """As released: ``temp`` and BERT's embeddings are not trained."""
        part, _, rest = name.partition(".")
        if name == "temp":
            return Frozen("the temperatures stay 1, as published")
        if part == "backbone":
            return decay_group(name)
        if part == "classifier":
            return "decoder"
        if part == "lang_stage1" and not rest.startswith("encoder.proj."):
            return bert_group(rest, lang_layers, part)
        return part if part.startswith("lang_stage") and part in self.groups else None

    def unused_parameters(self) -> dict[str, str]:
        """The last stage's gate."""
        gate = f"backbone.{len(self.backbone) - 1}.layers.linear1."
        reason = "the last stage's gate is not used: no stage follows"
        return {name: reason for name, _ in self.named_parameters() if name.startswith(gate)}

    def swin_name(self, name: str) -> str | None:
        """Of blocks, patch merging and patch embedding; Swin has nothing else."""
        part, _, rest = name.partition(".")
        index, _, rest = rest.partition(".")
        if part != "backbone":
            return None
        if rest.startswith(("layers.blocks.", "layers.downsample.")):
            return f"layers.{index}.{rest.removeprefix('layers.')}"
        return rest if rest.startswith(("patch_embed.", "absolute_pos_embed")) else None

    def load_text(self, bert: BertModel) -> None:
        """Copy BERT's embeddings and first layers into language stage 1."""
        stage = self.lang_stage1
        needed = len(stage.encoder.layer)
        layers = bert.encoder.layer[:needed]
        if len(layers) < needed:
            raise InputError(
                f"this BERT has {len(layers)} layers, not the {needed} of the language encoder's "
                "stage 1: give one with more by --ck_bert"
            )
        fill_text(stage.embeddings, bert.embeddings)
        for own, pretrained in zip(stage.encoder.layer, layers, strict=True):
            fill_text(own, pretrained)

    def from_published(self, state: Mapping[str, Tensor]) -> State:
        """Add ``temp``, all ones, which published weights lack; drop ``position_ids``."""
        kept = {k: v for k, v in state.items() if not k.endswith("embeddings.position_ids")}
        return {"temp": torch.ones(len(self.backbone))} | kept


def _init_text(module: nn.Module, std: float) -> None:
    """BERT's initialisation of linear layers: normal weights (std 0.02 there) and zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)


def alignment_losses(similarity: list[Tensor], target: Tensor) -> Tensor:
    """Binary cross entropy of each similarity map, taken as logits of the object.

    Args:
        similarity: maps (B, 1, H_i, W_i), resized here to the target.
        target: (B, H, W) int64 in {0, 1}.

    Returns:
        (4,) losses, one per stage, each the mean over all pixels of the batch.
    """
    mask = target[:, None].to(similarity[0].dtype)
    maps = [upsample(s, target.shape[-2:]) for s in similarity]
    return torch.stack([F.binary_cross_entropy_with_logits(m, mask) for m in maps])


def crossvlt_losses(
    output: CrossVLTOutput, target: Tensor, segmentation: Loss = cross_entropy
) -> dict[str, Tensor]:
    """Twice the segmentation loss, and ``align_1`` to ``align_4`` of the stages.

    Args:
        output: of :meth:`CrossVLT.encode`.
        target: (B, H, W) int64 in {0, 1}, of the logits' size.
        segmentation: loss of the logits; published is weighted cross entropy.
    """
    aligned = alignment_losses(output.similarity, target)
    named = named_losses(segmentation, output.logits, target)
    seg = {name: 2 * loss for name, loss in named.items()}
    return seg | {f"align_{i}": loss for i, loss in enumerate(aligned, 1)}
