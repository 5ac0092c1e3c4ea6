"""Sizes of the Swin backbone, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SwinSize:
    """Width and depth of a Swin Transformer (Swin paper, Sec. 3.3).

    Attributes:
        embed_dim: channels C of stage 1; stage i has C * 2**(i-1).
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage.
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
    # Not published: small enough to learn RefShapes on two CPU cores in minutes.
    "micro": SwinSize(32, (2, 2, 2, 2), (2, 4, 8, 16)),
}
