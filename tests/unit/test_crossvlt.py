"""CrossVLT on small models: shapes, masks, widths, initial weights, loss, names."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lib import crossvlt
from lib.backbone import MultiModalSwin
from lib.crossvlt import CrossVLT, CrossVLTOutput
from lib.errors import InputError
from lib.losses import cross_entropy, dice
from lib.model import Frozen
from lib.swin import SWIN_SIZES

N_L = 21
MICRO = SWIN_SIZES["micro"]


@pytest.fixture
def model(text_config: BertConfig) -> CrossVLT:
    """In eval mode, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = CrossVLT(MICRO, 7, text_config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embeddings" not in name:
                p.normal_(std=p[0].numel() ** -0.5)
    return model.eval()


def inputs(H: int = 64, W: int = 64, words: tuple[int, ...] = (5, N_L)) -> tuple[Tensor, ...]:
    """Image, ids and mask."""
    random = torch.Generator().manual_seed(1)
    mask = (torch.arange(N_L) < torch.tensor(words)[:, None]).long()
    ids = torch.randint(1, 60, mask.shape, generator=random) * mask
    return torch.randn(len(words), 3, H, W, generator=random), ids, mask


@pytest.mark.parametrize("size", [(64, 64), (75, 53), (33, 130), (4, 4), (1, 1)])
def test_any_size(model: CrossVLT, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = model(*inputs(*size))
        output = model.encode(*inputs(*size))
    assert logits.shape == (2, 2, *size)
    assert logits.isfinite().all()
    side = tuple(-(-n // 4) for n in size)
    for similarity in output.similarity:
        assert similarity.shape == (2, 1, *side)
        assert similarity.abs().max() <= 1 + 1e-6  # temperatures start at 1
        side = tuple(-(-n // 2) for n in side)


@pytest.mark.parametrize("training", [False, True])
def test_return_types_do_not_depend_on_the_mode(model: CrossVLT, training: bool) -> None:
    model.train(training)
    assert isinstance(model(*inputs()), Tensor)
    assert isinstance(model.encode(*inputs()), CrossVLTOutput)


def test_alignment_does_not_change_the_logits(model: CrossVLT) -> None:
    with torch.no_grad():
        assert torch.equal(model(*inputs()), model.encode(*inputs()).logits)


def test_masked_words_have_no_influence(model: CrossVLT) -> None:
    image, ids, mask = inputs()
    garbage = torch.where(mask == 0, 59, ids)
    shorter = ids[:1, :5], mask[:1, :5]
    with torch.no_grad():
        expected = model.encode(image, ids, mask)
        masked = model.encode(image, garbage, mask)
        cut = model.encode(image[:1], *shorter)
        other = model.encode(image, ids.flip(0), mask.flip(0))
    assert torch.equal(masked.logits, expected.logits)
    torch.testing.assert_close(cut.logits, expected.logits[:1], rtol=0, atol=1e-5)
    for i in range(4):
        assert torch.equal(masked.similarity[i], expected.similarity[i])
        one = expected.similarity[i][:1]
        torch.testing.assert_close(cut.similarity[i], one, rtol=0, atol=1e-5)
    assert (other.logits - expected.logits).abs().max() > 0.01


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_masked_words_are_no_keys_of_a_language_stage(model: CrossVLT, stage: int) -> None:
    language = model.get_submodule(f"lang_stage{stage}")
    _, _, mask = inputs()
    words = torch.randn(2, N_L, 32)
    vis = torch.randn(2, 9, MICRO.stage_dims[stage - 1])
    garbage = words + 100 * (1 - mask)[..., None]
    with torch.no_grad():
        expected, seen = language(words, vis, mask), language(garbage, vis, mask)
    real = mask.bool()
    torch.testing.assert_close(seen[real], expected[real], rtol=0, atol=1e-5)
    assert (seen[~real] - expected[~real]).abs().max() > 0.01


def test_a_batch_is_its_samples(model: CrossVLT) -> None:
    image, ids, mask = inputs()
    with torch.no_grad():
        both = model(image, ids, mask)
        alone = [model(image[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)


def test_an_expression_without_words_is_finite(model: CrossVLT) -> None:
    image, ids, mask = inputs()
    output = model.encode(image, ids, torch.zeros_like(mask))
    assert output.logits.isfinite().all()
    assert all(s.isfinite().all() for s in output.similarity)


def test_word_features_of_later_stages_depend_on_the_image(model: CrossVLT) -> None:
    seen: dict[str, Tensor] = {}
    for name in ("lang_stage2", "lang_stage3", "lang_stage4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
    image, ids, mask = inputs()
    with torch.no_grad():
        model(image, ids, mask)
        first = dict(seen)
        model(image.flip(0), ids, mask)
    assert list(first) == ["lang_stage2", "lang_stage3", "lang_stage4"]
    for name, words in first.items():
        assert (seen[name] - words).abs().max() > 0.01, name


@pytest.mark.parametrize("window", [7, 12])
@pytest.mark.parametrize("swin", [name for name in SWIN_SIZES if name != "pico"])
def test_all_sizes_and_windows_build(swin: str, window: int) -> None:
    size = SWIN_SIZES[swin]
    with torch.device("meta"):
        model = CrossVLT(size, window, BertConfig())
    state = model.state_dict()
    for i, C in enumerate(size.stage_dims):
        table = state[f"backbone.{i}.layers.blocks.0.attn.relative_position_bias_table"]
        assert table.shape == ((2 * window - 1) ** 2, size.num_heads[i])
        # Attention is C wide, but 2C in stage 1 and after merging.
        width = 2 * C if i == 0 else C
        assert state[f"backbone.{i}.layers.attn1.l_q.weight"].shape == (width, 768)
        if i < 3:
            assert state[f"backbone.{i}.layers.attn2.l_q.weight"].shape == (2 * C, 768)
            key = state[f"lang_stage{i + 2}.crossattention.self.key.weight"]
            assert key.shape == (768, 2 * C)
    assert not any(k.startswith("backbone.3.layers.attn2") for k in state)


@pytest.mark.parametrize(("swin", "window"), [("micro", 12), ("tiny", 7), ("tiny", 12)])
def test_sizes_and_windows_run(swin: str, window: int, text_config: BertConfig) -> None:
    model = CrossVLT(SWIN_SIZES[swin], window, text_config).eval()
    with torch.no_grad():
        assert model(*inputs(40, 52)).shape == (2, 2, 40, 52)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (384, 12), (128, 2)])
def test_text_width_and_heads_come_from_the_config(width: int, heads: int) -> None:
    config = BertConfig(
        vocab_size=60, hidden_size=width, num_attention_heads=heads, intermediate_size=2 * width
    )
    model = CrossVLT(MICRO, 7, config).eval()
    for i in (2, 3, 4):
        stage = model.get_submodule(f"lang_stage{i}")
        assert stage.get_submodule("crossattention").num_heads == heads
        assert stage.get_submodule("intermediate.dense").weight.shape == (2 * width, width)
        assert stage.get_submodule("proj").weight.shape == (256, width)
    with torch.no_grad():
        assert model(*inputs()).shape == (2, 2, 64, 64)


@pytest.mark.parametrize(("layers", "first"), [(1, 1), (4, 4), (6, 6), (12, 6)])
def test_stage1_takes_at_most_six_layers(layers: int, first: int, text_config: BertConfig) -> None:
    text_config.num_hidden_layers = layers
    with torch.device("meta"):
        model = CrossVLT(MICRO, 7, text_config)
    assert len(model.lang_stage1.encoder.layer) == first
    assert text_config.num_hidden_layers == layers  # the caller's stays as it was


def test_a_width_that_heads_do_not_divide_raises(text_config: BertConfig) -> None:
    with pytest.raises(InputError, match="32 channels is no multiple of 64: give a larger"):
        CrossVLT(SWIN_SIZES["pico"], 7, text_config)
    with pytest.raises(InputError, match="96 channels is no multiple of 64: give a larger"):
        crossvlt.WordFusion(48, 32, 96)


def test_initial_weights() -> None:
    config = BertConfig(vocab_size=60, hidden_size=128, num_attention_heads=2)
    model = CrossVLT(MICRO, 7, config)
    for name, p in model.named_parameters():
        norm = re.search(r"norm", name, re.IGNORECASE) is not None
        if name.endswith(".bias") and (name.startswith("lang") or norm):
            assert not p.any(), name
        elif norm:
            assert (p == 1).all(), name
        elif name.startswith("lang_stage") and "embeddings" not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert p.abs().max() > 0.05, name  # normal, not truncated at two deviations
        elif ".linear1." in name or ".linear2." in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
    assert torch.equal(model.temp, torch.ones(4))


def test_unused_parameters_are_those_without_gradient(model: CrossVLT) -> None:
    model.train()
    output = model.encode(*inputs())
    sum(crossvlt.crossvlt_losses(output, torch.randint(0, 2, (2, 64, 64))).values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == list(model.unused_parameters())
    assert without == [f"backbone.3.layers.linear1.{i}.weight" for i in (0, 2)]


def test_every_parameter_is_in_a_group_or_frozen(text_config: BertConfig) -> None:
    model = CrossVLT(MICRO, 7, text_config, ape_grid=8)
    members: dict[str, list[str]] = {}
    frozen = []
    for name, _ in model.named_parameters():
        group = model.parameter_group(name, 10)
        if isinstance(group, Frozen):
            frozen.append(name)
        else:
            assert group is not None, name
            members.setdefault(group, []).append(name)
    assert frozen[0] == "temp"
    assert all(name.startswith("lang_stage1.embeddings.") for name in frozen[1:])
    assert sorted(members, key=str) == [
        "backbone",
        "backbone_no_decay",
        "decoder",
        "lang_stage1",
        "lang_stage2",
        "lang_stage3",
        "lang_stage4",
    ]
    assert all("encoder." in name for name in members["lang_stage1"])
    assert "backbone.0.absolute_pos_embed" in members["backbone_no_decay"]
    assert "lang_stage2.output.LayerNorm.weight" in members["lang_stage2"]


def test_loss_by_hand(model: CrossVLT) -> None:
    with torch.no_grad():
        model.temp.copy_(torch.tensor([1.0, 2.0, 0.5, 1.5]))
        output = model.encode(*inputs())
    target = torch.zeros(2, 64, 64, dtype=torch.int64)
    target[:, 10:30, 20:50] = 1
    aligned = torch.tensor(0.0)
    for similarity in output.similarity:
        x = F.interpolate(similarity, (64, 64), mode="bilinear", align_corners=True)[:, 0]
        likely = torch.where(target == 1, x.sigmoid(), 1 - x.sigmoid())
        aligned = aligned - likely.log().mean()
    for segmentation in (cross_entropy, dice):
        expected = 2 * segmentation(output.logits, target) + aligned
        losses = crossvlt.crossvlt_losses(output, target, segmentation)
        assert list(losses) == ["seg", "align_1", "align_2", "align_3", "align_4"]
        torch.testing.assert_close(sum(losses.values()), expected)
        own = model.losses(*inputs(), target=target, segmentation=segmentation)
        torch.testing.assert_close(own, losses)
    default = crossvlt.crossvlt_losses(output, target)
    torch.testing.assert_close(default["seg"], 2 * cross_entropy(output.logits, target))


def test_temperature_divides_the_cosine(model: CrossVLT) -> None:
    with torch.no_grad():
        ones = model.encode(*inputs()).similarity
        model.temp.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        divided = model.encode(*inputs()).similarity
    for i in range(4):
        torch.testing.assert_close(divided[i] * (i + 1), ones[i])


def test_similarity_keeps_its_precision_under_autocast(model: CrossVLT) -> None:
    with torch.no_grad():
        expected = model.encode(*inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.encode(*inputs())
    for own, exact in zip(output.similarity, expected.similarity, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("layers", [2, 4])
def test_stage1_starts_from_a_pretrained_bert(
    model: CrossVLT, text_config: BertConfig, layers: int
) -> None:
    config = copy.deepcopy(text_config)
    config.num_hidden_layers = layers
    bert = BertModel(config)
    before = copy.deepcopy(model.state_dict())
    model.load_text(bert)
    pretrained = {f"lang_stage1.{k}": v for k, v in bert.state_dict().items()}
    filled = 0
    for key, value in model.state_dict().items():
        in_bert = key in pretrained
        filled += in_bert
        assert torch.equal(value, pretrained[key] if in_bert else before[key]), key
    assert filled == 5 + 2 * 16


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_hidden_layers", 1, "has 1 layers, not the 2"),
        ("hidden_size", 64, "do not fit"),
        ("vocab_size", 61, "do not fit"),
    ],
)
def test_a_bert_of_other_sizes_raises(
    model: CrossVLT, text_config: BertConfig, option: str, value: int, message: str
) -> None:
    config = copy.deepcopy(text_config)
    setattr(config, option, value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        model.load_text(BertModel(config))
    if option == "num_hidden_layers":
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_published_weights_load_without_temperatures(model: CrossVLT) -> None:
    own = dict(model.state_dict())
    published = {k: v for k, v in own.items() if k != "temp"}
    published["lang_stage1.embeddings.position_ids"] = torch.arange(24)[None]
    with torch.no_grad():
        model.temp.fill_(3.0)
    model.load_state_dict(model.from_published(published))  # strictly
    assert torch.equal(model.temp, torch.ones(4))
    assert "temp" not in published


def test_own_weights_keep_their_temperatures(model: CrossVLT) -> None:
    with torch.no_grad():
        model.temp.fill_(3.0)
    complete = model.from_published(model.state_dict())
    assert torch.equal(complete["temp"], torch.full((4,), 3.0))
    assert list(complete) == list(model.state_dict())


def test_imagenet_names_and_shapes_are_those_of_lavt(text_config: BertConfig) -> None:
    model = CrossVLT(MICRO, 7, text_config, ape_grid=8)
    places = {
        official: tuple(value.shape)
        for name, value in model.state_dict().items()
        if (official := model.swin_name(name)) is not None
    }
    lavt = MultiModalSwin(MICRO, 7, 32, ape_grid=8).state_dict()
    fresh = re.compile(r".*\.(fusion|res_gate)\.|norm\d\.")
    assert places == {k: tuple(v.shape) for k, v in lavt.items() if not fresh.match(k)}


def test_drop_path_grows_over_the_blocks(text_config: BertConfig) -> None:
    model = CrossVLT(MICRO, 7, text_config, drop_path=0.7)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in _blocks(model)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def _blocks(model: CrossVLT) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "SwinBlock"]


def test_absolute_position_matters_and_fits_any_size(text_config: BertConfig) -> None:
    model = CrossVLT(MICRO, 7, text_config, ape_grid=8).eval()
    with torch.no_grad():
        before = model(*inputs(75, 53))
        model.get_parameter("backbone.0.absolute_pos_embed").normal_()
        after = model(*inputs(75, 53))
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
