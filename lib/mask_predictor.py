"""The decoder: from four feature maps to two logits per pixel (LAVT, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upsample(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear resize with aligned corners, (B, C, h, w) -> (B, C, H, W)."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class MaskPredictor(nn.Module):
    """Top-down decoder: Y_i = convs([up(Y_{i+1}); F_i]), then a 1x1 convolution (LAVT, Eq. 9-10).

    Args:
        stage_dims: channels of the four stages, (C, 2C, 4C, 8C).
    """

    def __init__(self, stage_dims: Sequence[int]) -> None:
        super().__init__()
        hidden = stage_dims[-1] // 2
        above = stage_dims[-1]
        for level, skip in zip((4, 3, 2), reversed(stage_dims[:-1]), strict=True):
            self._add_conv(f"1_{level}", above + skip, hidden)
            self._add_conv(f"2_{level}", hidden, hidden)
            above = hidden
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def _add_conv(self, suffix: str, inputs: int, outputs: int) -> None:
        self.add_module(f"conv{suffix}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        self.add_module(f"bn{suffix}", nn.BatchNorm2d(outputs))

    def conv_bn_relu(self, suffix: str, x: Tensor) -> Tensor:
        """3x3 convolution, batch norm and ReLU, (B, in, H, W) -> (B, out, H, W)."""
        return F.relu(getattr(self, f"bn{suffix}")(getattr(self, f"conv{suffix}")(x)))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Decode.

        Args:
            maps: four feature maps (B, C_i, H_i, W_i), finest first.

        Returns:
            (B, 2, H_1, W_1) logits of background and object at stride 4.
        """
        x = maps[-1]
        for level, skip in zip((4, 3, 2), reversed(maps[:-1]), strict=True):
            x = torch.cat([upsample(x, skip.shape[-2:]), skip], dim=1)
            x = self.conv_bn_relu(f"2_{level}", self.conv_bn_relu(f"1_{level}", x))
        # The 1x1 convolution as a matmul: its rounding does not depend on the number of threads,
        # so neither do an evaluation's metrics.
        weight, bias = self.conv1_1.weight.flatten(1), self.conv1_1.get_parameter("bias")
        return (weight @ x.flatten(2) + bias[:, None]).unflatten(2, x.shape[-2:])
