"""One pass over a dataset: predictions, and the pixels they share with the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.loaders import Batch, to_device
from lib.evaluation.metrics import Counts
from lib.runtime import autocast
from refer.masks import RunLengths, run_lengths, shared_pixels


class Prediction(NamedTuple):
    """What the model says about an object, at the photo's own size."""

    mask: npt.NDArray[np.bool_]  # (H, W)
    probability: npt.NDArray[np.float32]  # (H, W), of belonging to the object


class SamplePrediction(NamedTuple):
    """What was found for a sample: pixels of the protocol, masks at the photo's own size."""

    sample: int  # its index in the data set
    intersection: int
    union: int
    score: float  # mean probability inside the predicted mask; 0 where that is empty
    mask: RunLengths
    truth: RunLengths


def decide_mask(logits: Tensor) -> Tensor:
    """The mask that the expressions of one object give.

    Args:
        logits: (K, 2, H, W) of K expressions. Several are averaged as probabilities.

    Returns:
        (H, W) bool: the argmax; a tie is background.
    """
    background, target = logits[0] if len(logits) == 1 else logits.float().softmax(1).mean(0)
    return target > background


@torch.inference_mode()
def resize_prediction(logits: Tensor, height: int, width: int) -> Prediction:
    """SamplePrediction at the photo's own size.

    The logits, not the mask, are resized (bilinear, pixel centres as PIL has them), so that the
    contour is as smooth as the model's belief; then it is decide_maskd as at the model's size.

    Args:
        logits: (2, S, S) of a sentence, or (K, 2, S, S) of an object's K expressions.
        height, width: of the photo, pixels.
    """
    each = logits.float().reshape(-1, *logits.shape[-3:])
    full = F.interpolate(each, (height, width), mode="bilinear", align_corners=False)
    probability = full.softmax(1)[:, 1].mean(0)
    return Prediction(decide_mask(full).cpu().numpy(), probability.cpu().numpy())


def expression_logits(model: nn.Module, batch: Batch, amp: str) -> tuple[Tensor, list[int]]:
    """Run the model on every expression of a batch.

    Args:
        model: in eval mode.
        batch: on the model's device, normalised; input_ids (B, N_l), or (B, K, N_l) of which
            the first ``batch["expressions"]`` (B,) of each sample are expressions;
            ``batch["of_picture"]`` (B,), if there, is which picture a sample is about.
        amp: see :func:`autocast`.

    Returns:
        logits: (E, 2, S, S) of all E expressions, sample by sample.
        counts: how many each sample has; their sum is E.
    """
    image, ids, mask = batch["image"], batch["input_ids"], batch["attention_mask"]
    size, counts = len(ids), [1] * len(ids)
    owner = batch.get("of_picture", torch.arange(size, device=ids.device))
    if ids.dim() == 3:
        real = torch.arange(ids.shape[1], device=ids.device) < batch["expressions"][:, None]
        ids, mask = ids[real], mask[real]
        owner = owner.repeat_interleave(batch["expressions"])
        counts = batch["expressions"].tolist()
    one_each = len(owner) == len(image)
    shares = getattr(model, "shares_pictures", False)
    logits = []
    with autocast(image.device, amp):
        for pictures, part in _parts(image, owner, size):
            shown, of_picture = image[pictures], owner[part] - pictures.start
            if shares and len(shown) < len(of_picture):
                logits.append(model(shown, ids[part], mask[part], of_picture))
            else:
                each = shown if one_each else shown[of_picture]
                logits.append(model(each, ids[part], mask[part]))
    return torch.cat(logits), counts


def _parts(image: Tensor, owner: Tensor, most: int) -> Iterator[tuple[slice, slice]]:
    """Which pictures and expressions go through the model at a time.

    Args:
        image: (U, 3, S, S).
        owner: (E,), which picture an expression is about; rising.
        most: expressions at a time, so that memory does not grow with their number.

    Yields:
        Pictures, and the expressions about them.
    """
    everything = slice(0, len(image))
    if image.device.type == "cpu" and len(image) > 1:
        # What one picture needs stays in the caches; what several need does not.
        ends = torch.bincount(owner, minlength=len(image)).cumsum(0).tolist()
        spans = [(slice(u, u + 1), *pair) for u, pair in enumerate(pairwise([0, *ends]))]
    else:
        spans = [(everything, 0, len(owner))]
    for pictures, first, end in spans:
        for start in range(first, end, most):
            yield pictures, slice(start, min(start + most, end))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    size: int,
    device: torch.device,
    amp: str = "off",
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
    *,
    at_photo: bool = False,
    answer: Callable[[SamplePrediction], None] | None = None,
) -> Counts:
    """Count intersections and unions (LAVT, Sec. 4.1).

    Args:
        model: unwrapped, so that no forward communicates and shards may differ in length.
        loader: this process' batches; those for ``at_photo`` and ``answer`` have true masks at
            the photo's size.
        size: number of samples of the whole data set.
        device: where the model lives.
        amp: see :func:`autocast`.
        progress: wraps the loader, to show how far it is.
        at_photo: count at the photo's own size, not at that of the model's input.
        answer: takes what was found for each sample.

    Returns:
        Counts of this process' samples.
    """
    model.eval()
    counts = Counts(size, device)
    for batch in progress(loader):
        batch = to_device(batch, device)
        logits, expressions = expression_logits(model, batch, amp)
        of_sample = logits.split(expressions)
        if not at_photo:
            counts.add(batch["index"], torch.stack([*map(decide_mask, of_sample)]), batch["target"])
        if at_photo or answer:
            for found in _sample_predictions(batch, of_sample, counts, at_photo):
                if answer:
                    answer(found)
    return counts


def _sample_predictions(
    batch: Batch, logits: Iterable[Tensor], counts: Counts, at_photo: bool
) -> Iterator[SamplePrediction]:
    """Resize each sample's logits to its photo; counts there where ``at_photo``."""
    sizes = zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)
    samples = zip(batch["index"].tolist(), sizes, batch["truth"], logits, strict=True)
    for index, (height, width), runs, of_sample in samples:
        found = resize_prediction(of_sample, height, width)
        mask, truth = run_lengths(found.mask), {"size": [height, width], "counts": runs}
        if at_photo:
            counts.put(index, *shared_pixels(mask, truth))
        inside = found.probability[found.mask]
        score = float(inside.mean(dtype=np.float64)) if len(inside) else 0.0
        inter, union = counts.table[index, :2].tolist()
        yield SamplePrediction(index, inter, union, score, mask, truth)
