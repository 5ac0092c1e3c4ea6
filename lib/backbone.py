"""The multi-modal Swin Transformer: language joins the picture at the end of each stage."""

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
        lang_dim: channels of the words.
        fusion_heads, fusion_drop: of the PWAM.
        last: the last stage has no successor: no merging, and its gate (kept because the
            published weights hold it) is not computed, unless the decoder sees what it gates.
        variant: the form of fusion and gate.
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

    def forward(
        self, x: Tensor, lang: Tensor, lang_mask: Tensor, of_picture: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the stage.

        Args:
            x: (B, H, W, C).
            lang: (B, N_l, C_l).
            lang_mask: (B, N_l), 1 = real token.
            of_picture: (B,), which of the maps each sentence is about; None: each has its own.

        Returns:
            Features for the decoder (F, or V' in a variant), (B, H, W, C), and the input of the
            next stage, (B, ceil(H/2), ceil(W/2), 2C), None after the last stage.
        """
        for block in self.blocks:
            x = block(x)
        if of_picture is not None:
            x = x[of_picture]
        vis = x.flatten(1, 2)  # (B, HW, C)
        fused = self.fusion(vis, lang, lang_mask).view_as(x)
        if self.downsample is None and not self.decode_gated:
            return fused, None
        if self.res_gate is not None:
            x = torch.addcmul(x, self.res_gate(fused), fused)  # V'
        shown = x if self.decode_gated else fused
        return shown, None if self.downsample is None else self.downsample(x)


class MultiModalSwin(nn.Module):
    """Swin backbone with a PWAM and a language gate in every stage (LAVT, Sec. 3.1).

    Args:
        size: widths, depths and heads.
        window_size: 7 or 12 in the published models.
        lang_dim: channels of the words.
        fusion_heads: heads of the four PWAMs.
        fusion_drop: dropout in the PWAMs.
        drop_path: rate of the last block; the others grow linearly from 0.
        ape_grid: side of the grid of an absolute position embedding, added after the patch
            embedding and resized to the picture; 0 (published) for none.
        variant: the form of fusion and gate.
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
        self.stage_dims = size.stage_dims
        self.patch_embed = PatchEmbed(4, size.embed_dim)
        if ape_grid:
            self.absolute_pos_embed = nn.Parameter(position_embedding(size.embed_dim, ape_grid))
        rates = drop_path_rates(size.depths, drop_path)
        last = len(size.depths) - 1
        self.layers = nn.ModuleList(
            MultiModalStage(
                size.stage_dims[i],
                size.depths[i],
                size.num_heads[i],
                window_size,
                rates[i],
                lang_dim,
                fusion_heads[i],
                fusion_drop,
                last=i == last,
                variant=variant,
            )
            for i in range(len(size.depths))
        )
        for i, dim in enumerate(size.stage_dims):
            self.add_module(f"norm{i}", nn.LayerNorm(dim))
        self.apply(init_linear)

    def forward(
        self, image: Tensor, lang: Tensor, lang_mask: Tensor, of_picture: Tensor | None = None
    ) -> list[Tensor]:
        """Encode a picture under the guidance of a sentence.

        Args:
            image: (B, 3, H, W), normalised.
            lang: (B, N_l, C_l) word features.
            lang_mask: (B, N_l), 1 = real token.
            of_picture: (B,), which of the pictures each sentence is about; None: each has its own.

        Returns:
            Four maps (B, C_i, H_i, W_i) of stride 4, 8, 16, 32.
        """
        position = getattr(self, "absolute_pos_embed", None)
        x: Tensor | None = embed(image, self.patch_embed, position)
        maps = []
        for i, stage in enumerate(self.layers):
            fused, x = stage(x, lang, lang_mask, of_picture if i == 0 else None)
            norm = getattr(self, f"norm{i}")
            maps.append(norm(fused).permute(0, 3, 1, 2))
        return maps


def position_embedding(dim: int, grid: int) -> Tensor:
    """Sines and cosines of x and y, (1, C, grid, grid): where an absolute position starts from.

    Smooth, and as large as the normalised patches it is added to. Swin's own start, noise of 0.02,
    makes a network that learns from nothing wait long for "left" and "top".

    Args:
        dim: channels C; a half speaks of x, a half of y.
        grid: side of the grid.
    """
    place = (torch.arange(grid) + 0.5) / grid  # from 0 to 1, whatever the grid
    pairs = dim // 4
    # Wavelengths from twice the picture, which tells left from right, down to an eighth.
    frequency = torch.pi * 2 ** torch.linspace(0, 4, pairs)
    angle = place[:, None] * frequency  # (grid, pairs)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).T  # (2 * pairs, grid)
    x = axis[:, None, :].expand(-1, grid, -1)
    y = axis[:, :, None].expand(-1, -1, grid)
    return F.pad(torch.cat([x, y]), (0, 0, 0, 0, 0, dim - 4 * pairs))[None]


def embed(image: Tensor, patches: nn.Module, position: Tensor | None) -> Tensor:
    """A picture's patches and, where there is one, their absolute position.

    Args:
        image: (B, 3, H, W).
        patches: the :class:`lib.swin.PatchEmbed`.
        position: (1, C, h, w), resized to the picture; or None.

    Returns:
        (B, H/4, W/4, C).
    """
    x: Tensor = patches(image)
    if position is None:
        return x
    position = F.interpolate(position, size=x.shape[1:3], mode="bicubic")
    return x + position.permute(0, 2, 3, 1)


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 and zero bias for linear layers; the others keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
