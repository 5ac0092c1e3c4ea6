"""Flags for speed and memory give the losses and masks of plain float32, alone and together.

Tolerances: in half precision the losses of 20 training steps stay within the stated distance of
float32's. In float32 they are at most 8 times as far from those of float64 as plain float32 is.
Masks of a trained model on real images overlap those of float32 by an IoU of 0.99.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import prepare_batch
from lib import cpu, runtime
from lib.errors import InputError
from lib.evaluation.metrics import intersection_union
from lib.losses import LOSSES
from lib.model import Objective, Segmenter
from lib.runtime import autocast
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES, SwinBlock, SwinSize
from lib.training.optim import build_optimizer, freeze_unused, parameter_groups, poly_schedule
from lib.training.steps import StepOptions, train_steps
from refer.refer import REFER
from tests.refer_files import CC0_ROOT, TINY_BERT

CPU = torch.device("cpu")
Change = Callable[[torch.nn.Module], None]

# Options, the tolerance of the loss against float32 (None: derived from float64), and changes.
WAYS: dict[str, tuple[float | None, StepOptions, list[Change]]] = {
    "bf16": (0.02, StepOptions("bf16"), []),
    "fp16": (0.01, StepOptions("fp16"), []),
    "channels last": (None, StepOptions(), [runtime.use_channels_last]),
    "grad checkpoint": (0.0, StepOptions(), [runtime.recompute_blocks]),
    "accelerated": (None, StepOptions(), [cpu.accelerate]),
    "all": (0.02, StepOptions("bf16"), [runtime.use_channels_last, runtime.recompute_blocks]),
}


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    """Batches of public-domain images with their objects and expressions."""
    refer = REFER(str(CC0_ROOT), "refcoco", "unc")
    data = ReferDataset(refer, "train", load_tokenizer(str(TINY_BERT)), 96)
    return list(DataLoader(data, batch_size=4, drop_last=True))[:2]


def build() -> Segmenter:
    """A very small network, always with the same weights; drop path and dropout are on."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWIN_SIZES, "nano", SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8)))
        return build_model("lavt_one", swin_type="nano", window_size=7, text_config=TINY_BERT)


def train(
    model: Segmenter,
    batches: list[dict[str, Tensor]],
    options: StepOptions,
    lr: float = 1e-4,
) -> list[float]:
    """Losses of a step for each batch."""
    torch.manual_seed(3)
    groups = parameter_groups(model, 1e-2, None)
    freeze_unused(model, groups)
    optimizer = build_optimizer(groups, lr)
    schedule = poly_schedule(optimizer, len(batches))
    scaler = torch.amp.GradScaler("cpu", enabled=options.amp == "fp16", init_scale=2.0**12)
    objective = Objective(model, LOSSES["ce"])
    steps = train_steps(objective, batches, optimizer, schedule, CPU, options, scaler)
    return [step.loss.item() for step in steps]


@pytest.fixture(scope="module")
def plain_losses(batches: list[dict[str, Tensor]]) -> list[float]:
    return train(build(), batches * 10, StepOptions())


@pytest.fixture(scope="module")
def exact_losses(batches: list[dict[str, Tensor]]) -> list[float]:
    """In float64, with the same dropout."""
    model = build().double()
    patches = model.get_submodule("backbone.patch_embed")
    patches.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return train(model, batches * 10, StepOptions())


def distance(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_losses_of_twenty_training_steps(
    way: str,
    batches: list[dict[str, Tensor]],
    plain_losses: list[float],
    exact_losses: list[float],
) -> None:
    tolerance, options, changes = WAYS[way]
    model = build()
    for change in changes:
        change(model)
    losses = train(model, batches * 10, options)
    assert len(losses) == 20
    assert plain_losses[-1] < plain_losses[0]
    if tolerance is None:
        rounding = distance(plain_losses, exact_losses)
        assert rounding < 0.01  # dropout is the same, too
        eps = torch.finfo(torch.float32).eps
        assert distance(losses, exact_losses) <= 8 * rounding + eps
    else:
        assert distance(losses, plain_losses) <= tolerance


@pytest.fixture(scope="module")
def trained(batches: list[dict[str, Tensor]]) -> Segmenter:
    """A network that overfits the images, so that its masks are decided."""
    model = build()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    losses = train(model, batches * 60, StepOptions(), lr=2e-3)
    assert losses[-1] < 0.15
    return model.eval()


@torch.inference_mode()
def masks(model: Segmenter, batches: list[dict[str, Tensor]], amp: str) -> Tensor:
    result = []
    for batch in batches:
        batch = prepare_batch(batch, CPU)
        with autocast(CPU, amp):
            logits = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        result.append(logits.argmax(1))
    return torch.cat(result)


@pytest.mark.parametrize(
    ("amp", "change"),
    [
        ("bf16", None),
        ("fp16", None),
        ("off", runtime.use_channels_last),
        ("bf16", runtime.use_channels_last),
    ],
)
def test_masks_on_real_images(
    amp: str, change: Change | None, trained: Segmenter, batches: list[dict[str, Tensor]]
) -> None:
    exact = masks(trained, batches, "off")
    model = copy.deepcopy(trained)
    if change:
        change(model)
    inter, union = intersection_union(masks(model, batches, amp), exact)
    assert (exact.flatten(1).sum(1) > 50).all()
    assert (inter / union).mean() >= 0.99
    assert inter.sum() / union.sum() >= 0.99


def test_gradient_checkpointing_runs_blocks_twice_in_training_only(
    batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = SwinBlock.compute

    def counted(self: SwinBlock, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return real(self, x)

    monkeypatch.setattr(SwinBlock, "compute", counted)
    for recompute, expected in ((False, 8), (True, 16)):
        model, calls = build(), 0
        if recompute:
            runtime.recompute_blocks(model)
        train(model, batches[:1], StepOptions())
        assert calls == expected
    calls = 0
    masks(model.eval(), batches[:1], "off")
    assert calls == 8


def test_a_compiled_block_has_the_same_outputs_and_gradients(trained: Segmenter) -> None:
    """A block only, since compiling takes long; whole models are in test_compile.py."""
    block = copy.deepcopy(trained.get_submodule("backbone.layers.0.blocks.1"))
    names = list(block.state_dict())
    x = torch.randn(1, 14, 14, 16, requires_grad=True)
    expected = block(x)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    weight_gradient = block.mlp.fc1.weight.grad.clone()
    block.zero_grad()
    runtime.compile_module(block)
    assert list(block.state_dict()) == names
    result = block(x)
    result.square().sum().backward()
    assert torch.allclose(result, expected, atol=1e-5)
    assert torch.allclose(x.grad, gradient, atol=1e-4)
    assert torch.allclose(block.mlp.fc1.weight.grad, weight_gradient, rtol=1e-3, atol=1e-3)


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="install g"):
        runtime.compile_module(torch.nn.Linear(2, 2))


def test_allow_tf32_sets_both_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    restore = partial(setattr, torch.backends.cudnn, "allow_tf32", before[1])
    try:
        runtime.allow_tf32()
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
        restore()
