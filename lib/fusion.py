"""Fusion of words into pixels: PWAM and the language gate (LAVT, Sec. 3.2-3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (B, heads, T, C/heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def word_bias(lang_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention bias of the words, (B, N_l) mask -> (B, 1, 1, N_l): 0, -1e4 for padding.

    Finite, as in the published models: an expression without words gives even weights, not NaN.
    """
    return (1e4 * lang_mask.to(dtype) - 1e4)[:, None, None, :]


class TokenConv1d(nn.Conv1d):
    """A 1x1 Conv1d of tokens (B, T, C), computed as a linear layer.

    The weight keeps the (out, in, 1) shape of the published state dicts.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class TokenInstanceNorm(nn.Module):
    """Instance normalisation over the T tokens of each sample and channel, without affine."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C); zero where T is 1."""
        # The gradient of 1 / sqrt(variance) overflows in float16 where a channel hardly varies.
        wide = x.float() if x.dtype == torch.float16 else x
        centred = wide - wide.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return (centred * (variance + self.eps).rsqrt()).to(x.dtype)


class TokenNorm(nn.Module):
    """A norm layer of (N, C), applied to tokens (B, T, C).

    The attribute's name puts its weights in the optimizer's group without weight decay.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.norm(x.flatten(0, 1)).view_as(x)


def only_words(vis: Tensor, words: Tensor) -> Tensor:
    """The language features, without the pixels."""
    return words


# The forms of PWAM that --pwam_norm, --pwam_attention and --pwam_combine choose from; the first
# of each is the published one.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda dim: TokenInstanceNorm(),
    "none": lambda dim: nn.Identity(),
    "layer": lambda dim: TokenNorm(nn.LayerNorm(dim)),
    "batch": lambda dim: TokenNorm(nn.BatchNorm1d(dim)),
}
ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": torch.mul,
    "add": torch.add,
    "words": only_words,
}


class PixelWordAttention(nn.Module):
    """Attention of pixels over words (LAVT, Eq. 1-4).

    Args:
        vis_dim: channels C of the visual tokens, keys, values and output.
        lang_dim: channels C_l of the word features.
        num_heads: attention heads.
        attention: a key of :data:`ATTENTIONS`: from logits to weights.
        norm: a key of :data:`NORMS`: of queries and output.
    """

    def __init__(
        self,
        vis_dim: int,
        lang_dim: int,
        num_heads: int = 1,
        attention: str = "softmax",
        norm: str = "instance",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weigh = ATTENTIONS[attention]
        # Not (C / heads)**-0.5: the released weights were trained so.
        self.scale = vis_dim**-0.5
        self.f_key = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.f_query = nn.Sequential(TokenConv1d(vis_dim, vis_dim), NORMS[norm](vis_dim))
        self.f_value = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.W = nn.Sequential(TokenConv1d(vis_dim, vis_dim), NORMS[norm](vis_dim))

    def attention(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Attention weights (B, heads, HW, N_l) (LAVT, Eq. 1-2).

        Args:
            vis: (B, HW, C) visual tokens.
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.
        """
        query = split_heads(self.f_query(vis), self.num_heads)
        key = split_heads(self.f_key(lang) * lang_mask[..., None].to(vis.dtype), self.num_heads)
        logits = query @ key.transpose(-2, -1) * self.scale
        return self.weigh(logits + word_bias(lang_mask, vis.dtype))

    def forward(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Language features G of each pixel, (B, HW, C); arguments as in :meth:`attention`."""
        weights = self.attention(vis, lang, lang_mask)
        value = self.f_value(lang) * lang_mask[..., None].to(lang.dtype)
        gathered = weights @ split_heads(value, self.num_heads)  # (B, heads, HW, C/heads)
        return self.W(gathered.transpose(1, 2).flatten(2))


class PWAM(nn.Module):
    """Pixel-word attention module: F = GELU(Conv(GELU(Conv(V)) * G)) (LAVT, Eq. 5-6).

    Args:
        vis_dim, lang_dim, num_heads, attention, norm: as in :class:`PixelWordAttention`.
        dropout: after each projection.
        combine: a key of :data:`COMBINE`: what joins pixels and language features.
    """

    def __init__(
        self,
        vis_dim: int,
        lang_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        attention: str = "softmax",
        combine: str = "mul",
        norm: str = "instance",
    ) -> None:
        super().__init__()
        self.combine = COMBINE[combine]
        self.vis_project: nn.Module = nn.Identity()
        if combine != "words":
            self.vis_project = nn.Sequential(
                TokenConv1d(vis_dim, vis_dim), nn.GELU(), nn.Dropout(dropout)
            )
        self.image_lang_att = PixelWordAttention(vis_dim, lang_dim, num_heads, attention, norm)
        self.project_mm = nn.Sequential(
            TokenConv1d(vis_dim, vis_dim), nn.GELU(), nn.Dropout(dropout)
        )

    def forward(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Multi-modal features F, (B, HW, C).

        Args:
            vis: (B, HW, C) visual tokens V.
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.
        """
        words = self.image_lang_att(vis, lang, lang_mask)
        return self.project_mm(self.combine(self.vis_project(vis), words))


class LanguageGate(nn.Sequential):
    """Per-element weights of the fused features, S = Tanh(W2 ReLU(W1 F)) (LAVT, Eq. 7-8).

    (..., C) -> (..., C); the caller computes V' = V + S * F.

    Args:
        dim: channels C.
        activation: instead of Tanh.
    """

    def __init__(self, dim: int, activation: nn.Module | None = None) -> None:
        super().__init__(
            nn.Linear(dim, dim, bias=False),
            nn.ReLU(),
            nn.Linear(dim, dim, bias=False),
            activation or nn.Tanh(),
        )
