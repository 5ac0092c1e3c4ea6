"""Each part of ``--fast``, alone and together, against plain float32 on the same device.

Tolerances of the losses of 20 training steps: 0.02 in bf16, 0.01 in fp16, 0.002 for what only
rounds otherwise in float32 or TF32. Masks of a trained network overlap by an IoU of 0.99, and a
split's mIoU differs by less than 1. Counts in float64 are those of the CPU, exactly.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import Batch, RandomExpressionSampler, build_loader, prepare_batch
from lib import runtime
from lib.evaluation.evaluator import EvalConfig, evaluate
from lib.evaluation.metrics import intersection_union, summarise
from lib.losses import LOSSES
from lib.model import Objective, Segmenter
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES, SwinSize
from lib.training import optim
from lib.training.steps import StepOptions, train_steps
from refer.refer import REFER
from tests.scripts import Shapes
from utils import DistInfo

pytestmark = pytest.mark.gpu
SIDE = 96


@dataclass(frozen=True)
class Way:
    """How a network is run; ``tolerance`` is of its losses against plain float32."""

    tolerance: float
    amp: str = "off"
    channels_last: bool = False
    compiled: bool = False
    tf32: bool = False
    grad_checkpoint: bool = False
    pin_mem: bool = False


WAYS = {
    "bf16": Way(0.02, amp="bf16"),
    "fp16": Way(0.01, amp="fp16"),
    "channels_last": Way(0.002, channels_last=True),
    "tf32": Way(0.002, tf32=True),
    "compile": Way(0.002, compiled=True),
    "grad_checkpoint": Way(0.002, grad_checkpoint=True),
    "pin_mem": Way(0.002, pin_mem=True),
    "all": Way(0.02, "bf16", channels_last=True, compiled=True, tf32=True, pin_mem=True),
}


@pytest.fixture(scope="module")
def data(shapes: Shapes) -> ReferDataset:
    tokenizer = load_tokenizer(str(shapes.root / "bert"))
    return ReferDataset(REFER(str(shapes.root)), "train", tokenizer, SIDE)


@pytest.fixture(scope="module")
def steps(dry: bool) -> int:
    return 2 if dry else 20


def build(shapes: Shapes, dry: bool) -> Segmenter:
    """Always the same weights; nothing in it is random, for compiled code draws otherwise."""
    torch.manual_seed(0)
    size = (
        SwinSize(8, (1, 1, 1, 1), (1, 2, 4, 8)) if dry else SwinSize(32, (2, 2, 2, 2), (1, 2, 4, 8))
    )
    text = BertConfig.from_pretrained(shapes.root / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWIN_SIZES, "gpu_test", size)
        return build_model(
            "lavt",
            swin_type="gpu_test",
            window_size=7,
            text_config=text,
            drop_path=0.0,
            accelerate=False,
        )


def train(
    model: Segmenter, data: ReferDataset, device: torch.device, steps: int, way: Way, lr: float
) -> list[float]:
    """Losses of some steps; the model is on the device afterwards."""
    model.to(device)
    if way.grad_checkpoint:
        runtime.recompute_blocks(model)
    objective: nn.Module = Objective(model, LOSSES["ce"])
    runtime.prepare(
        objective, channels_last=way.channels_last, compiled=way.compiled, tf32=way.tf32
    )
    groups = optim.parameter_groups(model, 1e-2, None)
    optim.freeze_unused(model, groups)
    optimizer = optim.build_optimizer(groups, lr)
    sampler = RandomExpressionSampler(data.samples_of_ref, 4, seed=0)
    loader = build_loader(data, sampler, pin_memory=way.pin_mem)
    batches = itertools.islice(itertools.cycle(loader), steps)
    scaler = torch.amp.GradScaler(device.type, enabled=way.amp == "fp16", init_scale=2.0**12)
    run = train_steps(
        objective,
        batches,
        optimizer,
        optim.poly_schedule(optimizer, 1000),
        device,
        StepOptions(way.amp),
        scaler,
    )
    return [step.loss.item() for step in run]


@pytest.fixture(scope="module")
def plain(
    shapes: Shapes, data: ReferDataset, device: torch.device, dry: bool, steps: int
) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:  # fixtures come before the tests' own
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        return train(build(shapes, dry), data, device, steps, Way(0.0), 1e-4)


@pytest.mark.parametrize("name", WAYS)
def test_losses(
    name: str,
    shapes: Shapes,
    data: ReferDataset,
    device: torch.device,
    dry: bool,
    steps: int,
    plain: list[float],
) -> None:
    way = WAYS[name]
    if way.amp == "bf16" and device.type == "cuda":
        assert runtime.resolve_amp("auto", device) == "bf16", "this GPU has no bf16"
    losses = train(build(shapes, dry), data, device, steps, way, 1e-4)
    assert len(losses) == steps
    far = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
    assert max(far) <= way.tolerance, far


@pytest.fixture(scope="module")
def trained(shapes: Shapes, data: ReferDataset, device: torch.device, dry: bool) -> Segmenter:
    """A network that knows the training images; in a rehearsal it does not."""
    model = build(shapes, dry)
    losses = train(model, data, device, 4 if dry else 300, Way(0.0), 1e-3)
    assert dry or losses[-1] < 0.15, losses[-10:]
    return model.eval()


def counts(
    model: Segmenter, data: ReferDataset, device: torch.device, way: Way
) -> tuple[Tensor, Tensor]:
    """Intersections and unions of all samples."""
    model = copy.deepcopy(model).to(device)
    runtime.prepare(model, channels_last=way.channels_last, compiled=way.compiled, tf32=way.tf32)
    config = EvalConfig(4, pin_mem=way.pin_mem, amp=way.amp)
    found = evaluate(model, data, range(len(data)), config, DistInfo(0, 1, device))
    inter, union = map(torch.from_numpy, found)
    return inter, union


@pytest.mark.parametrize("name", ["bf16", "channels_last", "tf32", "all"])
def test_evaluation(
    name: str, trained: Segmenter, data: ReferDataset, device: torch.device, dry: bool
) -> None:
    way = WAYS[name]
    exact, found = (
        summarise(*(c.numpy() for c in counts(trained, data, device, w))) for w in (Way(0.0), way)
    )
    assert dry or exact.mIoU > 30  # the CPU finds 48.6: two thirds of the expressions are new
    assert abs(found.mIoU - exact.mIoU) < (20 if dry else 1)


@torch.inference_mode()
def test_masks(trained: Segmenter, data: ReferDataset, device: torch.device, dry: bool) -> None:
    batch: Batch = next(
        iter(build_loader(data, RandomExpressionSampler(data.samples_of_ref, 8, 0)))
    )
    batch = prepare_batch(batch, device)
    masks = {}
    for amp in ("off", "bf16"):
        with runtime.autocast(device, amp):
            logits = trained(batch["image"], batch["input_ids"], batch["attention_mask"])
        assert logits.device.type == device.type
        masks[amp] = logits.argmax(1)
    inter, union = intersection_union(masks["bf16"], masks["off"])
    assert dry or (inter.sum() / union.sum()).item() >= 0.99


def test_counts_equal_those_of_the_cpu(
    trained: Segmenter, data: ReferDataset, device: torch.device
) -> None:
    """Pixel for pixel in float64, where no logit is near a tie; counting is exact in any case."""
    model = copy.deepcopy(trained).double()
    patches = model.get_submodule("backbone.patch_embed")
    patches.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    on_device = counts(model, data, device, Way(0.0))
    on_cpu = counts(model, data, torch.device("cpu"), Way(0.0))
    assert on_cpu[1].sum() > 0
    for a, b in zip(on_device, on_cpu, strict=True):
        assert torch.equal(a, b)


def test_the_optimizer_is_fused(trained: Segmenter, device: torch.device) -> None:
    groups = optim.parameter_groups(copy.deepcopy(trained), 1e-2, None)
    optimizer = optim.build_optimizer(groups, 1e-4)
    assert optimizer.defaults["fused"]
    assert optimizer.param_groups[0]["params"][0].device.type == device.type


def test_pinned_batches(data: ReferDataset, device: torch.device, tmp_path: Path) -> None:
    sampler = RandomExpressionSampler(data.samples_of_ref, 4, seed=0)
    batch = next(iter(build_loader(data, sampler, pin_memory=True)))
    assert batch["image"].is_pinned() is (device.type == "cuda")
