"""Window attention for eager CPU code, in pieces that fit the caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.cpu.kernels import wants_grad

# Elements of the attention weights that are computed at a time.
CHUNK = 2**20


class Layout(NamedTuple):
    """The place of each token of a batch of feature maps in their windows.

    Attributes:
        token: (B * nW * N,) int64, the token (of B * HW) in each place of the windows; any token
            in places of the padding.
        padding: (B * nW * N,) bool, whether a place is padding.
        place: (B * HW,) int64, the place of each token.
        padded: whether there is any padding.
    """

    token: Tensor
    padding: Tensor
    place: Tensor
    padded: bool


@lru_cache(maxsize=64)
def window_layout(B: int, H: int, W: int, window_size: int, shift: int) -> Layout:
    """The layout of B maps (H, W) padded right and bottom, rolled by ``-shift``, cut in windows."""
    w = window_size
    with torch.inference_mode(False):
        number = F.pad(torch.arange(H * W).view(H, W), (0, -W % w, 0, -H % w), value=-1)
        Hp, Wp = number.shape
        number = number.roll((-shift, -shift), dims=(0, 1))
        number = number.view(Hp // w, w, Wp // w, w).transpose(1, 2).reshape(1, -1)
        padding = (number < 0).expand(B, -1).flatten()
        token = (number.clamp(min=0) + torch.arange(B)[:, None] * H * W).flatten()
        place = torch.empty(B * H * W, dtype=torch.long)
        kept = (~padding).nonzero().flatten()
        place[token[kept]] = kept
        return Layout(token, padding, place, bool(padding.any()))


def attend(qkv: Tensor, edge: Tensor, bias: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """Softmax(q k^T / sqrt(d) + bias + mask) v within windows (Swin paper, Eq. 4), on the CPU.

    Tokens are gathered into windows piece by piece, so that no padded or shifted feature map is
    made; the softmax is in float32 or float64.

    Args:
        qkv: (B, HW, 3C) queries, keys and values of the tokens.
        edge: (3C,) those of a padded token.
        bias: (heads, N, N).
        mask: (nW, N, N) additive, or None.
        layout: of the B maps.

    Returns:
        (B, HW, C).
    """
    if wants_grad(qkv, edge, bias):
        return _Attention.apply(qkv, edge, bias, mask, layout)
    return _attend(qkv, edge, bias, mask, layout)


def _attend(
    qkv: Tensor,
    edge: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    layout: Layout,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """See :func:`attend`; appends the attention weights of each piece to ``weights``."""
    heads, N, _ = bias.shape
    C = qkv.shape[-1] // 3
    tokens = qkv.flatten(0, 1)
    out_places = qkv.new_empty(len(layout.token), C)
    for piece in _pieces(layout, qkv.shape[0], heads, N):
        q, k, v = _gather(tokens, edge, layout, piece, N, heads)
        logits = _logits(q, k, bias, mask, piece)
        attention = logits.softmax(dim=-1).to(qkv.dtype).flatten(0, 1)
        out = torch.bmm(attention, v).view(-1, heads, N, C // heads)
        out_places[piece].view(-1, N, heads, C // heads).copy_(out.transpose(1, 2))
        if weights is not None:
            weights.append(attention)
    return out_places.index_select(0, layout.place).view(*qkv.shape[:2], C)


class _Attention(torch.autograd.Function):
    """:func:`attend`, with its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, edge: Tensor, bias: Tensor, mask: Tensor | None, layout: Layout
    ) -> Tensor:
        """Attend, and keep the attention weights."""
        weights: list[Tensor] = []
        out = _attend(qkv, edge, bias, mask, layout, weights)
        ctx.layout, ctx.shape = layout, (bias.shape[0], bias.shape[1])
        ctx.save_for_backward(qkv, edge, bias, *weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv, edge and bias."""
        qkv, edge, bias, *weights = ctx.saved_tensors
        layout, (heads, N) = ctx.layout, ctx.shape
        tokens, C = qkv.flatten(0, 1), grad.shape[-1]
        d = C // heads
        grad = grad.flatten(0, 1)
        for_places = qkv.new_empty(len(layout.token), 3 * C)
        for_bias = torch.zeros_like(bias)
        pieces = _pieces(layout, qkv.shape[0], heads, N)
        for piece, attention in zip(pieces, weights, strict=True):
            q, k, v = _gather(tokens, edge, layout, piece, N, heads)
            g = grad.index_select(0, layout.token[piece])
            if layout.padded:
                g.masked_fill_(layout.padding[piece, None], 0)
            g = g.view(-1, N, heads, d).transpose(1, 2).reshape(-1, N, d)
            change = _softmax_backward(torch.bmm(g, v.transpose(1, 2)), attention)
            for_bias += change.view(-1, heads, N, N).sum(0)
            change = change.to(qkv.dtype)
            parts = for_places[piece].view(-1, N, 3, heads, d)
            scaled = (torch.bmm(change, k), torch.bmm(change.transpose(1, 2), q))
            for i, part in enumerate((*scaled, torch.bmm(attention.transpose(1, 2), g))):
                part = part if i == 2 else part.mul_(d**-0.5)
                parts[:, :, i].copy_(part.view(-1, heads, N, d).transpose(1, 2))
        for_edge = torch.zeros_like(edge)
        if layout.padded:
            for_edge += for_places[layout.padding].sum(0)
        for_tokens = for_places.index_select(0, layout.place).view_as(qkv)
        return for_tokens, for_edge, for_bias, None, None


def _pieces(layout: Layout, B: int, heads: int, N: int) -> Iterator[slice]:
    """Slices of the places: several feature maps each, or some windows of one."""
    per_map = len(layout.token) // B  # places
    step = max(1, CHUNK // (heads * N * N)) * N
    step = step // per_map * per_map if step >= per_map else step
    for start in range(0, len(layout.token), max(step, per_map)):
        stop = min(start + max(step, per_map), len(layout.token))
        for place in range(start, stop, step):
            yield slice(place, min(place + step, stop))


def _gather(
    tokens: Tensor, edge: Tensor, layout: Layout, piece: slice, N: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some windows, each (windows * heads, N, C/heads)."""
    rows = tokens.index_select(0, layout.token[piece])
    if layout.padded:
        rows[layout.padding[piece]] = edge
    d = rows.shape[1] // (3 * heads)
    split = rows.view(-1, N, 3, heads, d).permute(2, 0, 3, 1, 4).contiguous()
    q, k, v = split.flatten(1, 2).unbind(0)
    return q, k, v


def _logits(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, piece: slice) -> Tensor:
    """q k^T / sqrt(d) + bias + mask, (windows, heads, N, N), in float32 or float64."""
    heads, N, _ = bias.shape
    logits = torch.bmm(q, k.transpose(1, 2))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, heads, N, N)
    torch.add(bias, logits, alpha=q.shape[-1] ** -0.5, out=logits)
    if mask is not None:
        windows, nW = len(logits), len(mask)
        first = piece.start // N % nW
        logits.view(-1, min(windows, nW), heads, N, N).add_(mask[first : first + windows, None])
    return logits


def _softmax_backward(grad: Tensor, attention: Tensor) -> Tensor:
    """The gradient of logits from that of their softmax, in float32 or float64."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return torch._softmax_backward_data(grad.to(dtype), attention.to(dtype), -1, dtype)
