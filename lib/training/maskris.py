"""MaskRIS: a second pass over masked images and expressions learns from the first.

The first pass is of the batch as it is. In the second, patches of the images and words of the
expressions are masked, and the target is what the first pass predicted. Loaded with --maskris only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bert.tokenizer import Tokenizer
from data.loaders import Batch
from lib.errors import InputError
from lib.losses import CLASS_WEIGHTS, Loss, named_losses
from lib.model import Objective, Segmenter
from lib.training.methods import Methods

MASKED, RANDOM = 0.8, 0.1  # of the selected words: become [MASK], become any word; others stay
TEACHER = "teacher"
DISTILL = "distill"


@dataclass(frozen=True)
class MaskRIS:
    """The two passes of a training step.

    Attributes:
        how: they are masked and weighted.
        mask_id: of [MASK].
        special_ids: of tokens that are never selected.
        vocabulary: number of words.
    """

    how: Methods
    mask_id: int
    special_ids: tuple[int, ...]
    vocabulary: int

    @staticmethod
    def objective(model: Segmenter, loss: Loss) -> MaskedObjective:
        """The objective that :meth:`passes` needs."""
        return MaskedObjective(model, loss)

    def passes(self, objective: nn.Module, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """The weighted losses of the first pass, then that of the second.

        Each is to be followed by its backward pass before the next is asked for.

        Args:
            objective: a :class:`MaskedObjective`, bare or in DDP.
            batch: on its device, images normalised.
        """
        weight = self.how.maskris_weight
        losses = objective(batch)
        teacher = losses.pop(TEACHER)
        yield {name: weight * loss for name, loss in losses.items()}
        masked = {
            "image": self.mask_image(batch["image"]),
            "input_ids": self.mask_text(batch["input_ids"]),
            TEACHER: teacher,
        }
        losses = objective(batch | masked)
        yield {name: (1 - weight) * loss for name, loss in losses.items()}

    def mask_image(self, image: Tensor) -> Tensor:
        """Set patches of each image to 0, the mean colour.

        Args:
            image: (B, 3, H, W), normalised; H and W are multiples of the patch.
        """
        B, _, H, W = image.shape
        patch = self.how.maskris_patch
        rows, columns = H // patch, W // patch
        keep = int(rows * columns * (1 - self.how.maskris_ratio))
        order = torch.rand(B, rows * columns, device=image.device).argsort(1)
        kept = torch.zeros(B, rows * columns, device=image.device, dtype=image.dtype)
        kept.scatter_(1, order[:, :keep], 1.0)
        kept = kept.view(B, 1, rows, columns)
        return image * kept.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    def mask_text(self, input_ids: Tensor) -> Tensor:
        """Exchange some words, as in BERT's pretraining; special tokens stay.

        Args:
            input_ids: (B, N_l) int64.
        """
        special = input_ids.new_tensor(self.special_ids)
        words = (input_ids[..., None] != special).all(-1)
        drawn = torch.rand(input_ids.shape, device=input_ids.device)
        selected = words & (drawn < self.how.maskris_text)
        kind = torch.rand(input_ids.shape, device=input_ids.device)
        any_word = torch.randint_like(input_ids, self.vocabulary)
        changed = torch.where(kind < MASKED + RANDOM, any_word, input_ids)
        changed = changed.masked_fill(kind < MASKED, self.mask_id)
        return torch.where(selected, changed, input_ids)


class MaskedObjective(Objective):
    """The objective of both passes; a batch with a teacher is of the second."""

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Named losses; in the first pass, (B, 2, H, W) probabilities as the teacher, too.

        The second pass has one loss, ``distill``. What else the model adds, such as CrossVLT's
        alignment, needs the ground truth and is of the first pass alone.
        """
        inputs = (batch["image"], batch["input_ids"], batch["attention_mask"], batch["target"])
        if TEACHER not in batch:
            recorder = _Recorder(self.loss)
            losses = self.model.losses(*inputs, recorder)
            return losses | {TEACHER: recorder.logits.softmax(1)}
        losses = self.model.losses(*inputs, _Distillation(batch[TEACHER]))
        distill = losses.pop(DISTILL)
        for other in losses.values():  # DDP expects a gradient for every parameter
            distill = distill + 0 * other
        return {DISTILL: distill}


class _Recorder:
    """A segmentation loss that keeps the logits, without their gradient."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.logits = torch.empty(0)

    def named(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        self.logits = logits.detach()
        return named_losses(self.loss, logits, target)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        self.logits = logits.detach()
        return self.loss(logits, target)


class _Distillation:
    """The distillation loss in place of a segmentation loss; ground truth is not used."""

    def __init__(self, teacher: Tensor) -> None:
        self.teacher = teacher

    def named(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {DISTILL: distillation(logits, self.teacher)}

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        raise TypeError("a model's losses must use lib.losses.named_losses for --maskris")


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Weighted cross entropy with probabilities as the target, the mean over all pixels.

    Unlike in :func:`lib.losses.cross_entropy`, the sum is not divided by that of the weights.

    Args:
        logits: (B, 2, H, W).
        teacher: (B, 2, H, W) probabilities.
    """
    weights = logits.new_tensor(CLASS_WEIGHTS)[:, None, None]
    return -(weights * teacher * logits.log_softmax(1)).sum(1).mean()


def build_maskris(how: Methods, tokenizer: Tokenizer, img_size: int) -> MaskRIS:
    """MaskRIS with the special tokens of a tokenizer.

    Args:
        how: to mask.
        tokenizer: of the expressions.
        img_size: side of the images.

    Raises:
        InputError: the images do not consist of whole patches, none would be left, or there is no
            [MASK].
    """
    if img_size % how.maskris_patch:
        raise InputError(
            f"--maskris_patch {how.maskris_patch}: --img_size {img_size} is no multiple of it"
        )
    patches = (img_size // how.maskris_patch) ** 2
    if not int(patches * (1 - how.maskris_ratio)):
        raise InputError(
            f"--maskris_ratio {how.maskris_ratio:g} leaves none of an image's {patches} patches: "
            "lower it, or --maskris_patch"
        )
    mask_id, size = tokenizer.mask_token_id, tokenizer.vocab_size
    if mask_id is None or not 0 <= mask_id < size:
        raise InputError("--maskris: the tokenizer has no [MASK]: give another --bert_tokenizer")
    return MaskRIS(how, mask_id, tuple(sorted(set(tokenizer.all_special_ids))), size)
