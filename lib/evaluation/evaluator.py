"""Evaluation: predictions over a dataset, and their pixel counts against the ground truth.

Validation while training and test.py both use :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from data.dataset_refer_bert import OtherObjectExpressions, ReferDataset
from data.loaders import Batch, ShardedBatches, build_loader, prepare_batch
from lib.evaluation.metrics import Counts
from lib.runtime import autocast
from refer.masks import RunLengths, run_lengths, shared_pixels
from utils import DistInfo

if TYPE_CHECKING:
    from lib.evaluation.counts import SampleCounts


@dataclass(frozen=True)
class EvalConfig:
    """How samples are evaluated; the names are those of the command line's flags.

    Attributes:
        batch_size: samples of a batch.
        workers: loader processes.
        pin_mem: page-locked batches.
        amp: see :func:`lib.runtime.autocast`.
        eval_size: 'model' counts pixels at the model's input size, 'original' at the image's.
        no_target_pixels: a predicted mask of fewer pixels, or of none, means that there is no
            target; 'head': the model's no-target head decides. None is 0.
        compile: the model is compiled, so every forward pass gets a batch of the same size.
    """

    batch_size: int
    workers: int = 0
    pin_mem: bool = False
    amp: str = "off"
    eval_size: str = "model"
    no_target_pixels: int | str | None = None
    compile: bool = False


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one expression, at the image's original size.

    Attributes:
        mask: (H, W) bool.
        probability: (H, W) float32 in [0, 1], of belonging to the object.
        expression: as given.
    """

    mask: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.float32]
    expression: str = ""

    @property
    def score(self) -> float:
        """Mean probability inside the mask; 0 if that is empty."""
        inside = self.probability[self.mask]
        return float(inside.mean(dtype=np.float64)) if len(inside) else 0.0


class SamplePrediction(NamedTuple):
    """A sample's pixel counts, at the protocol's size, and masks at the image's original size."""

    sample: int  # its index in the dataset
    intersection: int
    union: int
    score: float  # mean probability inside the predicted mask; 0 if that is empty
    mask: RunLengths
    ground_truth: RunLengths
    predicted_no_target: bool = False


OnPrediction = Callable[[SamplePrediction], None]


def decide_mask(logits: Tensor) -> Tensor:
    """The mask of one object.

    Args:
        logits: (K, 2, H, W) of K expressions. The probabilities of several are averaged.

    Returns:
        (H, W) bool: the argmax over the two classes; a tie is background.
    """
    background, foreground = logits[0] if len(logits) == 1 else logits.float().softmax(1).mean(0)
    return foreground > background


@torch.inference_mode()
def resize_prediction(logits: Tensor, height: int, width: int, expression: str = "") -> Prediction:
    """Resize logits (bilinear) to the image's original size, then decide the mask there.

    Args:
        logits: (2, S, S) of one expression, or (K, 2, S, S) of an object's K expressions.
        height, width: of the image, pixels.
        expression: of the prediction.
    """
    each = logits.float().reshape(-1, *logits.shape[-3:])
    full = F.interpolate(each, (height, width), mode="bilinear", align_corners=False)
    probability = full.softmax(1)[:, 1].mean(0)
    return Prediction(decide_mask(full).cpu().numpy(), probability.cpu().numpy(), expression)


def expression_logits(
    model: Callable[..., Tensor], batch: Batch, amp: str, fill: int = 0
) -> list[Tensor]:
    """Run the model on every expression of a batch.

    On a CPU each expression takes a forward pass of its own, so its logits do not depend on the
    batch that it is in. On other devices at most B expressions go through the model at a time.

    Args:
        model: in eval mode.
        batch: on the model's device, image normalised; input_ids (B, N_l), or (B, K, N_l) where
            the first ``batch["expressions"]`` (B,) rows of each sample are in use.
        amp: see :func:`lib.runtime.autocast`.
        fill: where several expressions go through the model at a time, always so many, the first
            one repeated where there are less; 0 for B or less.

    Returns:
        (K_i, 2, S, S) of each of the B samples, K_i its number of expressions.
    """
    image, ids = batch["image"], batch["input_ids"]
    attention_mask = batch["attention_mask"]
    size = len(image)
    owner = torch.arange(size, device=ids.device)  # the sample of each expression
    counts = [1] * size
    if ids.dim() == 3:
        used = torch.arange(ids.shape[1], device=ids.device) < batch["expressions"][:, None]
        ids, attention_mask = ids[used], attention_mask[used]
        owner = owner.repeat_interleave(batch["expressions"])
        counts = batch["expressions"].tolist()
    at_once = 1 if image.device.type == "cpu" else fill or size
    logits = []
    with autocast(image.device, amp):
        for part in torch.arange(len(owner), device=ids.device).split(at_once):
            rows = F.pad(part, (0, at_once - len(part))) if fill else part
            result = model(image[owner[rows]], ids[rows], attention_mask[rows])
            logits.append(result[: len(part)])
    return list(torch.cat(logits).split(counts))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: ReferDataset | OtherObjectExpressions,
    indices: Sequence[int],
    config: EvalConfig,
    info: DistInfo,
    on_prediction: OnPrediction | None = None,
) -> SampleCounts:
    """Count intersections and unions of samples over all ranks (LAVT, Sec. 4.1).

    Each rank evaluates its own batches; nothing is padded or counted twice, and integers are
    summed, so the reduction is exact.

    Args:
        model: not wrapped in DDP: ranks may have different numbers of batches.
        dataset: of the samples; made with ``original_masks`` for ``eval_size`` 'original' and
            for ``on_prediction``.
        indices: the samples to evaluate.
        config: how.
        info: this rank, and the device of the model.
        on_prediction: called with every sample that this rank evaluates.

    Returns:
        Counts of the kind that the dataset's metrics need, in the order of ``indices``; the same on
        all ranks.
    """
    model.eval()
    forward: Any = model
    if by_head := config.no_target_pixels == "head":
        from lib.evaluation.generalised import HeadRecorder

        forward = HeadRecorder(model)
    least = 0 if by_head else max(1, int(config.no_target_pixels or 0))
    order = dataset.group_by_image(indices)  # so that an image is decoded once
    batches = ShardedBatches(order, config.batch_size, info.rank, info.world)
    loader = build_loader(dataset, batches, config.workers, config.pin_mem)
    counts = Counts(len(dataset), info.device)
    fill = config.batch_size if config.compile else 0
    original = config.eval_size == "original"
    for batch in utils.progress(loader, "evaluation", info.rank, len(batches)):
        batch = prepare_batch(batch, info.device)
        logits = expression_logits(forward, batch, config.amp, fill)
        said = forward.of_samples(logits) if by_head else None
        if not original:
            masks = torch.stack([*map(decide_mask, logits)])
            none = masks.sum((1, 2)) < least if said is None else said
            counts.add(batch["index"], masks, batch["target"], none)
        if original or on_prediction:
            for prediction in _original_size(batch, logits, counts, original, said, least):
                if on_prediction:
                    on_prediction(prediction)
    utils.all_reduce_sum(counts.table)
    from lib.evaluation.counts import sample_counts

    chosen = list(indices)
    no_target = dataset.no_target[chosen], counts.no_target(chosen)
    return sample_counts(dataset.metrics, *counts.of(chosen), *no_target)


def _original_size(
    batch: Batch, logits: list[Tensor], counts: Counts, count: bool, said: Tensor | None, least: int
) -> Iterator[SamplePrediction]:
    """Resize each sample's logits to its image; with ``count``, count its pixels there.

    There is no target where a head ``said`` so, (B,), or else where a mask has fewer pixels than
    ``least``.
    """
    sizes = zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)
    samples = zip(batch["index"].tolist(), sizes, batch["original_mask"], logits, strict=True)
    for i, (index, (height, width), runs, sample_logits) in enumerate(samples):
        prediction = resize_prediction(sample_logits, height, width)
        mask, ground_truth = run_lengths(prediction.mask), {"size": [height, width], "counts": runs}
        if count:
            none = bool(prediction.mask.sum() < least if said is None else said[i])
            counts.put(index, *shared_pixels(mask, ground_truth), none)
        inter, union, none, _ = counts.table[index].tolist()
        score = prediction.score
        yield SamplePrediction(index, inter, union, score, mask, ground_truth, bool(none))
