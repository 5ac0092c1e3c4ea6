"""Each typical slip, planted, is seen by the check that should see it.

A parity check that passes is worth what it would have caught; so here the very same checks run
on a model with one thing wrong. Where tests/golden/traps.json has measured how far a slip moves
the release's logits, it must move ours as far.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import lib.model
from lib import backbone, fusion, lavt, mask_predictor, swin
from lib.evaluation import metrics
from lib.lavt import LAVT
from lib.training import optim
from tests.parity import checks, golden

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch, LAVT], None]


def no_shift_in_one_window(patch: Patch, model: LAVT) -> None:
    attend = swin.SwinBlock.attend

    def as_classification_swin(self: swin.SwinBlock, x: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            if max(x.shape[1:3]) <= self.window_size:
                inner.setattr(self, "shift", 0)
            return attend(self, x)

    patch.setattr(swin.SwinBlock, "attend", as_classification_swin)


def corners_not_aligned(patch: Patch, model: LAVT) -> None:
    def upsample(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    for module in (mask_predictor, lavt):
        patch.setattr(module, "upsample", upsample)


def mask_ignored(patch: Patch, model: LAVT) -> None:
    forward = LAVT.forward
    patch.setattr(
        LAVT, "forward", lambda self, x, ids, mask: forward(self, x, ids, torch.ones_like(mask))
    )


def mask_ignored_by_text(patch: Patch, model: LAVT) -> None:
    encode = LAVT.encode_text
    patch.setattr(
        LAVT, "encode_text", lambda self, ids, mask: encode(self, ids, torch.ones_like(mask))
    )


def mask_ignored_by_fusion(patch: Patch, model: LAVT) -> None:
    forward = fusion.PWAM.forward
    patch.setattr(
        fusion.PWAM,
        "forward",
        lambda self, vis, lang, mask: forward(self, vis, lang, torch.ones_like(mask)),
    )


def scaled_by_head_width(patch: Patch, model: LAVT) -> None:
    for module in _modules(model, fusion.PixelWordAttention):
        patch.setattr(module, "scale", module.scale * module.num_heads**0.5)


def tanh_gelu(patch: Patch, model: LAVT) -> None:
    def forward(self: swin.Mlp, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    patch.setattr(swin.Mlp, "forward", forward)
    for module in _modules(model.backbone, nn.GELU):
        patch.setattr(module, "approximate", "tanh")


def text_norm_eps(patch: Patch, model: LAVT) -> None:
    for module in _modules(model.text_encoder, nn.LayerNorm):
        patch.setattr(module, "eps", 1e-5)


def swin_norm_eps(patch: Patch, model: LAVT) -> None:
    for module in _modules(model.backbone, nn.LayerNorm):
        patch.setattr(module, "eps", 1e-6)


def merging_in_row_order(patch: Patch, model: LAVT) -> None:
    def forward(self: swin.PatchMerging, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))

    patch.setattr(swin.PatchMerging, "forward", forward)


def no_region_mask(patch: Patch, model: LAVT) -> None:
    def none(H: int, W: int, window_size: int, shift: int, like: Tensor) -> Tensor:
        return like.new_zeros((H // window_size) * (W // window_size), 1, 1, 1)

    patch.setattr(swin, "shift_mask", none)


def padded_before_the_norm(patch: Patch, model: LAVT) -> None:
    def forward(self: swin.SwinBlock, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        w = self.window_size
        padded = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        x = x + self.attend(self.norm1(padded))[:, :H, :W]
        return x + self.mlp(self.norm2(x))

    patch.setattr(swin.SwinBlock, "forward", forward)


def bias_of_mirrored_offsets(patch: Patch, model: LAVT) -> None:
    for module in _modules(model, swin.WindowAttention):
        mirrored = module.relative_position_index.T
        patch.setitem(module._buffers, "relative_position_index", mirrored)


def no_instance_norm(patch: Patch, model: LAVT) -> None:
    patch.setattr(fusion.TokenInstanceNorm, "forward", lambda self, x: x)


def unbiased_instance_norm(patch: Patch, model: LAVT) -> None:
    def forward(self: fusion.TokenInstanceNorm, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=True)
        return (x - mean) * (variance + self.eps).rsqrt()

    patch.setattr(fusion.TokenInstanceNorm, "forward", forward)


def no_gate(patch: Patch, model: LAVT) -> None:
    patch.setattr(fusion.LanguageGate, "forward", lambda self, x: torch.ones_like(x))


def gated_features_to_the_decoder(patch: Patch, model: LAVT) -> None:
    forward = backbone.MultiModalStage.forward

    def gated(self: backbone.MultiModalStage, x: Tensor, *words: Tensor) -> Any:
        fused, following = forward(self, x, *words)
        return fused * (1 + self.res_gate(fused)), following

    patch.setattr(backbone.MultiModalStage, "forward", gated)


def _modules(model: nn.Module, kind: type) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, kind)]


class Slip(NamedTuple):
    """A slip, a forward case that shows it, and its title in traps.json, if it is there."""

    case: str
    plant: Plant
    title: str | None = None


NO_SHIFT = "no shift when the map fits one window (timm / classification Swin behaviour)"
# In order of case, because the model of one case is kept at a time.
SLIPS = [
    Slip("a", no_shift_in_one_window, NO_SHIFT),
    Slip("a", corners_not_aligned, "align_corners False"),
    Slip("a", mask_ignored, "language mask all ones in BERT and PWAM"),
    Slip("a", tanh_gelu, "tanh GELU in the backbone"),
    Slip("a", text_norm_eps, "BERT LayerNorm eps 1e-5"),
    Slip("a", swin_norm_eps, "LayerNorm eps 1e-6 in the backbone"),
    Slip("a", mask_ignored_by_text),
    Slip("a", mask_ignored_by_fusion),
    Slip("a", merging_in_row_order),
    Slip("a", no_region_mask),
    Slip("a", padded_before_the_norm),
    Slip("a", bias_of_mirrored_offsets),
    Slip("a", no_instance_norm),
    Slip("a", unbiased_instance_norm),
    Slip("a", no_gate),
    Slip("a", gated_features_to_the_decoder),
    Slip("c", swin_norm_eps, "LayerNorm eps 1e-6 in the backbone"),
    Slip("c", no_shift_in_one_window, NO_SHIFT),
    Slip("d", scaled_by_head_width, "attention scale head_dim**-.5 instead of key_channels**-.5"),
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda s: f"{s.case}-{s.plant.__name__}")
def test_slip_in_the_network(slip: Slip, monkeypatch: Patch) -> None:
    model = checks.case_model(slip.case, torch.float64)
    slip.plant(monkeypatch, model)
    ours = checks.run_forward(model, golden.cases()[slip.case])
    with pytest.raises(AssertionError, match="decoder output"):
        checks.require(checks.float64_rows(slip.case, ours))
    if slip.title is not None:
        published = golden.read_arrays(f"lavt_{slip.case}.npz")["logits"]
        measured = golden.read_json("traps.json")[f"{slip.case}: {slip.title}"]["max_abs_diff"]
        moved = checks.difference(ours.logits, published)
        # The published logits are of single precision, which alone moves them by 6e-5.
        assert moved == pytest.approx(measured, rel=0.01, abs=6e-5)


def test_single_precision_shows_all_slips_but_those_of_an_epsilon() -> None:
    """Its tolerances are wide enough for any CPU and narrow enough to be of use."""
    traps = golden.read_json("traps.json")
    moved = {k: v["max_abs_diff"] for k, v in traps.items() if "max_abs_diff" in v}
    titles = [k for k in moved if not k.endswith("reproduction") and "eps 1e-" not in k]
    assert len(titles) >= 10
    for title in titles:
        assert moved[title] > 2 * checks.logits_tolerance(title[0]), title


def test_without_a_slip_the_same_check_passes() -> None:
    ours = checks.run_forward(checks.case_model("d", torch.float64), golden.cases()["d"])
    checks.require(checks.float64_rows("d", ours))


def _resized_as_tensor(image: Image.Image, size: int) -> Image.Image:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return Image.fromarray(x[0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def _mask_resized_as_tensor(mask: np.ndarray, size: int) -> Tensor:
    x = torch.from_numpy(mask.astype(np.float32))[None, None]
    return F.interpolate(x, (size, size), mode="nearest")[0, 0].byte()


@pytest.mark.parametrize(
    ("function", "slip", "row"),
    [
        ("resize_image", _resized_as_tensor, "grey levels"),
        ("resize_mask", _mask_resized_as_tensor, "mask"),
    ],
)
def test_slip_in_preprocessing(
    function: str, slip: Callable[..., Any], row: str, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(checks, function, slip)
    with pytest.raises(AssertionError, match=row):
        checks.require(checks.preprocessing_rows())


def test_slip_in_normalisation(monkeypatch: Patch) -> None:
    monkeypatch.setattr(checks, "normalize", lambda x: (x.float() / 255 - 0.5) / 0.5)
    with pytest.raises(AssertionError, match="normalised"):
        checks.require(checks.preprocessing_rows())


def test_slip_keeping_the_sep_of_a_long_expression(monkeypatch: Patch) -> None:
    vocabulary: Path | None = checks.find_vocabulary()
    if vocabulary is None:
        pytest.skip("no package with bert-base-uncased's vocabulary")
    encode = checks.encode

    def keeping(tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        ids, mask = encode(tokenizer, texts, length)
        ids[:, -1] = torch.where(mask[:, -1] == 1, 102, 0)
        return ids, mask

    monkeypatch.setattr(checks, "encode", keeping)
    with pytest.raises(AssertionError, match="tokens"):
        checks.require(checks.tokenization_rows(vocabulary))


def _one_where_nothing_is(inter: np.ndarray, union: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.divide(inter, union, out=np.ones(len(inter)), where=union > 0)


@pytest.mark.parametrize(
    ("name", "slip", "seen"),
    [
        ("sample_iou", _one_where_nothing_is, "mIoU"),
        ("PRECISION_AT", tuple(np.nextafter((0.5, 0.6, 0.7, 0.8, 0.9), 1)), "precision"),
    ],
    ids=["empty union counts 1", "precision strictly above K"],
)
def test_slip_in_the_metrics(name: str, slip: Any, seen: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(metrics, name, slip)
    with pytest.raises(AssertionError, match=seen):
        checks.require(checks.metrics_rows())


@pytest.mark.parametrize("lang_layers", [None, 12, 9])
def test_slip_in_the_trained_text_layers(lang_layers: int | None) -> None:
    with pytest.raises(AssertionError, match="group text, names"):
        checks.require(checks.group_rows(lang_layers))


@pytest.mark.parametrize(
    ("name", "slip", "seen"),
    [
        ("NO_DECAY", ("norm",), "group backbone, names"),
        ("NO_DECAY", ("norm", "bias"), "group backbone, names"),
    ],
    ids=["bias tables decay", "biases do not decay"],
)
def test_slip_in_the_weight_decay(name: str, slip: Any, seen: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(lib.model, name, slip)
    with pytest.raises(AssertionError, match=seen):
        checks.require(checks.group_rows())


def test_slip_in_the_schedule(monkeypatch: Patch) -> None:
    poly = optim.poly_schedule
    monkeypatch.setattr(optim, "poly_schedule", lambda o, total, power=0.9: poly(o, total, 1.0))
    with pytest.raises(AssertionError, match="learning rates"):
        checks.require(checks.group_rows())


def _unweighted_loss(patch: Patch) -> None:
    patch.setattr(checks, "cross_entropy", F.cross_entropy)


def _text_dropout(patch: Patch) -> None:
    patch.setattr(LAVT, "train", nn.Module.train)


@pytest.mark.parametrize("plant", [_unweighted_loss, _text_dropout])
def test_slip_in_training(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    plant(monkeypatch)
    run = checks.run_training(torch.float32, steps=1)
    with pytest.raises(AssertionError, match="loss 1"):
        checks.require(checks.loss_rows(run, "float32"))
