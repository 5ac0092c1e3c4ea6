"""The two loops: one epoch of training, one pass of evaluation. No distributed code here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.transforms import normalize
from lib.evaluation.metrics import Counts
from refer.masks import RunLengths, run_lengths, shared_pixels

Batch = dict[str, Any]  # tensors; the run lengths of true masks are texts
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = (*AMP_DTYPES, "auto")


class Step(NamedTuple):
    """What happened in a training step; tensors stay on the device until somebody reads them.

    Attributes:
        loss: scalar, the mean over the step's batches.
        lr: learning rate of the first group.
        grad_norm: scalar, L2 norm of all gradients, before clipping.
        finite: scalar bool; where False, the weights were left as they were.
        indices: the step's samples in the data set, of this process.
    """

    loss: Tensor
    lr: float
    grad_norm: Tensor
    finite: Tensor
    indices: list[int]


def resolve_amp(amp: str, device: torch.device) -> str:
    """'auto' becomes 'bf16' where the hardware multiplies in bfloat16, else 'off'."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    # Private to torch, so their absence must do no harm: then it is merely slower.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bf16" if native else "off"


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Mixed precision of a forward pass: one of :data:`AMP`; 'off' is float32."""
    dtype = AMP_DTYPES[resolve_amp(amp, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, and make of its bytes what models take there: a quarter or less is sent."""
    moved = {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }
    moved["image"] = normalize(moved["image"])
    target = moved.get("target")
    if target is not None and target.dtype == torch.uint8:
        moved["target"] = target.long()
    return moved


@dataclass(frozen=True)
class StepOptions:
    """How a training step is made; the defaults are the published recipe's.

    Attributes:
        amp: see :func:`autocast`.
        accumulate: batches whose gradients are averaged into one step.
        clip_grad: largest L2 norm of all gradients together; 0 does not clip.
        spare_buffers: a step that is not finite leaves the batch norm statistics alone, too.
    """

    amp: str = "off"
    accumulate: int = 1
    clip_grad: float = 0.0
    spare_buffers: bool = False


def train_steps(
    objective: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
    options: StepOptions = StepOptions(),
    scaler: torch.amp.GradScaler | None = None,
    agree: Callable[[Tensor], Tensor] = lambda finite: finite,
) -> Iterator[Step]:
    """Train over a loader once, yielding after each step.

    A step whose loss or gradients are not finite does not touch weights and optimizer.

    Args:
        objective: maps a batch to a scalar: :class:`lib.model.Objective`, in DDP or bare.
        loader: batches of :class:`data.dataset_refer_bert.ReferDataset`.
        optimizer, scheduler: the schedule is stepped after every iteration.
        device: where the model lives.
        options: how a step is made.
        scaler: of the loss, for float16.
        agree: whether all processes' losses were finite, from whether this one's was.
    """
    objective.train()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norms = [m for m in objective.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [b for m in norms for b in m.buffers()]
    for batches in _grouped(loader, options.accumulate):
        before = [b.clone() for b in buffers] if options.spare_buffers else []
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(objective, batches, device, options, scaler)
        scaler.unscale_(optimizer)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if options.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, options.clip_grad, norm)
        finite = agree(loss.isfinite())
        if not scaler.is_enabled():  # a scaler looks for overflows itself, which are no accident
            finite = finite & norm.isfinite()
        lr = optimizer.param_groups[0]["lr"]
        _update(optimizer, scaler, finite)
        for buffer, old in zip(buffers, before, strict=False):
            buffer.copy_(torch.where(finite, buffer, old))
        scheduler.step()
        yield Step(loss, lr, norm, finite, [i for b in batches for i in b["index"].tolist()])


def _grouped(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The loader's batches, so many at a time."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _backward(
    objective: nn.Module,
    batches: list[Batch],
    device: torch.device,
    options: StepOptions,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Gradients of the mean loss of some batches; returns that loss, (), detached."""
    losses = []
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)
        # DDP averages gradients over the processes in a backward pass: only the last need.
        alone = nullcontext() if last else getattr(objective, "no_sync", nullcontext)()
        with alone:
            with autocast(device, options.amp):
                loss = objective(to_device(batch, device))
            scaler.scale(loss / len(batches)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """The optimizer's step, unless the gradients are not finite."""
    fused = finite.is_cuda and all(group.get("fused") for group in optimizer.param_groups)
    if fused and not scaler.is_enabled():
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read on the GPU
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif finite:  # on a GPU this waits for it
        scaler.step(optimizer)
    scaler.update()


class Segmentation(NamedTuple):
    """What the model says about an object, at the photo's own size."""

    mask: npt.NDArray[np.bool_]  # (H, W)
    probability: npt.NDArray[np.float32]  # (H, W), of belonging to the object


class Answer(NamedTuple):
    """What was found for a sample: pixels of the protocol, masks at the photo's own size."""

    sample: int  # its index in the data set
    intersection: int
    union: int
    score: float  # mean probability inside the predicted mask; 0 where that is empty
    mask: RunLengths
    truth: RunLengths


def decide(logits: Tensor) -> Tensor:
    """The mask that the expressions of one object give.

    Args:
        logits: (K, 2, H, W) of K expressions. Several are averaged as probabilities.

    Returns:
        (H, W) bool: the argmax; a tie is background.
    """
    background, target = logits[0] if len(logits) == 1 else logits.float().softmax(1).mean(0)
    return target > background


@torch.inference_mode()
def at_size(logits: Tensor, height: int, width: int) -> Segmentation:
    """Answer at the photo's own size.

    The logits, not the mask, are resized (bilinear, pixel centres as PIL has them), so that the
    contour is as smooth as the model's belief; then it is decided as at the model's size.

    Args:
        logits: (2, S, S) of a sentence, or (K, 2, S, S) of an object's K expressions.
        height, width: of the photo, pixels.
    """
    each = logits.float().reshape(-1, *logits.shape[-3:])
    full = F.interpolate(each, (height, width), mode="bilinear", align_corners=False)
    probability = full.softmax(1)[:, 1].mean(0)
    return Segmentation(decide(full).cpu().numpy(), probability.cpu().numpy())


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
    answer: Callable[[Answer], None] | None = None,
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
            counts.add(batch["index"], torch.stack([*map(decide, of_sample)]), batch["target"])
        if at_photo or answer:
            for found in _answers(batch, of_sample, counts, at_photo):
                if answer:
                    answer(found)
    return counts


def _answers(
    batch: Batch, logits: Iterable[Tensor], counts: Counts, at_photo: bool
) -> Iterator[Answer]:
    """Resize each sample's logits to its photo; counts there where ``at_photo``."""
    sizes = zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)
    samples = zip(batch["index"].tolist(), sizes, batch["truth"], logits, strict=True)
    for index, (height, width), runs, of_sample in samples:
        found = at_size(of_sample, height, width)
        mask, truth = run_lengths(found.mask), {"size": [height, width], "counts": runs}
        if at_photo:
            counts.put(index, *shared_pixels(mask, truth))
        inside = found.probability[found.mask]
        score = float(inside.mean(dtype=np.float64)) if len(inside) else 0.0
        inter, union = counts.table[index, :2].tolist()
        yield Answer(index, inter, union, score, mask, truth)
