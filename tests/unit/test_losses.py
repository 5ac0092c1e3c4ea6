"""Losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lib.losses import LOSSES, cross_entropy, dice


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
