"""The decoder: from four maps to two logits a pixel (LAVT, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu.kernels import conv3x3, conv_relu, eager, wants_grad


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
        self.levels = (4, 3, 2)
        top = stage_dims[-1]
        for level, skip in zip(self.levels, reversed(stage_dims[:-1]), strict=True):
            first = top if level == 4 else hidden
            self._add_conv(f"1_{level}", first + skip, hidden)
            self._add_conv(f"2_{level}", hidden, hidden)
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def _add_conv(self, suffix: str, inputs: int, outputs: int) -> None:
        self.add_module(f"conv{suffix}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        self.add_module(f"bn{suffix}", nn.BatchNorm2d(outputs))

    def _conv(self, suffix: str, x: Tensor) -> Tensor:
        conv, norm = getattr(self, f"conv{suffix}"), getattr(self, f"bn{suffix}")
        if norm.training or not eager() or wants_grad(x, conv.weight, norm.weight):
            return F.relu(norm(conv3x3(x, conv.weight)))
        sources = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return conv_relu(x, "folded", sources, lambda dtype: folded(conv, norm, dtype))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Decode.

        Args:
            maps: four maps (B, C_i, H_i, W_i), finest first.

        Returns:
            (B, 2, H_1, W_1) logits of background and object at stride 4.
        """
        x = maps[-1]
        for level, skip in zip(self.levels, reversed(maps[:-1]), strict=True):
            x = torch.cat([upsample(x, skip.shape[-2:]), skip], dim=1)
            x = self._conv(f"2_{level}", self._conv(f"1_{level}", x))
        # As a matmul: faster than a 1x1 convolution with two outputs, and its last bits do not
        # depend on the number of threads, so nor do the counts of an evaluation.
        weight, bias = self.conv1_1.weight.flatten(1), self.conv1_1.get_parameter("bias")
        logits = weight @ x.flatten(2) + bias[:, None]
        return logits.unflatten(2, x.shape[-2:])


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what these two do while evaluating."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight / (variance + norm.eps).sqrt()
    weight = conv.weight * scale[:, None, None, None]
    bias = norm.bias - mean * scale
    return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)
