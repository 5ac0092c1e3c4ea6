"""Language into vision: pixel-word attention module and language gate (LAVT, Sec. 3.2-3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (B, heads, T, C/heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def word_bias(lang_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention bias over words, (B, N_l) mask -> (B, 1, 1, N_l): 0, or -1e4 for padding.

    Finite, as in the published models, so that a sentence without words is attended to evenly
    and never gives NaN.
    """
    return (1e4 * lang_mask.to(dtype) - 1e4)[:, None, None, :]


class TokenConv1d(nn.Conv1d):
    """A 1x1 Conv1d over tokens (B, T, C) instead of (B, C, T): a matmul, without transposing.

    The weight keeps the (out, in, 1) shape of the published state dicts.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class TokenInstanceNorm(nn.Module):
    """Instance normalisation over the T tokens of each sample and channel, without affine."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C); zero where T is 1."""
        centred = x - x.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return centred * (variance + self.eps).rsqrt()


class PixelWordAttention(nn.Module):
    """Each pixel gathers the words that speak of it (LAVT, Eq. 1-4).

    Args:
        vis_dim: channels C of the visual tokens; also the width of keys, values and output.
        lang_dim: channels of the words.
        num_heads: attention heads.
    """

    def __init__(self, vis_dim: int, lang_dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Scale by C, not by C / heads: released weights expect it.
        self.scale = vis_dim**-0.5
        self.f_key = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.f_query = nn.Sequential(TokenConv1d(vis_dim, vis_dim), TokenInstanceNorm())
        self.f_value = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.W = nn.Sequential(TokenConv1d(vis_dim, vis_dim), TokenInstanceNorm())

    def attention(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Weights of the words for each pixel, (B, heads, HW, N_l), summing to 1 over words.

        Args:
            vis: (B, HW, C).
            lang: (B, N_l, C_l).
            lang_mask: (B, N_l), 1 = real token.
        """
        query = split_heads(self.f_query(vis), self.num_heads)
        key = split_heads(self.f_key(lang) * lang_mask[..., None].to(vis.dtype), self.num_heads)
        logits = query @ key.transpose(-2, -1) * self.scale
        return (logits + word_bias(lang_mask, vis.dtype)).softmax(dim=-1)

    def forward(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Language features of each pixel, (B, HW, C); arguments as in :meth:`attention`."""
        weights = self.attention(vis, lang, lang_mask)
        value = self.f_value(lang) * lang_mask[..., None].to(lang.dtype)
        gathered = weights @ split_heads(value, self.num_heads)  # (B, heads, HW, C/heads)
        return self.W(gathered.transpose(1, 2).flatten(2))


class PWAM(nn.Module):
    """Pixel-word attention module: F = GELU(Conv(vis * attended words)) (LAVT, Eq. 5-6).

    Args:
        vis_dim: channels C of the stage.
        lang_dim: channels of the words.
        num_heads: heads of the attention.
        dropout: dropout after each projection.
    """

    def __init__(
        self, vis_dim: int, lang_dim: int, num_heads: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(
            TokenConv1d(vis_dim, vis_dim), nn.GELU(), nn.Dropout(dropout)
        )
        self.image_lang_att = PixelWordAttention(vis_dim, lang_dim, num_heads)
        self.project_mm = nn.Sequential(
            TokenConv1d(vis_dim, vis_dim), nn.GELU(), nn.Dropout(dropout)
        )

    def forward(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Fuse.

        Args:
            vis: (B, HW, C) output of the stage.
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.

        Returns:
            (B, HW, C) multi-modal features F.
        """
        words = self.image_lang_att(vis, lang, lang_mask)
        return self.project_mm(self.vis_project(vis) * words)


class LanguageGate(nn.Sequential):
    """Per-element weights of the fused features, Tanh(W2 ReLU(W1 F)) (LAVT, Eq. 7-8).

    Maps (..., C) to (..., C); the caller adds ``gate(F) * F`` to the visual features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Linear(dim, dim, bias=False),
            nn.ReLU(),
            nn.Linear(dim, dim, bias=False),
            nn.Tanh(),
        )
