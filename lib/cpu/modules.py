"""Accelerated subclasses of the network's modules, and their exchange."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import fusion, mask_predictor, swin
from lib.cpu import kernels, windows
from lib.cpu.kernels import applies, prepared, wants_grad

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M) -> M:
    """Exchange the classes of the model's modules, in place; returns the model.

    Parameters, names and the state dict stay as they are. Subclasses of the exchanged classes are
    left alone.
    """
    for module in model.modules():
        module.__class__ = ACCELERATED.get(type(module), type(module))
    return model


def ordinary(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module can be computed by its parent: exactly of this class, without hooks."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


class Accelerated(nn.Module):
    """Its prepared weights are dropped when the mode is set."""

    def train(self, mode: bool = True) -> Accelerated:
        """Set the mode."""
        kernels.forget(self.parameters())
        return super().train(mode)


class Linear(Accelerated, nn.Linear):
    """``nn.Linear`` by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = kernels.linear(x, self.weight, self.bias)
        return super().forward(x) if y is None else y


class TokenConv1d(Accelerated, fusion.TokenConv1d):
    """A 1x1 convolution of tokens by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        y = kernels.linear(x, self.weight, self.bias)
        return super().forward(x) if y is None else y


class Mlp(swin.Mlp):
    """In inference the GELU is fused with the first linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden = None
        if ordinary(self.fc1, Linear):
            hidden = kernels.linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return super().forward(x) if hidden is None else self.fc2(hidden)


class SwinBlock(Accelerated, swin.SwinBlock):
    """Window attention without padding, rolling and cutting feature maps."""

    def attend(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        attn, w, s = self.attn, self.window_size, self.shift
        plain = ordinary(attn, swin.WindowAttention) and ordinary(attn.qkv, Linear)
        if not (plain and applies(x, attn.qkv.weight)):
            return super().attend(x)
        H, W = x.shape[1:3]
        table, index = attn.relative_position_bias_table, attn.relative_position_index
        mask = None
        if s > 0:
            mask = swin.shift_mask(H + -H % w, W + -W % w, w, s, like=x)[:, 0]
        fixed = not wants_grad(table)
        bias = prepared("bias", (table, index), attn.bias) if fixed else attn.bias()
        qkv = attn.qkv(x).flatten(1, 2)
        padded_token = attn.qkv.bias.to(qkv.dtype)  # query, key and value of zeros
        layout = windows.window_layout(*x.shape[:3], w, s)
        out = windows.attend(qkv, padded_token, bias, mask, layout)
        return attn.proj(out.view(x.shape))


class MaskPredictor(Accelerated, mask_predictor.MaskPredictor):
    """In inference batch norms are folded into the convolutions."""

    def conv_bn_relu(self, suffix: str, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        conv, norm = getattr(self, f"conv{suffix}"), getattr(self, f"bn{suffix}")
        y = None
        plain = ordinary(conv, nn.Conv2d) and ordinary(norm, nn.BatchNorm2d)
        if plain and applies(x, conv.weight):
            if norm.training or wants_grad(x, conv.weight, norm.weight, norm.bias):
                y = kernels.conv3x3(x, conv.weight)
                y = None if y is None else F.relu(norm(y))
            else:
                buffers = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
                sources = (conv.weight, norm.weight, norm.bias, *buffers)
                y = kernels.conv_relu(x, sources, lambda dtype: fold(conv, norm, dtype))
        return super().conv_bn_relu(suffix, x) if y is None else y


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution and a norm in eval mode."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight / (variance + norm.eps).sqrt()
    weight = conv.weight * scale[:, None, None, None]
    bias = norm.bias - mean * scale
    return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)


ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    fusion.TokenConv1d: TokenConv1d,
    swin.Mlp: Mlp,
    swin.SwinBlock: SwinBlock,
    mask_predictor.MaskPredictor: MaskPredictor,
}
