"""Swin Transformer: patch embedding, window attention blocks, patch merging.

Feature maps are (B, H, W, C) with any H and W. Attribute names are those of the published weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Fused attention kernels of a GPU copy a bias whose rows do not begin at multiples of so many
# elements: those of 7 x 7 windows, 49 wide, are 56 apart.
ALIGNMENT = 8


@dataclass(frozen=True)
class SwinSize:
    """Width and depth of a Swin Transformer (Swin paper, Sec. 3.3).

    Attributes:
        embed_dim: channels C of stage 1; stage i has C * 2**(i-1).
        depths, num_heads: blocks and attention heads of each stage.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of the stages, (C, 2C, 4C, 8C)."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


SWIN_SIZES: dict[str, SwinSize] = {
    "tiny": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # Not published: trains on RefShapes on two CPU cores in minutes.
    "micro": SwinSize(32, (2, 2, 2, 2), (2, 4, 8, 16)),
    "pico": SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8)),
}


class PatchEmbed(nn.Module):
    """Embed each patch of ``patch_size`` x ``patch_size`` pixels (Swin paper, Sec. 3.1)."""

    def __init__(self, patch_size: int = 4, embed_dim: int = 96) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C); padded with zeros right and bottom."""
        H, W = image.shape[-2:]
        p = self.patch_size
        image = F.pad(image, (0, -W % p, 0, -H % p))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halve the resolution and double the channels (Swin paper, Sec. 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C); odd sides are zero-padded by one."""
        H, W = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        # Order (row, column) parity: (even, even), (odd, even), (even, odd), (odd, odd).
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each (query, key) of a window, (N, N) int64, N = window_size**2."""
    axis = torch.arange(window_size)
    coords = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # (2, N)
    offset = coords[:, :, None] - coords[:, None, :] + window_size - 1  # (2, N, N), from 0
    return offset[0] * (2 * window_size - 1) + offset[1]


def align_rows(x: Tensor) -> Tensor:
    """Pad rows to a multiple of :data:`ALIGNMENT` elements on a GPU, (..., N) -> (..., P)."""
    N = x.shape[-1]
    return F.pad(x, (0, -N % ALIGNMENT)) if x.is_cuda and N % ALIGNMENT else x


def build_shift_mask(
    H: int, W: int, window_size: int, shift: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Additive attention mask of shifted windows (Swin paper, Fig. 4).

    Args:
        H, W: size of the padded feature map, multiples of ``window_size``.
        window_size, shift: side of a window and its cyclic shift, > 0.
        device, dtype: of the mask.

    Returns:
        (nW, 1, N, P): 0 between tokens of one region of the unshifted map, else -100; P of
        :func:`align_rows`.
    """

    def bands(size: int) -> Tensor:
        band = torch.zeros(size, dtype=torch.long, device=device)
        band[size - window_size :] = 1
        band[size - shift :] = 2
        return band

    region = bands(H)[:, None] * 3 + bands(W)[None, :]  # (H, W)
    windows = split_windows(region[None, :, :, None], window_size)[0, :, :, 0]  # (nW, N)
    mask = (windows[:, :, None] != windows[:, None, :]).to(dtype) * -100.0
    return align_rows(mask)[:, None]


cached_shift_mask = lru_cache(maxsize=32)(build_shift_mask)


def shift_mask(H: int, W: int, window_size: int, shift: int, like: Tensor) -> Tensor:
    """:func:`build_shift_mask` of a tensor's device and dtype, built once and kept."""
    # A compiled graph has the mask within its kernels. Fake tensors and the like are not kept:
    # a real forward pass could not use them.
    keep = type(like) is Tensor and not torch.compiler.is_compiling()
    make = cached_shift_mask if keep else build_shift_mask
    return make(H, W, window_size, shift, like.device, like.dtype)


def split_windows(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) -> (B, nW, N, C); H and W are multiples of the window."""
    B, H, W, C = x.shape
    w = window_size
    x = x.view(B, H // w, w, W // w, w, C).transpose(2, 3)
    return x.reshape(B, -1, w * w, C)


def join_windows(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """(B, nW, N, C) -> (B, H, W, C), the inverse of :func:`split_windows`."""
    B, _, _, C = windows.shape
    w = window_size
    x = windows.view(B, H // w, W // w, w, w, C).transpose(2, 3)
    return x.reshape(B, H, W, C)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with relative position bias (Swin paper, Eq. 4).

    Args:
        dim, window_size, num_heads: as in :class:`SwinBlock`.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, H: int, W: int, shift: int = 0) -> Tensor:
        """(B, nW, N, C) tokens of the windows of padded, shifted maps (H, W) -> the same shape."""
        B, nW, N, C = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).view(B, nW, N, 3, heads, C // heads).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias().to(qkv.dtype)  # (heads, N, P)
        if shift > 0:
            # Windows and heads share an axis, so that the mask is broadcast over B.
            mask = shift_mask(H, W, self.window_size, shift, like=bias)
            bias = (bias + mask).flatten(0, 1)  # (nW * heads, N, P)
            q, k, v = qkv.flatten(2, 3).unbind(0)
        else:
            q, k, v = qkv.flatten(1, 2).unbind(0)
        # Sliced last: a copy would have dense rows again.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None, ..., :N])
        out = out.view(B, nW, heads, N, C // heads).transpose(2, 3).reshape(B, nW, N, C)
        return self.proj(out)

    def bias(self) -> Tensor:
        """Relative position bias B of each pair of tokens, (heads, N, P).

        P of :func:`align_rows`; the columns from N on have no meaning.
        """
        index = align_rows(self.relative_position_index)
        bias = self.relative_position_bias_table.t().index_select(1, index.flatten())
        return bias.view(self.num_heads, *index.shape)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Pre-norm transformer block with (shifted) window attention (Swin paper, Eq. 3).

    Args:
        dim: channels C.
        num_heads: attention heads.
        window_size: side of a window, also where the feature map is smaller.
        shift: cyclic shift of the windows, 0 for none. Unlike in Swin for classification, windows
            are shifted even where the map fits one window: the published weights expect it.
        drop_path: probability of dropping a residual branch of a sample.

    Attributes:
        recompute: gradient checkpointing: the backward pass computes the block again.
    """

    recompute = False

    def __init__(
        self, dim: int, num_heads: int, window_size: int, shift: int = 0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """(Shifted) window attention of a normalised feature map, (B, H, W, C) -> (B, H, W, C).

        The map is zero-padded right and bottom to a multiple of the window. Padded tokens are
        ordinary keys, as in the published models; their outputs are cropped.
        """
        H, W = x.shape[1:3]
        w, s = self.window_size, self.shift
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        Hp, Wp = x.shape[1:3]
        if s > 0:
            x = x.roll((-s, -s), dims=(1, 2))
        x = join_windows(self.attn(split_windows(x, w), Hp, Wp, s), w, Hp, Wp)
        if s > 0:
            x = x.roll((s, s), dims=(1, 2))
        return x[:, :H, :W]


def swin_blocks(
    dim: int, depth: int, num_heads: int, window_size: int, drop_paths: list[float]
) -> nn.ModuleList:
    """The blocks of a stage; every second one shifts its windows by half a window."""
    return nn.ModuleList(
        SwinBlock(dim, num_heads, window_size, (i % 2) * (window_size // 2), drop_paths[i])
        for i in range(depth)
    )


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Stochastic depth rate of each block by stage, growing linearly from 0 to ``last``."""
    # On the CPU even under torch.device("meta"): these are numbers, not weights.
    rates = torch.linspace(0, last, sum(depths), device="cpu")
    return [stage.tolist() for stage in rates.split(list(depths))]
