"""Parameter groups, AdamW and the schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig

from lib.errors import InputError
from lib.lavt import LAVT
from lib.training import optim
from tests.conftest import Build


def six_layers(text_config: BertConfig) -> BertConfig:
    text_config.num_hidden_layers = 6
    return text_config


@pytest.mark.parametrize("name", ["lavt", "lavt_one"])
@pytest.mark.parametrize("ape", [0, 4])
@pytest.mark.parametrize("lang_layers", [None, 0, 3, 10])
def test_each_parameter_is_in_one_group_or_a_named_exclusion(
    name: str, ape: int, lang_layers: int | None, build_nano: Build, text_config: BertConfig
) -> None:
    model = build_nano(name, text_config=six_layers(text_config), ape_grid=ape)
    groups = optim.parameter_groups(model, 0.1, lang_layers)
    left_out = optim.not_optimised(model, groups)
    grouped = [n for g in groups for n in g["param_names"]]
    every = [n for n, _ in model.named_parameters()]
    assert sorted(grouped + left_out) == sorted(every)
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if n in set(grouped)}

    text = [n for n in every if n.startswith("text_encoder.")]
    layers = range(6 if lang_layers is None else min(lang_layers, 6), 6)
    expected = [n for n in text if any(f".layer.{i}." in n for i in layers)]
    if lang_layers is not None:
        expected = [n for n in text if ".embeddings." in n] + expected
    assert left_out == expected


def test_only_norms_positions_and_tables_of_the_backbone_do_not_decay(build_nano: Build) -> None:
    groups = {g["name"]: g for g in optim.parameter_groups(build_nano(ape_grid=4), 0.1)}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {
        "backbone_no_decay": 0.0,
        "backbone": 0.1,
        "decoder": 0.1,
        "text": 0.1,
    }
    exempt = groups["backbone_no_decay"]["param_names"]
    assert "backbone.absolute_pos_embed" in exempt
    assert all(n.startswith("backbone.") for n in exempt)
    decayed = groups["backbone"]["param_names"]
    assert not [n for n in decayed if "norm" in n or n.endswith("bias_table")]


def test_no_text_layers_is_no_text_group(build_nano: Build) -> None:
    groups = optim.parameter_groups(build_nano(), 0.1, lang_layers=0)
    assert [g["name"] for g in groups] == ["backbone_no_decay", "backbone", "decoder"]


def gradients(model: LAVT) -> set[str]:
    ids = torch.arange(1, 21)[None].expand(2, -1)
    model.train()(torch.randn(2, 3, 32, 32), ids, torch.ones_like(ids)).square().mean().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lang_layers", [None, 0, 1, 10])
def test_after_freezing_all_that_asks_for_a_gradient_gets_one(
    lang_layers: int | None, build_nano: Build
) -> None:
    """So DDP has no unused parameters to look for."""
    model = build_nano(drop_path=0.0)
    groups = optim.parameter_groups(model, 0.1, lang_layers)
    optim.freeze_unused(model, groups)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients(model) == asking
    gate = {f"backbone.layers.3.res_gate.{i}.weight" for i in (0, 2)}
    assert {n for n, _ in model.named_parameters()} - asking == gate | set(
        optim.not_optimised(model, groups)
    )


def test_schedule_ends_at_zero_and_not_below() -> None:
    optimizer = optim.build_optimizer(
        [{"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 0.0}], 0.1
    )
    scheduler = optim.poly_schedule(optimizer, 4)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * (1 - i / 4) ** 0.9 for i in range(4)] + [0, 0])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_optimizer_takes_the_options(amsgrad: bool, build_nano: Build) -> None:
    groups = optim.parameter_groups(build_nano(), 0.1)
    optimizer = optim.build_optimizer(groups, 3e-4, amsgrad)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1, 0.1, 0.1]
    assert {g["lr"] for g in optimizer.param_groups} == {3e-4}
    assert {g["amsgrad"] for g in optimizer.param_groups} == {amsgrad}


def test_norm_decay(build_nano: Build) -> None:
    """'none' excludes every norm and bias, 'all' none; the members stay the same."""
    model = build_nano("lavt_one")
    decays = {}
    for mode in optim.NORM_DECAY:
        groups = optim.parameter_groups(model, 0.01, norm_decay=mode)
        decays[mode] = {n: g["weight_decay"] for g in groups for n in g["param_names"]}
        assert sum(len(g["params"]) for g in groups) == len(decays[mode])
    assert decays["none"].keys() == decays["all"].keys() == decays["published"].keys()
    assert set(decays["all"].values()) == {0.01}
    for name, decay in decays["none"].items():
        table = "relative_position_bias_table" in name
        assert (decay == 0.0) == (model.get_parameter(name).ndim < 2 or table), name
    assert decays["published"]["classifier.bn1_4.weight"] == 0.01
    assert decays["none"]["classifier.bn1_4.weight"] == 0.0


def test_learning_rate_in_proportion_to_the_batch() -> None:
    assert optim.scaled_lr(5e-5, 64, 32) == pytest.approx(1e-4)
    assert optim.scaled_lr(5e-5, 8, 32) == pytest.approx(1.25e-5)
    assert optim.scaled_lr(5e-5, 32, 32) == 5e-5
    assert optim.scaled_lr(5e-5, 64, 0) == 5e-5


@pytest.mark.parametrize("name", ["lavt", "lavt_one", "crossvlt"])
def test_an_unknown_parameter_stops_training(name: str, build_nano: Build) -> None:
    """A module that somebody adds outside the known parts must not stay untrained silently."""
    model = build_nano(name, swin_type="micro")
    optim.parameter_groups(model, 0.1)
    model.extra = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(InputError) as caught:
        optim.parameter_groups(model, 0.1)
    message = str(caught.value)
    assert "extra.0.weight, extra.0.bias, extra.1.weight and 1 more" in message
    assert "Frozen(reason)" in message
    assert f"{type(model).__name__}.parameter_group" in message


@pytest.mark.parametrize("name", ["lavt", "lavt_one", "crossvlt"])
@pytest.mark.parametrize("part", ["backbone", "classifier"])
def test_a_module_inside_a_known_part_is_trained(name: str, part: str, build_nano: Build) -> None:
    model = build_nano(name, swin_type="micro")
    model.get_submodule(part).add_module("extra", nn.Linear(3, 4))
    groups = optim.parameter_groups(model, 0.1)
    (group,) = [g["name"] for g in groups if f"{part}.extra.weight" in g["param_names"]]
    assert group == ("backbone" if part == "backbone" else "decoder")
    optim.freeze_unused(model, groups)
    assert model.get_parameter(f"{part}.extra.weight").requires_grad


@pytest.mark.parametrize("name", ["lavt", "crossvlt"])
def test_the_log_accounts_for_every_parameter(name: str, build_nano: Build) -> None:
    model = build_nano(name, swin_type="micro")
    groups = optim.parameter_groups(model, 0.1, lang_layers=1)
    lines = optim.describe_groups(model, groups, 1e-3, 1)
    assert [line.split(":")[0].removeprefix("group ") for line in lines[: len(groups)]] == [
        g["name"] for g in groups
    ]
    assert all("lr 0.001, weight decay 0" in line for line in lines[: len(groups)])
    left = lines[len(groups) :]
    assert all(line.startswith("not trained: ") for line in left)
    assert any("embeddings are not trained" in line for line in left)
    assert any("gate is not used" in line for line in left)
    numbers = [int(line.split(" tensors, ")[1].split()[0].replace(",", "")) for line in lines]
    unused = sum(model.get_parameter(n).numel() for n in model.unused_parameters())
    # The unused gate is in a group, as in published optimizer states, and listed as not trained.
    assert sum(numbers) - unused == sum(p.numel() for p in model.parameters())
