"""Ablations of LAVT: each trains, is saved and loaded, and none changes the published network."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from args import model_options, parse_train
from lib.backbone import MultiModalStage
from lib.checkpoint import load_model
from lib.errors import InputError
from lib.fusion import PWAM
from lib.lavt import LAVT
from lib.losses import dice
from lib.segmentation import build_model
from lib.training import optim
from lib.variants import CHOICES, PUBLISHED, MeanFusion, Variant
from tests.conftest import Build

OTHERS = [{name: value} for name, values in CHOICES.items() for value in values[1:]]
OTHERS += [{"gate": "off", "decoder_features": "V"}, {"lang_path": "off", "fusion": "concat"}]
NAMES = ["-".join(f"{k}_{v}" for k, v in changes.items()) for changes in OTHERS]
every_variant = pytest.mark.parametrize("changes", OTHERS, ids=NAMES)


def batch(size: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    mask = torch.ones(size, 6, dtype=torch.int64)
    mask[1:, 4:] = 0
    target = torch.zeros(size, 64, 64, dtype=torch.int64)
    target[0, :32], target[1, :, 32:] = 1, 1
    return {
        "image": torch.randn(size, 3, 64, 64, generator=g),
        "input_ids": torch.randint(1, 60, (size, 6), generator=g),
        "attention_mask": mask,
        "target": target,
    }


def logits(model: LAVT, **changes: Tensor) -> Tensor:
    b = batch() | changes
    with torch.no_grad():
        return model.eval()(b["image"], b["input_ids"], b["attention_mask"])


def seeded(build_nano: Build, name: str = "lavt_one", **options: Any) -> LAVT:
    torch.manual_seed(0)
    return build_nano(name, drop_path=0.0, **options)


def test_explicit_defaults_are_bit_identical(build_nano: Build) -> None:
    spelt = [w for name, values in CHOICES.items() for w in (f"--{name}", values[0])]
    assert model_options(parse_train(spelt)) == model_options(parse_train([]))
    assert model_options(parse_train(spelt))["variant"] == PUBLISHED
    explicit = Variant(**{name: values[0] for name, values in CHOICES.items()})
    first, second = seeded(build_nano), seeded(build_nano, variant=explicit)
    assert list(first.state_dict()) == list(second.state_dict())
    assert torch.equal(logits(first), logits(second))


@every_variant
def test_logits_differ_from_the_published_network(
    build_nano: Build, changes: dict[str, str]
) -> None:
    """With the same weights, as far as both have them."""
    published, other = seeded(build_nano), seeded(build_nano, variant=Variant(**changes))
    own, state = other.state_dict(), published.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    for key, value in fitting.items():
        if "res_gate" in key or ".fusion." in key:
            value *= 10  # in both models; gates start at 0.02, so that all activations look alike
    other.load_state_dict(fitting, strict=False)
    assert (logits(published) - logits(other)).abs().max() > 1e-5


@every_variant
def test_loss_falls_and_used_parameters_get_gradients(
    build_nano: Build, changes: dict[str, str]
) -> None:
    model = seeded(build_nano, variant=Variant(**changes)).train()
    groups = optim.parameter_groups(model, 0.01, None)
    optim.freeze_unused(model, groups)
    optimizer = optim.build_optimizer(groups, 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad(set_to_none=True)
        loss = model.losses(**batch(), segmentation=dice)["seg"]
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.requires_grad and p.ndim > 1 and "embeddings" not in name:
            assert p.grad is not None
            assert p.grad.any(), name
    assert all(not name.startswith("backbone.layers.0") for name in model.unused_parameters())


@every_variant
def test_expression_matters_and_padding_does_not(
    build_nano: Build, changes: dict[str, str]
) -> None:
    model, b = seeded(build_nano, variant=Variant(**changes)), batch()
    expected = logits(model)
    ids = b["input_ids"].clone()
    ids[1, 4:] = 7
    torch.testing.assert_close(logits(model, input_ids=ids), expected, rtol=0, atol=1e-6)
    ids[1, 2] = 1 + ids[1, 2] % 50
    assert not torch.equal(logits(model, input_ids=ids)[1], expected[1])


@every_variant
@pytest.mark.parametrize("name", ["lavt", "lavt_one"])
def test_loading_another_variant_raises_with_the_flag_that_fits(
    build_nano: Build, changes: dict[str, str], name: str
) -> None:
    other, published = seeded(build_nano, name, variant=Variant(**changes)), seeded(build_nano)
    content = other.to_published() | {"args": dict(changes) | {"mha": ""}}
    again = build_nano(name, variant=Variant(**changes))
    load_model(again, content, "a.pth")
    assert torch.equal(logits(again), logits(other))
    for option, value in changes.items():
        with pytest.raises(InputError, match=f"it would fit: .*--{option} {value}"):
            load_model(published, content, "a.pth")
    # And the other way: checkpoints without these options are of the published network.
    release = published.to_published() | {"args": argparse.Namespace(lr=5e-5, mha="")}
    with pytest.raises(InputError, match="it would fit: --") as caught:
        load_model(again, release, "a.pth")
    for option in changes:
        assert f"--{option} {CHOICES[option][0]}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"fusion": "concat"}, "--fusion concat"),
        ({"fusion": "add"}, "--fusion add or mul"),
        ({"pwam_norm": "layer"}, "--pwam_norm layer"),
        ({"pwam_norm": "batch"}, "--pwam_norm batch"),
        ({"pwam_combine": "words"}, "--pwam_combine words"),
        ({"lang_path": "off"}, "--lang_path off (or --gate off)"),
    ],
)
def test_loading_another_variant_without_args_raises_with_the_flag_that_fits(
    build_nano: Build, changes: dict[str, str], hint: str
) -> None:
    content = build_nano(variant=Variant(**changes)).to_published()
    with pytest.raises(InputError) as caught:
        load_model(build_nano(), content, "a.pth")
    assert str(caught.value).endswith(f"it would fit: {hint}")


def test_loading_other_heads_raises(build_nano: Build) -> None:
    content = build_nano(mha="1-2-4-4").to_published() | {"args": {"mha": "1-2-4-4"}}
    load_model(build_nano(mha="1-2-4-4"), content, "a.pth")
    with pytest.raises(InputError, match="it would fit: --mha 1-2-4-4"):
        load_model(build_nano(), content, "a.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gate relu --lang_path off", "--gate relu has no meaning with --lang_path off"),
        ("--decoder_features V --lang_path off", "--decoder_features V has no meaning"),
        ("--pwam_norm layer --fusion add", "--pwam_norm layer has no meaning with --fusion add"),
        ("--gate silu", "invalid choice: 'silu'"),
    ],
)
def test_flags_without_effect_raise(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_train(options.split())


def test_models_without_the_flag_raise(build_nano: Build) -> None:
    with pytest.raises(InputError, match="--gate relu --fusion add: crossvlt has no such option"):
        build_nano("crossvlt", variant=Variant(gate="relu", fusion="add"))
    with pytest.raises(InputError, match="--mha 2-2-2-2 has no meaning with --fusion add"):
        build_nano(mha="2-2-2-2", variant=Variant(fusion="add"))
    with pytest.raises(InputError, match="--gate silu: choose one of tanh"):
        Variant(gate="silu")


STAGE = (torch.randn(2, 4, 4, 8), torch.randn(2, 5, 6), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]))


def stage(last: bool = False, **changes: str) -> MultiModalStage:
    torch.manual_seed(0)
    return MultiModalStage(8, 0, 2, 7, [], 6, last=last, variant=Variant(**changes)).eval()


@torch.no_grad()
def test_outputs_of_a_stage_by_their_formulas() -> None:
    x, lang, mask = STAGE

    def merged(built: MultiModalStage, tokens: Tensor) -> Tensor:
        assert built.downsample is not None
        return built.downsample(tokens)

    for gate, activation in {
        "sigmoid": torch.sigmoid,
        "relu": F.relu,
        "gelu": F.gelu,
        "none": lambda v: v,
    }.items():
        built = stage(gate=gate)
        fused, onward = built(x, lang, mask)
        first, second = built.res_gate.state_dict().values()  # type: ignore[union-attr]
        weight = activation(F.relu(fused @ first.T) @ second.T)
        torch.testing.assert_close(onward, merged(built, x + weight * fused))
    built = stage(gate="off")
    fused, onward = built(x, lang, mask)
    torch.testing.assert_close(onward, merged(built, x + fused))
    built = stage(lang_path="off")
    fused, onward = built(x, lang, mask)
    torch.testing.assert_close(onward, merged(built, x))
    assert not torch.equal(fused, x)
    for last in (False, True):
        built, usual = stage(last, decoder_features="V"), stage(last)
        fused, _ = usual(x, lang, mask)
        shown, onward = built(x, lang, mask)
        torch.testing.assert_close(shown, x + usual.res_gate(fused) * fused)  # type: ignore[misc]
        assert (onward is None) == last


@pytest.mark.parametrize("join", ["add", "mul", "concat"])
@torch.no_grad()
def test_mean_fusion_by_its_formula(join: str) -> None:
    torch.manual_seed(0)
    fuse = MeanFusion(8, 6, join).double().eval()
    vis, lang, mask = STAGE[0].flatten(1, 2).double(), STAGE[1].double(), STAGE[2]
    v = F.gelu(F.conv1d(vis.mT, *list(fuse.vis_project.parameters())))
    mean = torch.stack([lang[0].mean(0), lang[1, :3].mean(0)])
    s = F.conv1d(mean[..., None], *list(fuse.lang_project.parameters())).expand_as(v)
    joined = {"add": v + s, "mul": v * s, "concat": torch.cat([v, s], 1)}[join]
    expected = F.gelu(F.conv1d(joined, *list(fuse.project_mm.parameters()))).mT
    torch.testing.assert_close(fuse(vis, lang, mask), expected)
    assert fuse(vis, lang, torch.zeros_like(mask)).isfinite().all()


@torch.no_grad()
def test_forms_of_pwam_by_their_formulas() -> None:
    torch.manual_seed(0)
    vis, lang, mask = STAGE[0].flatten(1, 2).double(), STAGE[1].double(), STAGE[2]
    state = PWAM(8, 6).state_dict()

    def pwam(**form: str) -> PWAM:
        built = PWAM(8, 6, **form)  # type: ignore[arg-type]
        built.load_state_dict({k: state[k] for k in built.state_dict() if k in state}, strict=False)
        return built.double().eval()

    usual = pwam()
    words, v = usual.image_lang_att(vis, lang, mask), usual.vis_project(vis)
    for combine, joined in {"mul": v * words, "add": v + words, "words": words}.items():
        result = pwam(combine=combine)(vis, lang, mask)
        torch.testing.assert_close(result, usual.project_mm(joined))

    plain = pwam(norm="none").image_lang_att
    logits = plain.f_query[0](vis) @ (plain.f_key(lang) * mask[..., None]).mT * 8**-0.5
    logits = logits.masked_fill(mask[:, None] == 0, -torch.inf)
    torch.testing.assert_close(plain.attention(vis, lang, mask)[:, 0], logits.softmax(-1))
    value = plain.f_value(lang) * mask[..., None]
    torch.testing.assert_close(plain(vis, lang, mask), plain.W[0](logits.softmax(-1) @ value))
    alone = pwam(norm="none", attention="sigmoid").image_lang_att
    torch.testing.assert_close(alone(vis, lang, mask), plain.W[0](logits.sigmoid() @ value))

    query = usual.image_lang_att.f_query[0](vis)
    layer = pwam(norm="layer").image_lang_att.f_query(vis)
    torch.testing.assert_close(layer, F.layer_norm(query, (8,)))
    batched = pwam(norm="batch").image_lang_att.f_query.train()(vis)
    torch.testing.assert_close(batched.mT, F.batch_norm(query.mT, None, None, training=True))


def test_batch_norm_in_pwam_can_be_synchronised() -> None:
    fuse = torch.nn.SyncBatchNorm.convert_sync_batchnorm(PWAM(8, 6, norm="batch")).eval()
    kinds = [type(m) for m in fuse.modules()]
    assert kinds.count(torch.nn.SyncBatchNorm) == 2
    assert fuse(STAGE[0].flatten(1, 2), *STAGE[1:]).shape == (2, 16, 8)


def test_norms_of_variants_are_not_decayed(build_nano: Build) -> None:
    for norm in ("layer", "batch"):
        model = build_nano(variant=Variant(pwam_norm=norm))
        groups = {g["name"]: g["param_names"] for g in optim.parameter_groups(model, 0.01)}
        ours = [n for n, _ in model.named_parameters() if ".f_query.1." in n or ".W.1." in n]
        assert len(ours) == 4 * 2 * 2
        assert set(ours) <= set(groups["backbone_no_decay"])


def test_build_model_takes_a_variant(text_config: Any) -> None:
    model = build_model("lavt", swin_type="micro", text_config=text_config, variant=PUBLISHED)
    assert model.variant["gate"] == "tanh"
    assert model.variant["mha"] == "1-1-1-1"
