"""Losses over two-class logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import InputError

CLASS_WEIGHTS = (0.9, 1.1)  # background, object

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted cross entropy, 0.9 for background and 1.1 for the object (LAVT, Sec. 4.2).

    Args:
        logits: (B, 2, H, W).
        target: (B, H, W) int64 in {0, 1}.

    Returns:
        Scalar, the weighted mean over the pixels.
    """
    # Filled on the device: a tensor of Python numbers would be copied there, and waited for.
    weights = logits.new_full((2,), CLASS_WEIGHTS[0])
    weights[1] = CLASS_WEIGHTS[1]
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
        # PyTorch's own is not deterministic on a GPU; this is the same sum.
        weight = torch.stack([1 - target, target], dim=1) * weights[:, None, None]
        return -(logits.log_softmax(dim=1) * weight).sum() / weight.sum()
    return F.cross_entropy(logits, target, weights)


def dice(logits: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Multi-class Dice loss: softmax, squared denominator, mean over background and object.

    Per sample and class 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)). The loss of the later results of
    ``lavt_one``.

    Args:
        logits: (B, 2, H, W), float32 or float64.
        target: (B, H, W) int64 in {0, 1}.
        eps: added to numerator and denominator: the loss of a class that is neither in the target
            nor predicted is 0.

    Returns:
        Scalar in [0, 1].
    """
    probability = logits.softmax(dim=1).flatten(2)  # (B, 2, HW)
    classes = torch.stack([1 - target, target], dim=1).flatten(2).to(probability.dtype)
    overlap = (probability * classes).sum(-1)
    size = probability.square().sum(-1) + classes.sum(-1)  # t^2 = t
    return (1 - (2 * overlap + eps) / (size + eps)).mean()


def dice_sum(logits: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSIN's Dice loss: its denominator is not squared, and samples and classes are summed.

    Args:
        logits, target, eps: as of :func:`dice`.

    Returns:
        Scalar in [0, 2 B].
    """
    probability = logits.softmax(dim=1).flatten(2)  # (B, 2, HW)
    classes = torch.stack([1 - target, target], dim=1).flatten(2).to(probability.dtype)
    overlap = (probability * classes).sum(-1)
    return (1 - (2 * overlap + eps) / ((probability + classes).sum(-1) + eps)).sum()


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dice": dice, "dice_sum": dice_sum}


class WeightedLosses:
    """A sum of several of :data:`LOSSES`, each with its weight; callable as one of them is."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.terms = [(name, LOSSES[name], weight) for name, weight in weights.items() if weight]

    def named(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms of the sum."""
        return {name: weight * loss(logits, target) for name, loss, weight in self.terms}

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The sum."""
        return torch.stack([*self.named(logits, target).values()]).sum()


def named_losses(loss: Loss, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The named terms of a segmentation loss; one that is a plain function is ``seg``."""
    named = getattr(loss, "named", None)
    return named(logits, target) if named else {"seg": loss(logits, target)}


def parse_losses(text: str) -> dict[str, float]:
    """The weights of ``--loss``: a name, or several with weights, like ``ce:0.9,dice:0.1``.

    Raises:
        InputError: a name is unknown or given twice, or the weights are not usable.
    """
    weights: dict[str, float] = {}
    for name, colon, weight in (part.partition(":") for part in text.replace(" ", "").split(",")):
        if name not in LOSSES or name in weights:
            what = "is named twice" if name in weights else f"is none of {', '.join(LOSSES)}"
            raise InputError(f"--loss {text}: '{name}' {what}; give one, or ce:0.9,dice:0.1")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] < float("inf"):  # also rejects nan
            raise InputError(f"--loss {text}: the weight '{weight}' must be a number from 0 on")
    if not any(weights.values()):
        raise InputError(f"--loss {text}: at least one weight must be above 0")
    return weights
