"""Tensors of a forward pass, a loss, an update and an evaluation are made on the model's device.

No GPU is needed. Fake tensors of device 'cuda' have shapes, dtypes and devices, but no content.
They have no backward pass where there is no GPU; tensors of device 'meta' have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert import load_tokenizer
from data import transforms
from data.loaders import prepare_batch
from lib import crossvlt, fusion, runtime, swin
from lib.evaluation.evaluator import decide_mask, expression_logits
from lib.evaluation.metrics import Counts
from lib.losses import LOSSES
from lib.model import Objective, Segmenter
from lib.predictor import Predictor
from lib.runtime import autocast
from lib.training.optim import build_optimizer, freeze_unused, parameter_groups, poly_schedule
from lib.training.steps import StepOptions, total_loss, train_steps
from lib.variants import Variant
from tests.conftest import Build
from tests.refer_files import TINY_BERT

MODELS = ("lavt", "lavt_one", "crossvlt")
CUDA = torch.device("cuda", 0)
MATMULS = ("aten.mm.", "aten.addmm.", "aten.convolution.")  # attention chooses for itself


class OnlyOn(TorchDispatchMode):
    """Fails at the first operator that makes a tensor on another device.

    Attributes:
        dtypes: of what linear layers and convolutions made.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in made:
            assert x.device.type == self.device.type, f"{func} makes a tensor on {x.device}"
        if any(name in str(func) for name in MATMULS):
            self.dtypes.add(made[0].dtype)
        return out


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Of fake tensors; autocast of CUDA works where there is no GPU. What is kept stays real."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    caches = (swin.cached_shift_mask, transforms._constants)
    kept = [cache.cache_info().currsize for cache in caches]
    yield FakeTensorMode(allow_non_fake_inputs=True)
    assert [cache.cache_info().currsize for cache in caches] == kept


def build(build_nano: Build, mode: FakeTensorMode, name: str, **options: Any) -> Segmenter:
    """A model with fake weights on a GPU, in channels-last order where that is asked for."""
    channels_last = options.pop("channels_last", False)
    size = "micro" if name == "crossvlt" else "nano"  # CrossVLT's heads are 64 wide
    model = build_nano(name, **{"swin_type": size, "accelerate": False} | options)
    if channels_last:
        runtime.use_channels_last(model)
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                moved = on_cuda(weight, mode).detach()
                module._parameters[key] = nn.Parameter(moved, weight.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = on_cuda(buffer, mode)
    return model


def on_cuda(x: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return mode.from_tensor(x).to(CUDA)


def batch(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """As the loader brings it."""
    ids = torch.ones(2, 6, dtype=torch.long, device=device)
    return {
        "image": torch.zeros(2, 3, 64, 72, dtype=torch.uint8, device=device),
        "input_ids": ids,
        "attention_mask": ids,
        "target": torch.zeros(2, 64, 72, dtype=torch.uint8, device=device),
        "index": torch.arange(2),
    }


def train(model: Segmenter, mode: FakeTensorMode, options: StepOptions, loss: str) -> OnlyOn:
    """Two training steps on a GPU, but for the backward pass."""
    groups = parameter_groups(model, 0.01, lang_layers=2)
    freeze_unused(model, groups)
    optimizer = build_optimizer(groups, 1e-3)
    data = [batch() for _ in range(2 * options.accumulate)]

    def backward(total: Tensor) -> None:
        assert total.device == CUDA
        assert total.dtype == torch.float32
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    with pytest.MonkeyPatch.context() as patch, mode, OnlyOn(CUDA) as watch:
        patch.setattr(Tensor, "backward", backward)
        objective, schedule = Objective(model, LOSSES[loss]), poly_schedule(optimizer, 10)
        steps = list(train_steps(objective, data, optimizer, schedule, CUDA, options))
    assert [step.indices for step in steps] == 2 * [[0, 1] * options.accumulate]
    assert all(x.device == CUDA for step in steps for x in (step.loss, step.finite, step.grad_norm))
    return watch


@pytest.mark.parametrize("way", ["float32", "bf16", "channels last"])
@pytest.mark.parametrize("name", MODELS)
def test_training_on_a_gpu(name: str, way: str, build_nano: Build, mode: FakeTensorMode) -> None:
    model = build(build_nano, mode, name, ape_grid=4, channels_last=way == "channels last")
    amp, dtype = ("bf16", torch.bfloat16) if way == "bf16" else ("off", torch.float32)
    options = StepOptions(amp, accumulate=2, clip_grad=1.0, restore_buffers=True)
    watch = train(model, mode, options, loss="dice" if way == "bf16" else "ce")
    assert watch.dtypes == {dtype}


VARIANTS = [
    Variant(fusion="concat", gate="sigmoid"),
    Variant(pwam_attention="sigmoid", pwam_norm="batch", pwam_combine="words", gate="off"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_other_forms_on_a_gpu(variant: Variant, build_nano: Build, mode: FakeTensorMode) -> None:
    model = build(build_nano, mode, "lavt", variant=variant)
    train(model, mode, StepOptions(), loss="ce")


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_on_a_gpu(name: str, build_nano: Build, mode: FakeTensorMode) -> None:
    """Predictions and counts of a batch; fake tensors cannot tell how many expressions are used."""
    model, data = build(build_nano, mode, name).eval(), batch()
    with mode, torch.no_grad(), OnlyOn(CUDA):
        moved = prepare_batch(data, CUDA)
        counts = Counts(5, CUDA)
        logits = expression_logits(model, moved, "bf16", fill=3)
        counts.add(moved["index"], torch.stack([*map(decide_mask, logits)]), moved["target"])
    assert [x.shape for x in logits] == [(1, 2, 64, 72)] * 2
    assert counts.table.device == CUDA


def test_the_predictor_on_a_gpu(build_nano: Build, mode: FakeTensorMode) -> None:
    """Image and expressions are prepared on the CPU, in their real form."""
    tokenizer = load_tokenizer(str(TINY_BERT))
    predictor = Predictor(
        build(build_nano, mode, "lavt", text_config=TINY_BERT).eval(), tokenizer, 64, 12
    )
    with mode:
        logits = predictor.logits(Image.new("RGB", (50, 40)), ["left", "the large dog"])
    assert (logits.device, logits.dtype, logits.shape) == (CUDA, torch.float32, (2, 2, 64, 64))


@pytest.mark.parametrize("name", MODELS)
def test_backward_on_meta(name: str, build_nano: Build) -> None:
    """A model built there, too: no weight or gradient is made elsewhere."""
    meta = torch.device("meta")
    with meta:
        size = "micro" if name == "crossvlt" else "nano"
        model = build_nano(name, swin_type=size, accelerate=False)
    data = batch(meta) | {"image": torch.zeros(2, 3, 64, 72, device=meta)}
    data["target"] = data["target"].long()
    with OnlyOn(meta):
        total_loss(Objective(model, LOSSES["ce"])(data)).backward()
    unused = model.unused_parameters()
    assert all((p.grad is None) == (n in unused) for n, p in model.named_parameters())


# ---- the checks see what they should ----


def on_the_cpu(x: Tensor) -> Tensor:
    return x + torch.zeros(())  # no operator complains of a CPU's scalar


def copied_mask(*args: Any, like: Tensor) -> Tensor:
    return swin.build_shift_mask(*args, torch.device("cpu"), like.dtype).to(like.device)


PLANTS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "scalar in a gate": (fusion.LanguageGate, "forward", lambda self, x: on_the_cpu(x)),
    "bias of words": (fusion, "word_bias", lambda mask, dtype: on_the_cpu(mask)[:, None, None]),
    "copied mask": (swin, "shift_mask", copied_mask),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_tensor_of_the_cpu_is_seen(
    plant: str, build_nano: Build, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(build_nano, mode, "lavt")
    monkeypatch.setattr(*PLANTS[plant])
    with pytest.raises(AssertionError, match="makes a tensor on cpu"):
        train(model, mode, StepOptions(), loss="ce")


# ---- attention that fused kernels take ----


def attention_biases(
    model: Segmenter, mode: FakeTensorMode, amp: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Query and bias of each attention of Swin and of words (not BERT's), by module."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    attend, inside = F.scaled_dot_product_attention, [""]

    def watched(
        query: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if inside[0] and attn_mask is not None:
            found[inside[0]] = query, attn_mask
        return attend(query, *args, attn_mask=attn_mask, **kwargs)

    for name, module in model.named_modules():
        if isinstance(module, swin.WindowAttention | crossvlt.WordFusion):
            module.register_forward_pre_hook(lambda *_, n=name: inside.__setitem__(0, n))
            module.register_forward_hook(lambda *_: inside.__setitem__(0, ""))
    with pytest.MonkeyPatch.context() as patch, mode, torch.no_grad(), autocast(CUDA, amp):
        patch.setattr(F, "scaled_dot_product_attention", watched)
        moved = prepare_batch(batch(), CUDA)
        model(moved["image"], moved["input_ids"], moved["attention_mask"])
    return found


def check_bias(query: Tensor, bias: Tensor) -> None:
    """Additive, in the query's dtype, 4-D, rows at multiples of 8 elements."""
    assert bias.dtype == query.dtype
    assert bias.dim() == query.dim() == 4
    assert bias.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1]), bias.stride()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("window", [7, 12])
@pytest.mark.parametrize("name", MODELS)
def test_biases_are_aligned(
    name: str, window: int, amp: str, build_nano: Build, mode: FakeTensorMode
) -> None:
    model = build(build_nano, mode, name, window_size=window).eval()
    found = attention_biases(model, mode, amp)
    windows = {n: pair for n, pair in found.items() if n.endswith(".attn")}
    assert len(windows) == 8  # two blocks of each of four stages, the second one shifted
    assert len(found) - len(windows) == (7 if name == "crossvlt" else 0)
    for query, bias in found.values():
        check_bias(query, bias)
        assert bias.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
    N, H, W = window**2, 16, 18
    for stage in range(4):
        for block in range(2):
            (key,) = [n for n in windows if re.search(rf"{stage}\.(layers\.)?blocks\.{block}\.", n)]
            heads = model.get_submodule(key).num_heads
            nW = -(-H // window) * -(-W // window)
            query, bias = windows[key]
            rows = (2, nW * heads) if block else (2 * nW, heads)
            assert query.shape[:3] == (*rows, N)
            assert bias.shape == (1, rows[1], N, N)  # broadcast over the batch
            assert bias.stride(2) == {7: 56, 12: 144}[window]
        H, W = -(-H // 2), -(-W // 2)


@pytest.mark.parametrize("plant", ["rows", "dtype"])
def test_other_biases_are_seen(
    plant: str, build_nano: Build, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(build_nano, mode, "lavt").eval()
    if plant == "rows":
        monkeypatch.setattr(swin, "ALIGNMENT", 1)
    else:
        make = swin.shift_mask
        monkeypatch.setattr(swin, "shift_mask", lambda *at, like: make(*at, like=like.float()))
    found = attention_biases(model, mode, "bf16")

    def check() -> None:
        for query, bias in found.values():
            check_bias(query, bias)

    with pytest.raises(AssertionError):
        check()
