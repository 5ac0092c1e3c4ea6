"""Building models, and what goes in and out of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig

from lib.errors import InputError
from lib.lavt import LAVT, parse_heads
from lib.model import Segmenter
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES
from lib.training import optim
from tests.conftest import Build


def words(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(batch, 20, dtype=torch.int64)
    ids[:, :6] = torch.randint(1, 60, (batch, 6), generator=torch.Generator().manual_seed(0))
    return ids, (ids != 0).long()


@pytest.mark.parametrize("name", ["lavt", "lavt_one"])
@pytest.mark.parametrize("size", [(64, 64), (33, 50), (4, 4), (1, 1)])
@torch.no_grad()
def test_logits_have_the_size_of_the_image(
    name: str, size: tuple[int, int], build_nano: Build
) -> None:
    model = build_nano(name).eval()
    logits = model(torch.randn(2, 3, *size), *words())
    assert logits.shape == (2, 2, *size)
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_batch_is_its_samples(build_nano: Build) -> None:
    model = build_nano().double().eval()
    image, (ids, mask) = torch.randn(3, 3, 48, 40, dtype=torch.float64), words(3)
    together = model(image, ids, mask)
    alone = [model(image[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)


@torch.no_grad()
def test_expression_matters_and_its_padding_does_not(build_nano: Build) -> None:
    model = build_nano().double().eval()
    image, (ids, mask) = torch.randn(2, 3, 48, 48, dtype=torch.float64), words()
    logits = model(image, ids, mask)
    padding, expression = ids.clone(), ids.clone()
    padding[:, 10:] = 7
    expression[:, 2] = 7
    torch.testing.assert_close(model(image, padding, mask), logits, rtol=0, atol=1e-10)
    assert not torch.allclose(model(image, expression, mask), logits)


@pytest.mark.parametrize("width", [384, 128])
@torch.no_grad()
def test_text_width_comes_from_the_config(width: int, build_nano: Build) -> None:
    config = BertConfig(
        vocab_size=60,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = build_nano(text_config=config).eval()
    key = model.get_parameter("backbone.layers.0.fusion.image_lang_att.f_key.0.weight")
    assert key.shape == (8, width, 1)
    assert model(torch.randn(2, 3, 32, 32), *words()).shape == (2, 2, 32, 32)


@pytest.mark.parametrize("window", [7, 12])
@pytest.mark.parametrize("swin", SWIN_SIZES)
def test_every_size_builds(swin: str, window: int) -> None:
    with torch.device("meta"):
        model = build_model("lavt", swin_type=swin, window_size=window, text_config=BertConfig())
    size = SWIN_SIZES[swin]
    stages: list[Any] = list(model.backbone.layers)
    assert [len(stage.blocks) for stage in stages] == list(size.depths)
    shifts = [block.shift for stage in stages for block in stage.blocks]
    assert shifts == [0, window // 2] * (sum(size.depths) // 2)
    assert model.classifier.conv1_1.in_channels == 4 * size.embed_dim


def test_drop_path_grows_from_nothing(build_nano: Build) -> None:
    stages: list[Any] = list(build_nano(drop_path=0.7).backbone.layers)
    blocks = [block for stage in stages for block in stage.blocks]
    assert isinstance(blocks[0].drop_path, nn.Identity)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@torch.no_grad()
def test_fresh_weights(build_nano: Build) -> None:
    torch.manual_seed(0)
    model = build_nano()
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.abs().max() <= 2, name
            if module.weight.numel() > 500:
                assert module.weight.std() == pytest.approx(0.02, rel=0.15), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
            assert module.eps == 1e-5, name


@torch.no_grad()
def test_absolute_position_is_resized_to_the_image(build_nano: Build) -> None:
    model = build_nano(ape_grid=4).eval()
    image, text = torch.randn(2, 3, 40, 24), words()
    before = model(image, *text)
    assert model.get_parameter("backbone.absolute_pos_embed").shape == (1, 8, 4, 4)
    model.get_parameter("backbone.absolute_pos_embed").add_(torch.randn(1, 8, 4, 4))
    assert not torch.allclose(model(image, *text), before)


def test_train_and_eval_return_the_model(build_nano: Build) -> None:
    model = build_nano("lavt")
    assert model.train() is model
    assert model.eval() is model
    assert isinstance(model, LAVT)


@pytest.mark.parametrize(("override", "expected"), [(None, False), (True, True), (False, False)])
def test_text_dropout_can_be_chosen(
    override: bool | None, expected: bool, build_nano: Build
) -> None:
    assert build_nano("lavt", text_dropout=override).train().text_encoder.training is expected


def test_mha_is_given_to_the_stages(build_nano: Build) -> None:
    stages: list[Any] = list(build_nano(mha="2-1-4-8").backbone.layers)
    assert [s.fusion.image_lang_att.num_heads for s in stages] == [2, 1, 4, 8]
    assert parse_heads("") == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lavt_two"}, "unknown model 'lavt_two'"),
        ({"swin_type": "huge"}, "unknown swin type 'huge'"),
        ({"mha": "1-1-1"}, "--mha 1-1-1: give 4"),
        ({"mha": "1-1-1-x"}, "--mha 1-1-1-x: give 4"),
        ({"mha": "0-1-1-1"}, "--mha 0-1-1-1: give 4"),
        ({"mha": "3-1-1-1"}, "3 heads do not divide the 8 channels"),
        ({"text_config": "./no/such/folder"}, "no/such/folder"),
    ],
)
def test_invalid_arguments_raise_one_line(
    options: dict[str, Any], message: str, build_nano: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message) as caught:
        build_nano(**options)
    assert "\n" not in str(caught.value)


# ---- every parameter is accounted for ----


def grow(model: Segmenter, parent: str, layer: nn.Module) -> str:
    """Add a layer to a submodule; returns the name of its weight."""
    model.get_submodule(parent).add_module("extra", layer)
    return f"{parent}.extra.weight".lstrip(".")


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("lavt", ""),
        ("lavt_one", ""),
        ("lavt_one", "text_encoder"),
        ("crossvlt", ""),
        ("crossvlt", "lang_stage1"),
        ("crossvlt", "lang_stage1.encoder"),
    ],
)
def test_a_parameter_without_group_raises(name: str, parent: str, build_nano: Build) -> None:
    size = "micro" if name == "crossvlt" else "nano"
    model = build_nano(name, swin_type=size)
    weight = grow(model, parent, nn.Linear(2, 2))
    with pytest.raises(InputError, match="parameters in no optimizer group") as caught:
        optim.parameter_groups(model, 0.01)
    message = str(caught.value)
    assert weight in message
    assert f"{type(model).__name__}.parameter_group" in message
    assert "\n" not in message


def test_many_parameters_without_group_are_counted(build_nano: Build) -> None:
    model = build_nano()
    grow(model, "", nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]))
    with pytest.raises(InputError, match=r"extra\.0\.weight, .* and 5 more: "):
        optim.parameter_groups(model, 0.01)


@pytest.mark.parametrize(
    ("name", "parent", "group"),
    [
        ("lavt", "backbone", "backbone"),
        ("lavt", "backbone.layers.1.fusion", "backbone"),
        ("lavt", "classifier", "decoder"),
        ("crossvlt", "backbone.2.layers", "backbone"),
        ("crossvlt", "classifier", "decoder"),
        ("crossvlt", "lang_stage3", "lang_stage3"),
    ],
)
def test_a_layer_added_to_a_trained_part_is_trained(
    name: str, parent: str, group: str, build_nano: Build
) -> None:
    size = "micro" if name == "crossvlt" else "nano"
    model = build_nano(name, swin_type=size)
    weight = grow(model, parent, nn.Linear(2, 2))
    groups = optim.parameter_groups(model, 0.01)
    optim.freeze_unused(model, groups)
    assert [g["name"] for g in groups if weight in g["param_names"]] == [group]
    assert model.get_parameter(weight).requires_grad


def test_groups_and_frozen_parameters_are_described(build_nano: Build) -> None:
    model = build_nano()
    groups = optim.parameter_groups(model, 0.01, 1)
    lines = optim.describe_groups(model, groups, 5e-5, 1)
    starts = [line.partition(":")[0] for line in lines]
    assert starts == [*(f"group {g['name']}" for g in groups), *["not trained"] * 3]
    assert "lr 5e-05" in lines[0]
    assert "weight decay 0.01" in lines[1]
    assert "weight decay 0" in lines[0]
    reasons = " ".join(lines[len(groups) :])
    for reason in ("BERT's embeddings", "only the first 1", "the last stage's gate"):
        assert reason in reasons
