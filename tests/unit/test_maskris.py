"""MaskRIS: what is masked, and one training step against an independent computation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import load_tokenizer
from data.loaders import prepare_batch
from lib.crossvlt import CrossVLT
from lib.errors import InputError
from lib.losses import WeightedLosses
from lib.model import Segmenter
from lib.swin import SWIN_SIZES, SwinSize
from lib.training import steps
from lib.training.maskris import MaskRIS, build_maskris
from lib.training.methods import Methods
from lib.training.optim import build_optimizer, freeze_unused, parameter_groups, poly_schedule
from lib.training.steps import StepOptions, train_steps
from tests.conftest import Build
from tests.refer_files import TINY_BERT

CPU = torch.device("cpu")
MASKRIS = MaskRIS(Methods(maskris_patch=16), mask_id=4, special_ids=(0, 1, 2, 3), vocabulary=60)
WEIGHTS = torch.tensor([0.9, 1.1], dtype=torch.float64)[:, None, None]


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {
        "image": torch.randint(0, 256, (2, 3, 32, 32), generator=g, dtype=torch.uint8),
        "input_ids": torch.randint(5, 60, (2, 8), generator=g) * mask,
        "attention_mask": mask,
        "target": (torch.rand(2, 32, 32, generator=g) > 0.7).long(),
        "index": torch.arange(2),
    }


def parts(model: Segmenter, image: Tensor, batch: dict[str, Tensor], ids: Tensor) -> Any:
    """Logits and, of CrossVLT, similarity maps."""
    if isinstance(model, CrossVLT):
        return model.encode(image, ids, batch["attention_mask"])
    return model(image, ids, batch["attention_mask"]), []


def by_hand(
    model: Segmenter, batch: dict[str, Tensor], image: Tensor, ids: Tensor, weight: float
) -> dict[str, Tensor]:
    """The weighted losses of both passes, written out; their sum has one backward pass."""
    times = 2 if isinstance(model, CrossVLT) else 1
    target = torch.stack([1 - batch["target"], batch["target"]], 1).double()
    first, maps = parts(
        model, prepare_batch(batch, CPU)["image"].double(), batch, batch["input_ids"]
    )
    log = first - torch.logsumexp(first, 1, keepdim=True)
    ce = -(WEIGHTS * target * log).sum() / (WEIGHTS * target).sum()
    losses = {"ce": weight * times * ce}
    for i, similarity in enumerate(maps, 1):
        p = F.interpolate(similarity, (32, 32), mode="bilinear", align_corners=True).sigmoid()[:, 0]
        y = batch["target"].double()
        aligned = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        losses[f"align_{i}"] = weight * aligned
    q = torch.exp(log).detach()
    second, _ = parts(model, image, batch, ids)
    log = second - torch.logsumexp(second, 1, keepdim=True)
    pixels = -(WEIGHTS * q * log).sum(1)
    losses["distill"] = (1 - weight) * times * pixels.sum() / pixels.numel()
    return losses


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of batches are float64."""

    def prepare(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        batch = prepare_batch(batch, device)
        return batch | {"image": batch["image"].double()}

    monkeypatch.setattr(steps, "prepare_batch", prepare)


def fix_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first patch of every image, and the second and third word of every expression."""

    def image(self: MaskRIS, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., :16, :16] = 0
        return x

    def text(self: MaskRIS, ids: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, 1], ids[:, 2] = 4, 17
        return ids

    monkeypatch.setattr(MaskRIS, "mask_image", image)
    monkeypatch.setattr(MaskRIS, "mask_text", text)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["lavt", "lavt_one", "crossvlt"])
def test_a_step_is_that_of_an_independent_computation(
    name: str,
    accumulate: int,
    build_nano: Build,
    text_config: Any,
    double: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses, gradients after clipping, weights and batch norm statistics, in float64."""
    text_config.hidden_dropout_prob = text_config.attention_probs_dropout_prob = 0.0
    # CrossVLT needs widths that are multiples of 64.
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(32, (2, 2, 2, 2), (1, 2, 4, 8)))
    text_config.hidden_size, text_config.num_attention_heads = 64, 1
    torch.manual_seed(0)
    model: Any = build_nano(name, drop_path=0.0).double().train()
    groups = parameter_groups(model, 0.1, lang_layers=None)
    freeze_unused(model, groups)
    other = copy.deepcopy(model)
    how = replace(MASKRIS.how, maskris_weight=0.25)
    maskris = replace(MASKRIS, how=how)
    fix_masks(monkeypatch)
    batches = [make_batch(seed) for seed in range(accumulate)]

    expected: dict[str, Tensor] = {}
    for batch in batches:
        image = maskris.mask_image(prepare_batch(batch, CPU)["image"].double())
        losses = by_hand(other, batch, image, maskris.mask_text(batch["input_ids"]), 0.25)
        total = torch.stack([*losses.values()]).sum() / accumulate
        total.backward()
        for key, value in losses.items():
            expected[key] = expected.get(key, 0) + value.detach() / accumulate
    grads = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    limit = norm.item() / 3

    optimizer = build_optimizer(groups, 1e-3)
    [step] = train_steps(
        maskris.objective(model, WeightedLosses({"ce": 1.0})),
        batches,
        optimizer,
        poly_schedule(optimizer, 10),
        CPU,
        StepOptions(clip_grad=limit, accumulate=accumulate, maskris=maskris),
    )
    assert list(step.losses) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(step.losses[key], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.grad_norm, norm, rtol=1e-8, atol=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == grads.keys()
    for key, value in grads.items():
        torch.testing.assert_close(
            model.get_parameter(key).grad, value / 3, rtol=1e-4, atol=1e-9 * limit, msg=key
        )
    for (key, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)  # both passes count


class Toy(nn.Module):
    """A model in the place of a segmenter: a convolution, and a bias per word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.words = nn.Embedding(60, 2)
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        self.inputs.append((image, ids))
        return self.conv(image) + self.words(ids).mean(1)[:, :, None, None]

    losses = Segmenter.losses


def train_toy(options: StepOptions, batches: list[Any], **extra: Any) -> tuple[Toy, list[Any]]:
    torch.manual_seed(3)
    model: Any = Toy()
    optimizer = build_optimizer([{"name": "all", "params": list(model.parameters())}], 1e-2)
    objective = MASKRIS.objective(model, WeightedLosses({"ce": 1.0}))
    schedule = poly_schedule(optimizer, 10)
    return model, [*train_steps(objective, batches, optimizer, schedule, CPU, options, **extra)]


def test_a_scaled_loss_gives_the_same_gradients() -> None:
    options = StepOptions(maskris=MASKRIS)
    _, [plain] = train_toy(options, [make_batch()])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, [scaled] = train_toy(options, [make_batch()], scaler=scaler)
    assert scaled.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-6)
    assert scaled.loss == plain.loss


def test_a_pass_that_is_not_finite_changes_nothing() -> None:
    bad = make_batch()
    bad["image"] = bad["image"].float() * float("inf")
    model, [step] = train_toy(StepOptions(maskris=MASKRIS), [bad])
    assert not step.finite
    fresh, _ = train_toy(StepOptions(maskris=MASKRIS), [])
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_second_pass_sees_masks_and_the_first_does_not() -> None:
    batch = make_batch()
    batch["image"].fill_(255)
    model, _ = train_toy(StepOptions(maskris=MASKRIS), [batch])
    (image, ids), (masked, words) = model.inputs
    assert torch.equal(ids, batch["input_ids"])
    assert (image != 0).all()
    kept = (masked != 0).view(2, 3, 2, 16, 2, 16).permute(0, 2, 4, 1, 3, 5).flatten(3)
    assert torch.equal(kept.any(-1), kept.all(-1))  # whole patches
    assert kept.all(-1).flatten(1).sum(1).tolist() == [1, 1]  # a quarter of four
    assert torch.equal(masked[masked != 0], image[masked != 0])
    assert torch.equal(words == 0, ids == 0)


def test_patches_are_drawn_uniformly_for_each_image() -> None:
    torch.manual_seed(0)
    x = torch.ones(2000, 3, 64, 32)
    kept = MASKRIS.mask_image(x)[:, 0, ::16, ::16].flatten(1)
    assert kept.sum(1).unique().tolist() == [2]  # int(8 x 0.25)
    assert kept.mean(0).tolist() == pytest.approx([0.25] * 8, abs=0.04)


def test_words_are_drawn_as_in_bert() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (4000, 10))
    ids[:, 0], ids[:, 1], ids[:, 9] = 2, 1, 0
    after = MASKRIS.mask_text(ids)
    assert torch.equal(after[:, [0, 1, 9]], ids[:, [0, 1, 9]])
    words, masked = ids[:, 2:9], after[:, 2:9]
    assert (masked == 4).float().mean().item() == pytest.approx(0.15 * (0.8 + 0.1 / 60), abs=0.006)
    other = (masked != 4) & (masked != words)
    assert other.float().mean().item() == pytest.approx(0.15 * 0.1, abs=0.004)
    assert masked[other].unique().numel() > 50  # any word
    assert torch.equal(ids[:, 0], torch.full((4000,), 2))  # the given ones are not changed


def test_the_tokenizer_tells_its_special_tokens() -> None:
    tokenizer = load_tokenizer(TINY_BERT)
    built = build_maskris(Methods(), tokenizer, 480)
    words = tokenizer.get_vocab()
    assert built.mask_id == words["[MASK]"]
    assert {words[w] for w in ("[CLS]", "[SEP]", "[PAD]")} <= set(built.special_ids)
    assert built.vocabulary == len(words)
    with pytest.raises(InputError, match="--maskris_patch 32: --img_size 470 is no multiple of it"):
        build_maskris(Methods(), tokenizer, 470)
    with pytest.raises(InputError, match="leaves none of an image's 1 patches"):
        build_maskris(Methods(), tokenizer, 32)


def test_a_tokenizer_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(TINY_BERT)
    monkeypatch.setattr(type(tokenizer), "mask_token_id", None, raising=False)
    with pytest.raises(InputError, match="the tokenizer has no"):
        build_maskris(Methods(), tokenizer, 480)
