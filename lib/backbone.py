"""The multi-modal Swin Transformer: a PWAM and a language gate in every stage (LAVT, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.swin import PatchEmbed, PatchMerging, SwinSize, drop_path_rates, swin_blocks
from lib.variants import PUBLISHED, Variant


class MultiModalStage(nn.Module):
    """Swin blocks, PWAM, language gate and patch merging (LAVT, Fig. 2).

    Args:
        dim: channels C of the stage.
        depth, num_heads, window_size, drop_paths: of the Swin blocks.
        lang_dim: channels C_l of the word features.
        fusion_heads, fusion_drop: heads and dropout of the PWAM.
        last: no patch merging follows. The last gate is in the published weights, but computed
            only if the decoder reads its output.
        variant: the forms of fusion and gate.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: int,
        drop_paths: list[float],
        lang_dim: int,
        fusion_heads: int = 1,
        fusion_drop: float = 0.0,
        last: bool = False,
        variant: Variant = PUBLISHED,
    ) -> None:
        super().__init__()
        self.decode_gated = variant.decoder_features == "V"
        self.blocks = swin_blocks(dim, depth, num_heads, window_size, drop_paths)
        self.fusion = variant.build_fusion(dim, lang_dim, fusion_heads, fusion_drop)
        self.res_gate = variant.build_gate(dim)
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor, lang: Tensor, lang_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the stage.

        Args:
            x: (B, H, W, C).
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.

        Returns:
            The decoder's input, F (in a variant V'), (B, H, W, C), and the next stage's,
            (B, ceil(H/2), ceil(W/2), 2C), None after the last stage.
        """
        for block in self.blocks:
            x = block(x)
        fused = self.fusion(x.flatten(1, 2), lang, lang_mask).view_as(x)  # F
        if self.downsample is None and not self.decode_gated:
            return fused, None
        if self.res_gate is not None:
            x = torch.addcmul(x, self.res_gate(fused), fused)  # V' = V + S * F (LAVT, Sec. 3.3)
        skip = x if self.decode_gated else fused
        return skip, None if self.downsample is None else self.downsample(x)


class MultiModalSwin(nn.Module):
    """Swin backbone with a PWAM and a language gate in every stage (LAVT, Sec. 3.1).

    Args:
        size: widths, depths and heads.
        window_size: 7 or 12 in the published models.
        lang_dim: channels C_l of the word features.
        fusion_heads, fusion_drop: heads of the four PWAMs, and their dropout.
        drop_path: rate of the last block; the others grow linearly from 0.
        ape_grid: side of the grid of an absolute position embedding, which is added to the
            patches, resized to the image; 0 (published) for none.
        variant: the forms of fusion and gate.
    """

    def __init__(
        self,
        size: SwinSize,
        window_size: int,
        lang_dim: int,
        fusion_heads: Sequence[int] = (1, 1, 1, 1),
        fusion_drop: float = 0.0,
        drop_path: float = 0.3,
        ape_grid: int = 0,
        variant: Variant = PUBLISHED,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(4, size.embed_dim)
        if ape_grid:
            self.absolute_pos_embed = nn.Parameter(position_embedding(size.embed_dim, ape_grid))
        rates = drop_path_rates(size.depths, drop_path)
        self.layers = nn.ModuleList(
            MultiModalStage(
                dim,
                size.depths[i],
                size.num_heads[i],
                window_size,
                rates[i],
                lang_dim,
                fusion_heads[i],
                fusion_drop,
                last=i == len(size.depths) - 1,
                variant=variant,
            )
            for i, dim in enumerate(size.stage_dims)
        )
        for i, dim in enumerate(size.stage_dims):
            self.add_module(f"norm{i}", nn.LayerNorm(dim))
        self.apply(init_linear)

    def forward(self, image: Tensor, lang: Tensor, lang_mask: Tensor) -> list[Tensor]:
        """Encode an image together with an expression.

        Args:
            image: (B, 3, H, W), normalised.
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.

        Returns:
            Four feature maps (B, C_i, H_i, W_i) of stride 4, 8, 16, 32.
        """
        x = embed(image, self.patch_embed, getattr(self, "absolute_pos_embed", None))
        maps = []
        for i, stage in enumerate(self.layers):
            skip, x = stage(x, lang, lang_mask)
            maps.append(getattr(self, f"norm{i}")(skip).permute(0, 3, 1, 2))
        return maps


def position_embedding(dim: int, grid: int) -> Tensor:
    """Initial absolute position embedding: sines and cosines of x and y, (1, C, grid, grid).

    As large as the normalised patch embeddings. With Swin's own initialisation (normal, std 0.02) a
    network without pretrained weights learns words such as "left" and "top" slowly.

    Args:
        dim: channels C; one half encodes x, the other y.
        grid: side of the grid.
    """
    place = (torch.arange(grid) + 0.5) / grid  # in (0, 1)
    pairs = dim // 4
    # Wavelengths from 2 to 1/8 of the image's side; the longest separates left from right.
    frequency = torch.pi * 2 ** torch.linspace(0, 4, pairs)
    angle = place[:, None] * frequency  # (grid, pairs)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).T  # (2 * pairs, grid)
    x = axis[:, None, :].expand(-1, grid, -1)
    y = axis[:, :, None].expand(-1, -1, grid)
    return F.pad(torch.cat([x, y]), (0, 0, 0, 0, 0, dim - 4 * pairs))[None]


def embed(image: Tensor, patch_embed: nn.Module, position: Tensor | None) -> Tensor:
    """Patch embedding plus the absolute position embedding (1, C, h, w), if there is one.

    (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C).
    """
    x: Tensor = patch_embed(image)
    if position is None:
        return x
    position = F.interpolate(position, size=x.shape[1:3], mode="bicubic")
    return x + position.permute(0, 2, 3, 1)


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 and zero bias for linear layers; others keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
