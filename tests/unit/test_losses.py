"""Losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lib.errors import InputError
from lib.losses import LOSSES, cross_entropy, dice, dice_sum, named_losses, parse_losses


def logits_of(object_probability: list[float]) -> tuple[Tensor, Tensor]:
    """Logits (1, 2, 1, N) of the given probabilities, and log-probabilities (N, 2)."""
    p = torch.tensor(object_probability, dtype=torch.float64)
    log = torch.stack([1 - p, p]).log()
    return log[None, :, None, :], log.T


def test_cross_entropy_is_weighted_by_the_pixels_class() -> None:
    logits, log = logits_of([0.2, 0.7, 0.5])
    target = torch.tensor([[[0, 1, 1]]])
    weighted = -(0.9 * log[0, 0] + 1.1 * log[1, 1] + 1.1 * log[2, 1])
    assert cross_entropy(logits, target).item() == pytest.approx(weighted.item() / (0.9 + 1.1 * 2))


def test_cross_entropy_without_an_object_is_plain() -> None:
    logits, log = logits_of([0.2, 0.4])
    result = cross_entropy(logits, torch.zeros(1, 1, 2, dtype=torch.int64))
    assert result.item() == pytest.approx(-log[:, 0].mean().item())


def test_dice_by_hand() -> None:
    logits, _ = logits_of([0.8, 0.4])
    target = torch.tensor([[[1, 0]]])
    p = [(0.2, 0.6), (0.8, 0.4)]  # background, object
    background = 1 - 2 * 0.6 / (p[0][0] ** 2 + p[0][1] ** 2 + 1)
    foreground = 1 - 2 * 0.8 / (p[1][0] ** 2 + p[1][1] ** 2 + 1)
    assert dice(logits, target).item() == pytest.approx((background + foreground) / 2, abs=1e-6)


def test_dice_of_a_perfect_and_of_a_wrong_mask() -> None:
    target = torch.randint(0, 2, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    sure = 50.0 * torch.stack([1 - target, target], dim=1)
    assert dice(sure, target).item() == pytest.approx(0, abs=1e-6)
    assert dice(-sure, target).item() == pytest.approx(1, abs=1e-6)


def test_dice_of_an_absent_class_that_is_not_predicted_costs_nothing() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    sure = torch.stack([torch.full((1, 4, 4), 50.0), torch.full((1, 4, 4), -50.0)], dim=1)
    assert dice(sure, target).item() == pytest.approx(0, abs=1e-6)


def test_dice_sum_by_hand() -> None:
    """Two samples, the second without an object; sizes are not squared, all terms are summed."""
    p = torch.tensor([[0.8, 0.4], [0.1, 0.3]], dtype=torch.float64)
    logits = torch.stack([1 - p, p], 1).log()[:, :, None]
    target = torch.tensor([[[1, 0]], [[0, 0]]])
    terms = [
        1 - (2 * 0.6 + 1e-6) / (0.8 + 1 + 1e-6),
        1 - (2 * 0.8 + 1e-6) / (1.2 + 1 + 1e-6),
        1 - (2 * 1.6 + 1e-6) / (1.6 + 2 + 1e-6),
        1 - 1e-6 / (0.4 + 1e-6),
    ]
    assert dice_sum(logits, target).item() == pytest.approx(sum(terms), rel=1e-12)


def test_several_losses_are_a_weighted_sum_with_names() -> None:
    logits, target = torch.randn(2, 2, 5, 4, dtype=torch.float64), torch.randint(2, (2, 5, 4))
    loss = parse_losses("ce:0.9,dice:.1,dice_sum:0")
    named = named_losses(loss, logits, target)
    assert list(named) == ["ce", "dice"]
    assert named["ce"] == 0.9 * cross_entropy(logits, target)
    assert named["dice"] == 0.1 * dice(logits, target)
    assert torch.allclose(loss(logits, target), named["ce"] + named["dice"], rtol=1e-14)
    assert list(named_losses(parse_losses("dice_sum"), logits, target)) == ["dice_sum"]
    both = named_losses(parse_losses("ce,dice"), logits, target)
    assert both == {"ce": cross_entropy(logits, target), "dice": dice(logits, target)}
    assert list(named_losses(dice, logits, target)) == ["seg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("focal", "'focal' is none of ce, dice, dice_sum"),
        ("", "'' is none of ce"),
        ("ce,", "'' is none of ce"),
        ("ce:1,ce:2", "'ce' is named twice"),
        ("ce:-1", "the weight '-1' must be a number from 0 on"),
        ("ce:much", "the weight 'much' must be a number"),
        ("ce:", "the weight '' must be a number"),
        ("ce:nan", "the weight 'nan' must be"),
        ("ce:1,dice:inf", "the weight 'inf' must be"),
        ("ce:0,dice:0", "at least one weight must be above 0"),
    ],
)
def test_wrong_lists_of_losses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_losses(text)
    assert str(caught.value).startswith(f"--loss {text}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_and_descend(name: str) -> None:
    logits = torch.zeros(2, 2, 4, 4, requires_grad=True)
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    target[0, :2] = 1  # the second sample has no object
    before = LOSSES[name](logits, target)
    before.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    after = LOSSES[name](logits.detach() - 0.5 * logits.grad, target)
    assert math.isfinite(before.item())
    assert after.item() < before.item()


def test_deterministic_cross_entropy_is_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here the way there is taken on the CPU."""
    logits, target = torch.randn(2, 2, 5, 4, dtype=torch.float64), torch.randint(2, (2, 5, 4))
    expected = cross_entropy(logits, target)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert torch.allclose(cross_entropy(logits, target), expected, rtol=1e-12)
