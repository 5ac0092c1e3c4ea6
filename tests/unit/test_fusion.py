"""PWAM and the language gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.fusion import PWAM, LanguageGate, PixelWordAttention, TokenConv1d, TokenInstanceNorm

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def words_and_pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    vis = torch.randn(2, 12, 8, generator=generator, dtype=torch.float64)
    lang = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return vis, lang


def pwam(heads: int = 1) -> PWAM:
    torch.manual_seed(0)
    return PWAM(8, 6, heads).double().eval()


def conv(part: nn.Sequential, x: Tensor) -> Tensor:
    """The 1x1 convolution of a published weight, on (B, C, T)."""
    first = part[0]
    assert isinstance(first, nn.Conv1d)
    return F.conv1d(x, first.weight, first.bias)


def attention_by_paper(att: PixelWordAttention, vis: Tensor, lang: Tensor, mask: Tensor) -> Tensor:
    """The equations on (B, C, T), with PyTorch's own convolution and instance norm."""
    B, HW, C = vis.shape
    h, m = att.num_heads, mask[:, None].double()
    query = F.instance_norm(conv(att.f_query, vis.mT)).view(B, h, C // h, HW)
    key = (conv(att.f_key, lang.mT) * m).view(B, h, C // h, -1)
    value = (conv(att.f_value, lang.mT) * m).view(B, h, C // h, -1)
    logits = query.mT @ key / C**0.5 + (1e4 * m - 1e4)[:, None]
    out = (logits.softmax(-1) @ value.mT).mT.reshape(B, C, HW)
    return F.instance_norm(conv(att.W, out)).mT


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_pwam_is_the_papers(heads: int) -> None:
    fuse, (vis, lang) = pwam(heads), words_and_pixels()
    words = attention_by_paper(fuse.image_lang_att, vis, lang, MASK)
    expected = F.gelu(conv(fuse.project_mm, (F.gelu(conv(fuse.vis_project, vis.mT)).mT * words).mT))
    torch.testing.assert_close(fuse(vis, lang, MASK), expected.mT, rtol=0, atol=1e-12)


@torch.no_grad()
def test_padded_words_have_no_influence() -> None:
    fuse, (vis, lang) = pwam(2), words_and_pixels()
    other = lang.clone()
    other[0, 3:] = 1e3
    assert torch.equal(fuse(vis, lang, MASK), fuse(vis, other, MASK))
    torch.testing.assert_close(
        fuse(vis[:1], lang[:1, :3], MASK[:1, :3]), fuse(vis, lang, MASK)[:1], rtol=0, atol=1e-12
    )
    weights = fuse.image_lang_att.attention(vis, lang, MASK)
    assert not weights[0, :, :, 3:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@torch.no_grad()
def test_real_words_have_influence() -> None:
    fuse, (vis, lang) = pwam(), words_and_pixels()
    other = lang.clone()
    other[0, 2] += 1
    changed = (fuse(vis, lang, MASK) != fuse(vis, other, MASK)).flatten(1).any(1)
    assert changed.tolist() == [True, False]  # and only those of its own sample


@torch.no_grad()
def test_an_expression_without_words_is_finite() -> None:
    fuse, (vis, lang) = pwam(), words_and_pixels()
    assert fuse(vis, lang, torch.zeros_like(MASK)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@torch.no_grad()
def test_mask_of_any_type(dtype: torch.dtype) -> None:
    fuse, (vis, lang) = pwam(), words_and_pixels()
    assert torch.equal(fuse(vis, lang, MASK.to(dtype)), fuse(vis, lang, MASK))


@torch.no_grad()
def test_one_pixel_gives_finite_features() -> None:
    fuse, (vis, lang) = pwam(), words_and_pixels()
    assert fuse(vis[:, :1], lang, MASK).isfinite().all()


@torch.no_grad()
def test_token_layers_equal_pytorchs() -> None:
    vis, _ = words_and_pixels()
    layer = TokenConv1d(8, 4).double()
    assert layer.weight.shape == (4, 8, 1)
    by_torch = F.conv1d(vis.mT, layer.weight, layer.bias).mT
    torch.testing.assert_close(layer(vis), by_torch, rtol=0, atol=1e-14)
    torch.testing.assert_close(TokenInstanceNorm()(vis), F.instance_norm(vis.mT).mT)
    assert not TokenInstanceNorm()(vis[:, :1]).any()


@torch.no_grad()
def test_gate_is_within_one_and_closed_at_zero() -> None:
    gate = LanguageGate(8).double()
    vis, _ = words_and_pixels()
    first, second = gate.state_dict().values()
    expected = torch.tanh(F.relu(vis @ first.T) @ second.T)
    torch.testing.assert_close(gate(vis), expected)
    assert gate(100 * vis).abs().max() <= 1
    assert not gate(torch.zeros_like(vis)).any()
    assert list(gate.state_dict()) == ["0.weight", "2.weight"]


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    fuse, (vis, lang) = PWAM(8, 6, dropout=0.5).double(), words_and_pixels()
    assert not torch.equal(fuse(vis, lang, MASK), fuse(vis, lang, MASK))
    fuse.eval()
    assert torch.equal(fuse(vis, lang, MASK), fuse(vis, lang, MASK))
