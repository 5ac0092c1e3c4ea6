"""CrossVLT beside its release: weights' names, forward pass, losses and three training steps."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from lib.crossvlt import (
    CrossVLT,
    CrossVLTOutput,
    alignment_losses,
    crossvlt_losses,
)
from lib.losses import cross_entropy
from lib.swin import SWIN_SIZES
from lib.training import optim
from tests.parity import checks, golden

CASES = {"tiny96": ("tiny", 7), "base96": ("base", 12)}  # Swin size and window
PRECISIONS = ("float32", "float64")
MAX_TOKENS = 21
# Norms of gradients below this are rounding: InstanceNorm or softmax cancels these biases. AdamW's
# first steps are as long for them as for the others.
RESIDUE = 1e-6


def empty(name: str) -> CrossVLT:
    """The model of a case without the random parts of training, weights fresh."""
    swin, window = CASES[name]
    text = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return CrossVLT(SWIN_SIZES[swin], window, text, drop_path=0.0)


@lru_cache(maxsize=1)
def _formula_model(name: str) -> CrossVLT:
    model = empty(name)
    golden.fill(model)
    return model.eval()


def formula_model(name: str) -> CrossVLT:
    """A copy, to be changed, of the model with the release's formula weights."""
    return copy.deepcopy(_formula_model(name))


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Image, ids and mask of a case."""
    case = golden.read_json("cross_cases.json")[name]
    ids, mask = golden.tokens(case["token_seed"], case["word_pieces"], MAX_TOKENS)
    return golden.image(case["image_seed"], case["image_shape"]).to(dtype), ids, mask


def targets(name: str) -> tuple[Tensor, Tensor]:
    """Target of a case at 96x96, and enlarged to 480x480, where the release aligns."""
    discs = golden.read_json("cross_cases.json")[name]["target_discs"]
    target = golden.discs(discs, (96, 96))
    return target, target.repeat_interleave(5, 1).repeat_interleave(5, 2)


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_order_of_the_weights(name: str) -> None:
    with torch.device("meta"):
        model = empty(name)
    own = [
        [k, list(v.shape), str(v.dtype).removeprefix("torch.")]
        for k, v in model.state_dict().items()
    ]
    assert own == golden.read_json(f"keys_cross_{CASES[name][0]}_train.json")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == golden.read_json("cross_cases.json")[name]["params"]


def test_parameter_groups() -> None:
    published = golden.read_json("cross_train_tiny96_float64.json")
    with torch.device("meta"):
        model = empty("tiny96")
    own = optim.parameter_groups(model, 0.01)
    by_first = {g["param_names"][0]: g for g in own}
    for expected in published["groups"]:
        group = by_first[expected["params"][0]]
        assert group["param_names"] == expected["params"]
        assert group["weight_decay"] == expected["weight_decay"]
    assert len(own) == len(published["groups"])
    assert sorted(len(g["params"]) for g in own) == [20, 34, 34, 34, 76, 98, 193]
    assert optim.not_optimised(model, own) == published["not_optimised"]
    assert list(model.unused_parameters()) == published["no_grad"]


class Training(NamedTuple):
    """What three steps left behind."""

    losses: list[list[float]]  # total, twice the cross entropy, sum of the alignments
    gradient: dict[str, float | None]  # norms at step 1
    after: dict[int, dict[str, list[float]]]  # by step, sum and norm of every tensor
    sizes: dict[str, int]


def sums(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {k: [v.double().sum().item(), v.double().norm().item()] for k, v in tensors.items()}


def train(precision: str) -> Training:
    """Three steps on the same batch, as the release's were measured."""
    meta = golden.read_json(f"cross_train_tiny96_{precision}.json")
    dtype = getattr(torch, precision)
    model = formula_model("tiny96").to(dtype).train()
    batch, (target, enlarged) = inputs("tiny96", dtype), targets("tiny96")
    optimizer = optim.build_optimizer(optim.parameter_groups(model, meta["wd"]), meta["lr"])
    schedule = optim.poly_schedule(optimizer, meta["total_steps"], meta["power"])
    result = Training([], {}, {}, {k: v.numel() for k, v in model.state_dict().items()})
    for step in (1, 2, 3):
        output = model.encode(*batch)
        ce = 2 * cross_entropy(output.logits, target)
        alignment = alignment_losses(output.similarity, enlarged).sum()
        total = ce + alignment
        result.losses.append([total.item(), ce.item(), alignment.item()])
        optimizer.zero_grad()
        total.backward()
        if step == 1:
            for name, p in model.named_parameters():
                result.gradient[name] = None if p.grad is None else p.grad.norm().item()
        optimizer.step()
        schedule.step()
        if step != 2:
            result.after[step] = sums(model.state_dict())
    return result


def test_three_training_steps_in_double_precision() -> None:
    published = golden.read_json("cross_train_tiny96_float64.json")
    own = train("float64")
    np.testing.assert_allclose(own.losses, published["losses_total_2ce_align"], rtol=0, atol=1e-6)
    assert [k for k, v in own.gradient.items() if v is None] == published["no_grad"]
    norms = {k: v for k, v in published["grad_norm"].items() if v is not None}
    assert {k: own.gradient[k] for k in norms} == pytest.approx(norms, rel=1e-6, abs=1e-12)
    for step, key in ((1, "after_step1"), (3, "after_last")):
        for name, expected in published[key].items():
            assert own.after[step][name] == pytest.approx(expected, rel=1e-6, abs=1e-6), name
    for name, expected in published["buffers_after_last"].items():
        assert own.after[3][name] == pytest.approx(expected, rel=1e-6), name


def test_three_training_steps_in_single_precision() -> None:
    published, exact = (
        golden.read_json(f"cross_train_tiny96_{precision}.json") for precision in PRECISIONS
    )
    own = train("float32")
    key = "losses_total_2ce_align"
    for losses, theirs, true in zip(own.losses, published[key], exact[key], strict=True):
        rounding = checks.difference(theirs, true)
        tolerance = checks.float32_tolerance(rounding, max(true), checks.TRAINING_MARGIN)
        np.testing.assert_allclose(losses, theirs, rtol=0, atol=tolerance)
    norms = {k: v for k, v in published["grad_norm"].items() if v is not None and v > RESIDUE}
    rounding = max(abs(v / exact["grad_norm"][k] - 1) for k, v in norms.items())
    tolerance = checks.float32_tolerance(rounding, margin=checks.TRAINING_MARGIN)
    assert {k: own.gradient[k] for k in norms} == pytest.approx(norms, rel=tolerance)
    for step, key in ((1, "after_step1"), (3, "after_last")):
        for name in norms:
            # As far as AdamW may move the elements of two runs apart, see checks.py.
            far = 2 * step * published["lr"] * own.sizes[name] ** 0.5
            assert own.after[step][name] == pytest.approx(published[key][name], rel=0, abs=far), (
                name
            )
    key = "buffers_after_last"
    rounding = max(checks.difference(v, exact[key][k]) for k, v in published[key].items())
    tolerance = checks.float32_tolerance(rounding, margin=checks.TRAINING_MARGIN)
    for name, expected in published[key].items():
        np.testing.assert_allclose(
            own.after[3][name], expected, rtol=0, atol=tolerance, err_msg=name
        )


class Run(NamedTuple):
    """A forward pass in both precisions."""

    name: str
    case: dict[str, Any]
    published: dict[str, golden.Array]
    measured: dict[str, dict[str, Tensor]]  # by precision, then by the release's name
    output: dict[str, CrossVLTOutput]  # by precision
    margin: float  # of single-precision tolerances


def record(model: CrossVLT, batch: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], CrossVLTOutput]:
    """Everything of the network that the release was measured at, by the name it has there."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, name: str) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output

        handles.append(module.register_forward_hook(hook))

    handles: list[Any] = []
    for i in range(1, 5):
        language = model.get_submodule(f"lang_stage{i}")
        keep(language, f"lang{i}")
        keep(language.get_submodule("encoder.proj" if i == 1 else "proj"), f"cls{i}")
        keep(model.get_submodule(f"backbone.{i - 1}"), f"stage{i}")
        keep(model.get_submodule(f"backbone.{i - 1}.layers.proj"), f"xproj{i}")
    keep(model.get_submodule("backbone.3.layers.attn1"), "fused4")
    keep(model.classifier, "low")
    with torch.no_grad():
        output = model.encode(*batch)
        # The release computes the last gate too, and uses it nowhere.
        fused, vis = seen.pop("fused4"), seen["stage4"][0]
        last = vis + model.get_submodule("backbone.3.layers.linear1")(fused) * fused
    for handle in handles:
        handle.remove()
    seen["lang1"] = seen["lang1"].last_hidden_state
    for i in range(1, 5):
        _, seen[f"stage{i}"], onward = seen[f"stage{i}"]
        seen[f"next{i}"] = (last if onward is None else onward).flatten(1, 2)
        seen[f"xproj{i}"] = seen[f"xproj{i}"].flatten(1, 2)
        seen[f"sim{i}"] = output.similarity[i - 1]
    return seen | {"logits": output.logits}, output


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest) -> Run:
    return forward(request.param, torch.device("cpu"))


def forward(name: str, device: torch.device, margin: float = checks.MARGIN) -> Run:
    """A case's forward pass on a device; what it gives is on the CPU."""
    case = golden.read_json("cross_cases.json")[name]
    model = formula_model(name)
    with torch.no_grad():
        model.get_parameter("classifier.conv1_1.bias").copy_(torch.tensor(case["head_bias"]))
    measured, output = {}, {}
    for precision in PRECISIONS:
        dtype = getattr(torch, precision)
        batch = tuple(x.to(device) for x in inputs(name, dtype))
        seen, found = record(model.to(device, dtype), batch)
        measured[precision] = {key: value.cpu() for key, value in seen.items()}
        similarity = [similar.cpu() for similar in found.similarity]
        output[precision] = CrossVLTOutput(found.logits.cpu(), similarity)
    return Run(name, case, golden.read_arrays(f"cross_{name}.npz"), measured, output, margin)


def test_inputs(run: Run) -> None:
    _, ids, mask = inputs(run.name, torch.float32)
    assert np.array_equal(ids, run.published["ids"])
    assert np.array_equal(mask, run.published["mask"])


def tolerance_of(run: Run, key: str, precision: str) -> float:
    """Of a quantity that is stored in single precision.

    Our float64 stands for the release's, from which it differs by 1e-12 where that is known.
    """
    exact, published = run.measured["float64"][key], run.published
    ours = exact.numpy() if key in published else golden.sample(exact, 512)
    stored = published[key] if key in published else published[f"{key}_sample"]
    rounding = checks.difference(ours, stored)
    limit = 2e-5 if key.startswith(("lang", "cls", "sim")) else 1e-4
    assert rounding < limit, key
    if precision == "float64":
        return limit
    return checks.float32_tolerance(rounding, exact.abs().max().item(), run.margin)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", ["lang", "xproj", "stage", "next", "cls", "sim"])
def test_each_stage(run: Run, part: str, precision: str) -> None:
    for key in (f"{part}{i}" for i in range(1, 5)):
        own, published = run.measured[precision][key], run.published
        atol = tolerance_of(run, key, precision)
        if f"{key}_shape" in published:
            assert own.shape == tuple(published[f"{key}_shape"])
        ours = own.numpy() if key in published else golden.sample(own, 512)
        stored = published[key] if key in published else published[f"{key}_sample"]
        np.testing.assert_allclose(ours, stored, rtol=0, atol=atol, err_msg=key)
        # Neither differs by more than the worst element; rounding averages out in float64.
        atol = atol if precision == "float32" else 1e-6
        if f"{key}_mean" in published:
            mean = own.double().mean()
            np.testing.assert_allclose(mean, published[f"{key}_mean"], rtol=0, atol=atol)
        if f"{key}_std" in published:
            std = own.double().std(correction=0)
            np.testing.assert_allclose(std, published[f"{key}_std"], rtol=0, atol=atol)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits(run: Run, precision: str) -> None:
    own = run.measured[precision]
    for key in ("low", "logits"):
        atol = tolerance_of(run, key, precision)
        np.testing.assert_allclose(own[key], run.published[key], rtol=0, atol=atol)
    logits = own["logits"].double()
    pixels = logits[0, 0].numel()
    atol = atol if precision == "float32" else 1e-5
    means = run.published["logits_sum"] / pixels
    np.testing.assert_allclose(logits.mean((2, 3)), means, rtol=0, atol=atol)
    squares = run.published["logits_sumsq"] / pixels
    slope = 2 * logits.abs().max().item()
    np.testing.assert_allclose(logits.square().mean((2, 3)), squares, rtol=0, atol=slope * atol)
    mask = logits.argmax(1).numpy()
    published = np.unpackbits(run.published["argmax_bits"])[: mask.size].reshape(mask.shape)
    near_tie = 2 * tolerance_of(run, "logits", "float32")  # two logits differ
    decided = (logits[:, 0] - logits[:, 1]).abs().numpy() > near_tie
    assert decided.mean() > 0.99
    assert np.array_equal(mask[decided], published[decided])


def test_double_precision_is_as_far_from_the_releases_single_precision_as_its_own(
    run: Run,
) -> None:
    # Of the release's float64 pass, its distance from float32 is what was kept.
    own = run.measured["float64"]
    for key, distance in zip(
        ("logits", "sim1", "sim2", "sim3", "sim4"),
        run.case["max_abs_diff_fp32_vs_fp64"],
        strict=True,
    ):
        measured = np.abs(own[key].numpy() - run.published[key]).max()
        assert measured == pytest.approx(distance, rel=0, abs=1e-12), key


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses(run: Run, precision: str) -> None:
    """Cross entropy moves with the difference of two logits, alignment with the similarity."""
    output, (target, enlarged) = run.output[precision], targets(run.name)
    of_ce = of_align = 1e-5
    if precision == "float32":
        of_ce = 2 * tolerance_of(run, "logits", precision)
        of_align = max(tolerance_of(run, f"sim{i}", precision) for i in range(1, 5))
    of_total = 2 * of_ce + 4 * of_align
    ce = cross_entropy(output.logits, target)
    assert ce.item() == pytest.approx(run.case["ce"], rel=0, abs=of_ce)
    large = alignment_losses(output.similarity, enlarged)
    np.testing.assert_allclose(large, run.case["align_480"], rtol=0, atol=of_align)
    small = alignment_losses(output.similarity, target)
    np.testing.assert_allclose(small, run.case["align_input_size"], rtol=0, atol=of_align)
    total = (2 * ce + large.sum()).item()
    assert total == pytest.approx(run.case["total_480"], rel=0, abs=of_total)
    total = sum(crossvlt_losses(output, target).values()).item()
    published = 2 * run.case["ce"] + sum(run.case["align_input_size"])
    assert total == pytest.approx(published, rel=0, abs=of_total)
