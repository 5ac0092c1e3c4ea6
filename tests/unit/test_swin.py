"""Swin's parts: windows, region mask, padding, merging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.backbone import MultiModalSwin
from lib.swin import (
    PatchEmbed,
    PatchMerging,
    SwinBlock,
    SwinSize,
    cached_shift_mask,
    join_windows,
    relative_position_index,
    shift_mask,
    split_windows,
)


def block(window: int = 4, shift: int = 0) -> SwinBlock:
    torch.manual_seed(0)
    made = SwinBlock(8, 2, window, shift).double()
    torch.nn.init.normal_(made.attn.relative_position_bias_table)
    torch.nn.init.normal_(made.norm1.bias)
    return made


def test_region_mask_by_hand() -> None:
    """A 4x4 grid, windows of 2, shift 1: only the first window is of one region."""
    mask = shift_mask(4, 4, 2, 1, torch.zeros(1))[:, 0]
    apart = -100.0
    left_right = [[0, apart, 0, apart], [apart, 0, apart, 0]] * 2
    top_bottom = [[0, 0, apart, apart]] * 2 + [[apart, apart, 0, 0]] * 2
    alone = [[0 if i == j else apart for j in range(4)] for i in range(4)]
    expected = torch.tensor([[[0.0] * 4] * 4, left_right, top_bottom, alone])
    assert torch.equal(mask, expected)


def test_region_mask_where_the_map_is_one_window() -> None:
    """It is kept there: the shift is, too."""
    mask = shift_mask(3, 3, 3, 1, torch.zeros(1))[0, 0]
    region = torch.tensor([0, 0, 1, 0, 0, 1, 2, 2, 3])  # what the shift brought together
    expected = torch.where(region[:, None] == region[None, :], 0.0, -100.0)
    assert torch.equal(mask, expected)


def test_relative_position_index_of_a_window_of_two() -> None:
    # Offsets (dy, dx) of query minus key, as 3 * (dy + 1) + (dx + 1).
    expected = torch.tensor([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
    assert torch.equal(relative_position_index(2), expected)


def test_windows_are_split_and_joined() -> None:
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    windows = split_windows(x, 2)
    assert windows.shape == (2, 6, 4, 3)
    assert torch.equal(windows[1, 4], x[1, 2:4, 2:4].reshape(4, 3))
    assert torch.equal(join_windows(windows, 2, 4, 6), x)


def attention_by_hand(part: SwinBlock, x: Tensor) -> Tensor:
    """Window attention of a normed map (1, H, W, C), one query and key at a time."""
    w, s = part.window_size, part.shift
    H, W, C = x.shape[1:]
    Hp, Wp = -(-H // w) * w, -(-W // w) * w
    padded = F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))[0]
    heads = part.attn.num_heads
    table = part.attn.relative_position_bias_table.view(2 * w - 1, 2 * w - 1, heads)
    q, k, v = part.attn.qkv(padded).view(Hp, Wp, 3, heads, C // heads).unbind(2)

    def place(i: int, size: int) -> tuple[int, int, int]:
        """Window, position in it, and region, of row or column i."""
        shifted = (i - s) % size
        band = 0 if shifted < size - w else 1 if shifted < size - s else 2
        return shifted // w, shifted % w, band if s else 0

    out = torch.zeros(H, W, C, dtype=x.dtype)
    for y in range(H):
        for z in range(W):
            (wy, py, by), (wz, pz, bz) = place(y, Hp), place(z, Wp)
            logits, values = [], []
            for i in range(Hp):
                for j in range(Wp):
                    (wi, pi, bi), (wj, pj, bj) = place(i, Hp), place(j, Wp)
                    if (wi, wj) != (wy, wz):
                        continue
                    scores = (q[y, z] * k[i, j]).sum(-1) * (C // heads) ** -0.5
                    scores = scores + table[py - pi + w - 1, pz - pj + w - 1]
                    logits.append(scores - (0 if (bi, bj) == (by, bz) else 100))
                    values.append(v[i, j])
            weights = torch.stack(logits).softmax(0)
            out[y, z] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return part.attn.proj(out)[None]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1), (2, 2)])
@torch.no_grad()
def test_attention_of_a_block_is_the_one_by_hand(size: tuple[int, int], shift: int) -> None:
    part = block(window=2 if size != (5, 3) else 3, shift=shift)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(part.attend(x), attention_by_hand(part, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_padding_comes_after_the_norm_and_is_attended_to() -> None:
    part = block()
    small = torch.randn(1, 3, 3, 8, dtype=torch.float64)
    normed = part.norm1(small)
    zeros_by_hand = F.pad(normed, (0, 0, 0, 1, 0, 1))
    torch.testing.assert_close(part.attend(normed), part.attend(zeros_by_hand)[:, :3, :3])
    alone = part.attend(normed[:, :2, :2])
    assert not torch.allclose(alone, part.attend(normed)[:, :2, :2])


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (4, 4), (5, 11)])
@torch.no_grad()
def test_a_block_takes_any_size(size: tuple[int, int], shift: int) -> None:
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    y = block(shift=shift)(x)
    assert y.shape == x.shape
    assert y.isfinite().all()


@torch.no_grad()
def test_a_batch_is_its_samples() -> None:
    part, x = block(shift=2), torch.randn(3, 6, 5, 8, dtype=torch.float64)
    one_by_one = torch.cat([part(sample[None]) for sample in x])
    torch.testing.assert_close(part(x), one_by_one, rtol=0, atol=1e-12)


@torch.no_grad()
def test_merging_order_and_odd_sides() -> None:
    merge = PatchMerging(2)
    merge.norm = torch.nn.Identity()  # type: ignore[assignment]
    torch.nn.init.zeros_(merge.reduction.weight)
    merge.reduction.weight[:4] = torch.eye(4, 8)  # shows the first two of four neighbours
    x = torch.arange(2 * 3 * 2.0).view(1, 2, 3, 2)
    y = merge(x)
    assert y.shape == (1, 1, 2, 4)
    assert torch.equal(y[0, 0, 0], torch.cat([x[0, 0, 0], x[0, 1, 0]]))  # a row down comes second
    assert torch.equal(y[0, 0, 1], torch.cat([x[0, 0, 2], x[0, 1, 2]]))
    merge.reduction.weight[:4] = torch.eye(8)[4:]
    assert torch.equal(merge(x)[0, 0, 0], torch.cat([x[0, 0, 1], x[0, 1, 1]]))
    assert not merge(x)[0, 0, 1].any()  # the column that was padded


@torch.no_grad()
def test_patch_embedding_pads_right_and_bottom() -> None:
    embed = PatchEmbed(4, 8)
    image = torch.randn(1, 3, 5, 9)
    assert embed(image).shape == (1, 2, 3, 8)
    torch.testing.assert_close(embed(image), embed(F.pad(image, (0, 3, 0, 3))))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (33, 50), (97, 31)])
@torch.no_grad()
def test_backbone_takes_any_size(size: tuple[int, int]) -> None:
    swin = MultiModalSwin(SwinSize(4, (2, 2, 2, 2), (1, 1, 2, 2)), 7, lang_dim=6).eval()
    maps = swin(torch.randn(2, 3, *size), torch.randn(2, 5, 6), torch.ones(2, 5))
    H, W = -(-size[0] // 4), -(-size[1] // 4)
    for i, result in enumerate(maps):
        assert result.shape == (2, 4 * 2**i, H, W)
        assert result.isfinite().all()
        H, W = -(-H // 2), -(-W // 2)


def test_a_mask_cached_while_evaluating_serves_training() -> None:
    part = block(window=3, shift=1)
    x = torch.randn(1, 5, 5, 8, dtype=torch.float64)
    cached_shift_mask.cache_clear()
    with torch.inference_mode():
        part(x)
    part(x).sum().backward()
    assert part.attn.qkv.weight.grad is not None
