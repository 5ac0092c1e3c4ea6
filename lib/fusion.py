"""Language into vision: pixel-word attention module and language gate (LAVT, Sec. 3.2-3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib.cpu.kernels import Linear, linear


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
        return linear(x, self.weight, self.bias)


class TokenInstanceNorm(nn.Module):
    """Instance normalisation over the T tokens of each sample and channel, without affine."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C); zero where T is 1."""
        # The slope of 1 / sqrt(variance) is beyond float16 where a channel hardly varies.
        wide = x.float() if x.dtype == torch.float16 else x
        centred = wide - wide.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return (centred * (variance + self.eps).rsqrt()).to(x.dtype)


class TokenNorm(nn.Module):
    """A norm of PyTorch's that takes (N, C), over the tokens (B, T, C).

    The attribute's name keeps its weights among those that are not decayed.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.norm(x.flatten(0, 1)).view_as(x)


# What an ablation may put in PWAM; the first of each is the published form.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda dim: TokenInstanceNorm(),
    "none": lambda dim: nn.Identity(),
    "layer": lambda dim: TokenNorm(nn.LayerNorm(dim)),
    "batch": lambda dim: TokenNorm(nn.BatchNorm1d(dim)),
}
ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": torch.mul,
    "add": torch.add,
    "words": lambda vis, words: words,
}


class PixelWordAttention(nn.Module):
    """Each pixel gathers the words that speak of it (LAVT, Eq. 1-4).

    Args:
        vis_dim: channels C of the visual tokens; also the width of keys, values and output.
        lang_dim: channels of the words.
        num_heads: attention heads.
        attention: a key of :data:`ATTENTIONS`, from logits to weights.
        norm: a key of :data:`NORMS`, of queries and output.
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
        # Scale by C, not by C / heads: released weights expect it.
        self.scale = vis_dim**-0.5
        self.f_key = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.f_query = nn.Sequential(TokenConv1d(vis_dim, vis_dim), NORMS[norm](vis_dim))
        self.f_value = nn.Sequential(TokenConv1d(lang_dim, vis_dim))
        self.W = nn.Sequential(TokenConv1d(vis_dim, vis_dim), NORMS[norm](vis_dim))

    def attention(self, vis: Tensor, lang: Tensor, lang_mask: Tensor) -> Tensor:
        """Weights of the words for each pixel, (B, heads, HW, N_l); of softmax they sum to 1.

        Args:
            vis: (B, HW, C).
            lang: (B, N_l, C_l).
            lang_mask: (B, N_l), 1 = real token.
        """
        query = split_heads(self.f_query(vis), self.num_heads)
        key = split_heads(self.f_key(lang) * lang_mask[..., None].to(vis.dtype), self.num_heads)
        logits = query @ key.transpose(-2, -1) * self.scale
        return self.weigh(logits + word_bias(lang_mask, vis.dtype))

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
        attention, norm: of :class:`PixelWordAttention`.
        combine: a key of :data:`COMBINE`, joining pixels and attended words.
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
        if combine != "words":  # where its result is used
            self.vis_project = nn.Sequential(
                TokenConv1d(vis_dim, vis_dim), nn.GELU(), nn.Dropout(dropout)
            )
        self.image_lang_att = PixelWordAttention(vis_dim, lang_dim, num_heads, attention, norm)
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
        return self.project_mm(self.combine(self.vis_project(vis), words))


class LanguageGate(nn.Sequential):
    """Per-element weights of the fused features, Tanh(W2 ReLU(W1 F)) (LAVT, Eq. 7-8).

    Maps (..., C) to (..., C); the caller adds ``gate(F) * F`` to the visual features.

    Args:
        dim: channels C.
        activation: in the place of Tanh.
    """

    def __init__(self, dim: int, activation: nn.Module | None = None) -> None:
        super().__init__(
            Linear(dim, dim, bias=False),
            nn.ReLU(),
            Linear(dim, dim, bias=False),
            activation or nn.Tanh(),
        )
