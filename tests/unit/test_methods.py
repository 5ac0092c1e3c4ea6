"""Schedules, groups, the moving average of weights, and the flags of train.py for them."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import BertConfig

from args import parse_train, select
from lib.errors import InputError
from lib.swin import SWIN_SIZES, SwinSize
from lib.training import optim
from lib.training.ema import WeightAverage
from lib.training.groups import refine
from lib.training.methods import Methods
from lib.training.schedule import build_schedule
from tests.conftest import Build


def optimizer_of(*rates: float) -> torch.optim.AdamW:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    return optim.build_optimizer(groups, 1.0)


def rates_of(config: Methods, steps: int, *lrs: float) -> list[list[float]]:
    """Learning rates of each group, step by step, and after the last."""
    optimizer = optimizer_of(*lrs)
    schedule = build_schedule(optimizer, steps, config)
    rows = []
    for _ in range(steps + 1):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [list(column) for column in zip(*rows, strict=True)]


def test_warmup_then_poly() -> None:
    config = Methods(warmup_steps=4, warmup_start=0.001)
    full, tenth = rates_of(config, 10, 0.1, 0.01)
    warmup = [0.1 * (0.001 + 0.999 * i / 4) for i in range(4)]
    assert full == pytest.approx(warmup + [0.1 * (1 - i / 6) ** 0.9 for i in range(7)])
    assert tenth == pytest.approx([rate / 10 for rate in full])


def test_cosine_to_the_lower_limit_which_scaled_groups_have_in_proportion() -> None:
    full, tenth = rates_of(Methods(sched="cosine", min_lr=0.02), 8, 0.1, 0.01)
    cosine = [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]
    assert full == pytest.approx([0.02 + 0.08 * c for c in cosine])
    assert tenth == pytest.approx([rate / 10 for rate in full])


def test_poly_alone_is_the_published_schedule_to_the_bit() -> None:
    optimizer = optimizer_of(5e-5)
    published = optim.poly_schedule(optimizer, 7)
    [rates] = rates_of(Methods(), 7, 5e-5)
    assert rates == [5e-5 * published.lr_lambdas[0](i) for i in range(8)]
    chosen = Methods().build_schedule(optimizer, 5e-5, 7)
    assert chosen.lr_lambdas[0].__qualname__.startswith("poly_schedule")


def test_a_resumed_run_has_the_lower_limit_of_its_own_rate() -> None:
    """The checkpoint's learning rate counts, not that of the command line."""
    optimizer = optimizer_of(1e-4, 1e-5)
    schedule = Methods(sched="cosine", min_lr=5e-4).build_schedule(optimizer, 1e-4, 4, resumed=True)
    for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
        group["initial_lr"] = rate
    schedule.base_lrs = [1e-2, 1e-3]
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-5])


def test_a_lower_limit_above_the_rate() -> None:
    with pytest.raises(InputError, match=r"--min_lr 0.2 is above the learning rate, 0.1"):
        Methods(min_lr=0.2).build_schedule(optimizer_of(0.1), 0.1, 5)


@pytest.mark.parametrize("name", ["lavt", "crossvlt"])
def test_rates_of_pretrained_parts(
    name: str, build_nano: Build, text_config: BertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swin's own weights and BERT's are scaled; what begins at random is not."""
    if name == "crossvlt":  # needs widths that are multiples of 64
        text_config.hidden_size, text_config.num_attention_heads = 64, 1
        monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(32, (2, 2, 2, 2), (1, 2, 4, 8)))
    model = build_nano(name)
    published = optim.parameter_groups(model, 0.1, lang_layers=None)
    groups = refine(model, published, 1.0, 0.25)
    rates = {n: g["lr"] for g in groups for n in g["param_names"]}
    assert rates.keys() == {n for g in published for n in g["param_names"]}
    assert len(rates) == sum(len(g["params"]) for g in groups)
    stage = "text_encoder" if name == "lavt" else "lang_stage1"
    for key, rate in rates.items():
        if model.swin_name(key) is not None or (
            key.startswith(f"{stage}.") and ".proj." not in key
        ):
            assert rate == 0.25, key
        else:
            assert rate == 1.0, key
    fusion = "backbone.layers.0.fusion" if name == "lavt" else "backbone.0.layers.fusion"
    assert {r for k, r in rates.items() if k.startswith(fusion)} <= {1.0}
    assert any(k.startswith("classifier.") and r == 1.0 for k, r in rates.items())
    before = {n: g["weight_decay"] for g in published for n in g["param_names"]}
    assert {n: g["weight_decay"] for g in groups for n in g["param_names"]} == before
    lines = optim.describe_groups(model, groups, 1.0, None)
    assert any("lr 0.25" in line for line in lines)
    assert groups[0]["lr"] == 1.0  # the rate that a log line shows


def test_decay_of_biases_alone(build_nano: Build) -> None:
    """None for norms, embeddings and position tables, whatever part they are of."""
    model = build_nano("lavt_one", ape_grid=4)
    published = optim.parameter_groups(model, 0.1, lang_layers=None, norm_decay="biases")
    groups = refine(model, published, 1.0, biases_only=True)
    decays = {n: g["weight_decay"] for g in groups for n in g["param_names"]}
    modules = dict(model.named_modules())
    norms = (nn.LayerNorm, nn.BatchNorm2d, nn.InstanceNorm1d, nn.Embedding)
    tables = ("relative_position_bias_table", "absolute_pos_embed")
    for name, decay in decays.items():
        owner, _, last = name.rpartition(".")
        exempt = isinstance(modules[owner], norms) or last in tables
        assert decay == (0.0 if exempt else 0.1), name
    assert decays["text_encoder.embeddings.word_embeddings.weight"] == 0.0
    assert decays["classifier.bn1_4.weight"] == decays["classifier.bn1_4.bias"] == 0.0
    assert decays["text_encoder.encoder.layer.0.output.dense.bias"] == 0.1
    assert all(g["weight_decay"] == 0.0 for g in groups if g["name"].endswith("_no_decay"))


def test_the_average_follows_weights_and_statistics(build_nano: Build) -> None:
    """After step 1 a copy; numbers that are no floats are copied always."""
    model = build_nano()
    average = WeightAverage(model, 0.9, warmup=False)
    expected: dict[str, torch.Tensor] = {}
    for step in (1, 2, 3):
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                value += torch.ones_like(value) * step
        now = {k: v.double() for k, v in model.state_dict().items()}
        decay = 0.0 if step == 1 else 0.9
        expected = {
            k: decay * expected.get(k, v) + (1 - decay) * v
            if model.state_dict()[k].is_floating_point()
            else v
            for k, v in now.items()
        }
        average.update(model, step)
    for key, value in average.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert not average.model.training
    early = WeightAverage(model, 0.9, warmup=True).ema
    assert early.get_decay(3) == pytest.approx(1 - 3 ** (-2 / 3))
    assert early.get_decay(1000) == 0.9


def test_the_methods_of_a_run_are_the_flags() -> None:
    """Each has a flag of its name, whose default is that of the methods."""
    args = parse_train([])
    assert select(Methods, args) == Methods()
    assert {field.name for field in fields(Methods)} <= vars(args).keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss focal", "--loss focal: 'focal' is none of ce, dice, dice_sum"),
        ("--maskris_ratio 0.5", "--maskris_ratio 0.5 has no meaning without --maskris"),
        ("--mosaic_directions", "--mosaic_directions has no meaning without --mosaic"),
        ("--model_ema_decay 0.9", "--model_ema_decay 0.9 has no meaning without --model_ema"),
        ("--warmup_start 0.5", "--warmup_start 0.5 has no meaning without --warmup_steps"),
        ("--model_ema --model_ema_decay 1", "the average would never change"),
        ("--maskris --maskris_ratio 1.5", "--maskris_ratio 1.5: must be in"),
        ("--maskris --maskris_text nan", "--maskris_text nan: must be in"),
        ("--maskris --maskris_patch 0", "--maskris_patch 0: must be above 0"),
        ("--mosaic 2", "--mosaic 2.0: must be in"),
        ("--warmup_steps -1", "--warmup_steps -1: must be 0 or more"),
        ("--min_lr -1", "--min_lr -1.0: must be 0 or more"),
        ("--backbone_lr_scale inf", "--backbone_lr_scale inf: must be 0 or more"),
        ("--sched step", "argument --sched: invalid choice"),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_train(flags.split())
    assert "\n" not in str(caught.value)
