"""Losses over two-class logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_WEIGHTS = (0.9, 1.1)  # background, object

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted cross entropy, 0.9 for background and 1.1 for the object (LAVT, Sec. 4.2).

    Args:
        logits: (B, 2, H, W).
        target: (B, H, W) int64 in {0, 1}.

    Returns:
        Scalar, the mean weighted by the weights of the pixels' classes.
    """
    weights = logits.new_tensor(CLASS_WEIGHTS)
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
        # PyTorch's own has no deterministic form there; this is the same sum, written out.
        truth = torch.stack([1 - target, target], dim=1) * weights[:, None, None]
        return -(logits.log_softmax(dim=1) * truth).sum() / truth.sum()
    return F.cross_entropy(logits, target, weights)


def dice(logits: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Multi-class Dice loss: softmax, squared denominator, mean over background and object.

    Per sample and class 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)); the loss of ``lavt_one``'s later
    results.

    Args:
        logits: (B, 2, H, W).
        target: (B, H, W) int64 in {0, 1}.
        eps: added to numerator and denominator, so that an absent class that is not predicted
            costs nothing.

    Returns:
        Scalar in [0, 1].
    """
    probability = logits.float().softmax(dim=1).flatten(2)  # (B, 2, HW)
    truth = torch.stack([1 - target, target], dim=1).flatten(2).to(probability.dtype)
    overlap = (probability * truth).sum(-1)
    size = probability.square().sum(-1) + truth.sum(-1)  # t^2 = t
    return (1 - (2 * overlap + eps) / (size + eps)).mean()


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dice": dice}
