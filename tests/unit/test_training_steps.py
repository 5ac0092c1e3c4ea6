"""Training steps: clipping, accumulation, mixed precision, non-finite numbers."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

import utils
from data.loaders import prepare_batch
from lib.losses import LOSSES
from lib.model import Objective
from lib.runtime import AMP, autocast, resolve_amp
from lib.segmentation import MODELS, build_model
from lib.swin import SWIN_SIZES, SwinSize
from lib.training.optim import build_optimizer, freeze_unused, parameter_groups, poly_schedule
from lib.training.steps import Step, StepOptions, _update, total_loss, train_steps

CPU = torch.device("cpu")
PLAIN = StepOptions()


class Toy(nn.Module):
    """Something with weights, batch norm and a loss, for batches as the loader brings them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.head(self.norm(self.conv(batch["image"]))).float()
        error = out.mean((1, 2, 3)) - batch["target"]
        return {"square": error.square().mean(), "small": 0.1 * error.abs().mean()}


def batches(number: int, size: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randint(0, 256, (size, 3, 8, 8), generator=rng, dtype=torch.uint8),
            "target": torch.rand(size, generator=rng),
            "index": torch.arange(size) + 100 * i,
        }
        for i in range(number)
    ]


def train(
    data: list[dict[str, Tensor]], options: StepOptions = PLAIN, **extra: Any
) -> tuple[Toy, list[Step]]:
    torch.manual_seed(1)
    model = Toy()
    groups = [{"name": "all", "params": list(model.parameters())}]
    optimizer = build_optimizer(groups, 1e-2)
    scheduler = poly_schedule(optimizer, 100)
    steps = list(train_steps(model, data, optimizer, scheduler, CPU, options, **extra))
    return model, steps


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def test_a_step_has_its_samples_losses_and_gradient_norm() -> None:
    _, steps = train(batches(3))
    assert [s.indices for s in steps] == [[100 * i + k for k in range(4)] for i in range(3)]
    assert all(s.finite and s.grad_norm > 0 for s in steps)
    for step in steps:
        assert list(step.losses) == ["square", "small"]
        assert step.loss == step.losses["square"] + step.losses["small"]


def test_clipping_limits_the_gradient_of_all_weights_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    _, free = train(batches(2))
    limit = norms[0] / 2
    assert norms[0] == pytest.approx(free[0].grad_norm.item())
    norms.clear()
    _, clipped = train(batches(2), StepOptions(clip_grad=limit))
    assert norms[0] == pytest.approx(limit, rel=1e-4)
    assert clipped[0].grad_norm == free[0].grad_norm  # what is logged is before clipping
    norms.clear()
    loose, _ = train(batches(2), StepOptions(clip_grad=1e9))
    assert same(loose, train(batches(2))[0])


def test_accumulated_batches_make_the_gradient_of_one() -> None:
    """But for batch norm, whose statistics are each batch's: here they are all the same."""
    half = batches(1)[0]
    double = {k: torch.cat([v, v]) for k, v in half.items()}
    one, [big] = train([double])
    two, [small] = train([half, half], StepOptions(accumulate=2))
    assert small.loss.item() == pytest.approx(big.loss.item(), rel=1e-5)
    assert small.grad_norm.item() == pytest.approx(big.grad_norm.item(), rel=1e-4)
    assert small.indices == half["index"].tolist() * 2
    for name, p in one.named_parameters():
        # The first step of AdamW is lr * sign(gradient), but where a gradient is rounding alone.
        if name != "conv.bias":
            assert torch.allclose(two.get_parameter(name), p, rtol=1e-4, atol=1e-6), name


def test_a_group_of_batches_is_one_step_of_the_schedule() -> None:
    _, steps = train(batches(6), StepOptions(accumulate=3))
    assert len(steps) == 2
    assert steps[1].lr == pytest.approx(1e-2 * 0.99**0.9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_step_changes_nothing(bad: float) -> None:
    data = batches(3)
    data[1]["target"][2] = bad
    model, steps = train(data)
    assert [bool(s.finite) for s in steps] == [True, False, True]
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    two, _ = train([data[0]])
    three, steps = train(data[:2], StepOptions(restore_buffers=True))
    assert same(two, three)


def test_nonfinite_gradients_of_a_finite_loss() -> None:
    class Cliff(Toy):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            # sqrt at 0: the value is finite, the slope is not.
            return super().forward(batch) | {"cliff": (self.head.weight * 0).sum().sqrt()}

    torch.manual_seed(1)
    model = Cliff()
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = build_optimizer([{"name": "all", "params": list(model.parameters())}], 1e-2)
    scheduler = poly_schedule(optimizer, 10)
    [step] = train_steps(model, batches(1), optimizer, scheduler, CPU)
    assert torch.isfinite(step.loss)
    assert not step.finite
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())


def test_statistics_survive_an_image_that_overflows() -> None:
    data = batches(2)
    data[1]["image"] = data[1]["image"].float() * float("inf")
    poisoned, _ = train(data)
    assert not torch.isfinite(poisoned.norm.running_mean).all()
    spared, steps = train(data, StepOptions(restore_buffers=True))
    assert not steps[1].finite
    assert same(spared, train(data[:1])[0])


def test_a_nonfinite_loss_of_another_rank_skips_the_step_here_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh, _ = train([])
    monkeypatch.setattr(utils, "all_true", lambda finite: torch.tensor(False))
    model, [step] = train(batches(1))
    assert not step.finite
    assert all(torch.equal(v, fresh.get_parameter(k)) for k, v in model.named_parameters())


def test_half_precision_scales_its_loss() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    _, plain = train(batches(8))
    _, steps = train(batches(8), StepOptions(amp="fp16"), scaler=scaler)
    assert steps[0].grad_norm.item() == pytest.approx(plain[0].grad_norm.item(), rel=2e-2)
    for a, b in zip(plain, steps, strict=True):
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=2e-2)


def test_an_overflow_of_the_scaled_loss_is_expected() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    model, steps = train(batches(4), StepOptions(amp="fp16"), scaler=scaler)
    assert all(s.finite for s in steps)
    assert scaler.get_scale() < 2.0**60
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


def test_fused_adamw_equals_the_plain_one() -> None:
    models = []
    for fused in (False, True):
        torch.manual_seed(1)
        model = Toy()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2, fused=fused)
        for batch in batches(5):
            optimizer.zero_grad()
            total_loss(model(prepare_batch(batch, CPU))).backward()
            optimizer.step()
        models.append(model)
    for name, p in models[0].named_parameters():
        # Before batch norm a bias' gradient is rounding alone, of which AdamW makes whole steps.
        if name != "conv.bias":
            assert torch.allclose(p, models[1].get_parameter(name), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("amsgrad", [False, True])
def test_found_inf_skips_the_update_on_the_device(amsgrad: bool) -> None:
    """Weights, moments and the count of steps stay; then the same step is made."""
    weight = nn.Parameter(torch.ones(3))
    group = {"name": "all", "params": [weight]}
    optimizer = build_optimizer([group], 0.1, amsgrad)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    _update(optimizer, scaler, torch.tensor(True))
    after = [weight.detach().clone(), *(v.clone() for v in optimizer.state[weight].values())]
    weight.grad = torch.full((3,), float("nan"))
    _update(optimizer, scaler, torch.tensor(False))
    assert not hasattr(optimizer, "found_inf")
    for value, old in zip([weight, *optimizer.state[weight].values()], after, strict=True):
        assert torch.equal(value, old)
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    _update(optimizer, scaler, torch.tensor(True))
    assert optimizer.state[weight]["step"] == 2
    assert not torch.equal(weight, after[0])


# Operators whose result, or its size, the host must know: there a GPU's queue runs empty.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"}
WAITS |= {"unique_consecutive", "_unique2", "allclose", "item"}


class Waits(TorchDispatchMode):
    """Collects the functions in which the host waits for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITS:
            ours = [f for f in traceback.extract_stack() if "site-packages" not in f.filename]
            self.names.append(ours[-2].name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_step_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, text_config: BertConfig, name: str, accumulate: int
) -> None:
    """The optimizer's kernel reads on the device whether to update."""
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(32, (2, 2, 2, 2), (1, 2, 4, 8)))
    text_config.hidden_size, text_config.num_attention_heads = 64, 1
    model = build_model(name, swin_type="nano", window_size=7, text_config=text_config)
    groups = parameter_groups(model, 1e-2, 10)
    freeze_unused(model, groups)
    optimizer = build_optimizer(groups, 1e-3)
    words = (2, MODELS[name].max_tokens)
    batch = {
        "image": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8),
        "input_ids": torch.randint(1, 20, words),
        "attention_mask": torch.ones(words, dtype=torch.long),
        "target": torch.randint(2, (2, 64, 64)),
        "index": torch.arange(2),
    }
    steps = train_steps(
        Objective(model, LOSSES["ce"]),
        [batch] * 2 * accumulate,
        optimizer,
        poly_schedule(optimizer, 10),
        CPU,
        StepOptions(accumulate=accumulate, clip_grad=1.0),
    )
    next(steps)  # what the first one makes is kept
    with Waits() as waits:
        next(steps)
    assert waits.names == []


def test_amp_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AMP == ("off", "bf16", "fp16", "auto")
    for amp, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)):
        with autocast(CPU, amp):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert resolve_amp("auto", CPU) == "off"
