"""Metrics of any number of targets against plain numpy, and how they are shown and scored again."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from args import parse_test, parse_train, protocol_of
from lib.checkpoint import write_checkpoint
from lib.checkpoint.rebuild import open_trained
from lib.errors import InputError
from lib.evaluation import tables
from lib.evaluation.bootstrap import intervals, paired_intervals
from lib.evaluation.counts import SampleCounts, sample_counts
from lib.evaluation.generalised import HeadRecorder
from lib.evaluation.protocol import Protocol, at_original_size, warning
from lib.evaluation.published import other_models
from lib.evaluation.summary import summary
from lib.losses import LOSSES
from lib.no_target import NoTargetLAVT
from lib.training import optim
from refer.published import COUNTS, OTHER_MODELS
from tests.by_hand import by_hand_zero, by_table
from tests.conftest import Build
from tests.record_files import Line, rle, write_lines
from tests.refer_files import TINY_BERT
from tests.scripts import REPO, one_line_error
from tools import score
from tools.report import __main__ as report
from tools.report.records import read_records

# Intersection, union, no target in truth, no target predicted: all four cases, and odd ones.
SAMPLES = [
    (0, 12, True, True),  # a few pixels that count as none
    (0, 0, True, True),
    (0, 900, True, False),
    (30, 500, False, True),
    (0, 400, False, True),  # nothing predicted at all
    (450, 500, False, False),
    (80, 100, False, False),
    (79, 100, False, False),
    (70, 100, False, False),
    (0, 300, False, False),
]
COLUMNS = ("P@0.7", "P@0.8", "P@0.9", "cIoU", "gIoU", "N_acc", "T_acc")


def counts(samples: list[tuple[int, int, bool, bool]], kind: str = "generalised") -> SampleCounts:
    inter, union, truth, predicted = (np.array(column) for column in zip(*samples, strict=True))
    return sample_counts(kind, inter, union, truth.astype(bool), predicted.astype(bool))


def same(a: dict[str, float], b: dict[str, float]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert value == pytest.approx(b[name], abs=1e-12, nan_ok=True), name


SUBSETS = [
    SAMPLES,
    *[[sample] for sample in SAMPLES],
    [s for s in SAMPLES if s[2]],
    [s for s in SAMPLES if not s[2]],
]


@pytest.mark.parametrize("samples", SUBSETS)
@pytest.mark.parametrize(
    ("kind", "expected"), [("generalised", by_table), ("zero_target", by_hand_zero)]
)
def test_metrics_against_the_table(kind: str, expected: Any, samples: list) -> None:
    result = counts(samples, kind)
    metrics, by_hand = result.summarise(), expected(samples)
    same(metrics.row(), by_hand)
    assert result.columns == tuple(metrics.row())
    # As sums over the samples, which the bootstrap draws.
    of_sums = result.of_sums(result.terms().sum(0, keepdims=True))[0]
    same(dict(zip(result.columns, of_sums.tolist(), strict=True)), by_hand)
    written = json.loads(json.dumps(metrics.as_dict(), allow_nan=False))
    flat = {f"P@{k}": v for k, v in written["precision"].items()} | written
    for name, value in by_hand.items():
        assert flat[name] == (None if math.isnan(value) else pytest.approx(value)), name
    assert written["samples"] == len(samples)
    assert written["targets"] == sum(not s[2] for s in samples)
    assert "nan" not in metrics.release_text()


def test_keys_of_the_results() -> None:
    assert set(counts(SAMPLES).summarise().as_dict()) == {
        *("gIoU", "cIoU", "N_acc", "T_acc", "precision"),
        *("samples", "targets", "intersection", "union"),
    }
    zero = counts(SAMPLES, "zero_target").summarise().as_dict()
    assert {"oIoU", "mIoU", "precision", "Acc"} <= zero.keys()


def test_random_counts_of_both_kinds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        samples = []
        for _ in range(int(rng.integers(1, 12))):
            none = bool(rng.random() < 0.4)
            union = int(rng.integers(0, 1000))
            inter = 0 if none else int(rng.integers(0, union + 1))
            samples.append((inter, union, none, bool(rng.random() < 0.5)))
        same(counts(samples).summarise().row(), by_table(samples))
        same(counts(samples, "zero_target").summarise().row(), by_hand_zero(samples))


def test_sums_are_exact_integers() -> None:
    huge = 2**53 + 1
    result = counts([(huge, huge, False, False), (0, 2, True, False)]).summarise()
    assert (result.intersection, result.union) == (huge, huge + 2)


@pytest.mark.parametrize("kind", ["generalised", "zero_target"])
def test_intervals_against_all_draws(kind: str) -> None:
    """Four objects; draws in which a metric is not defined do not count for it."""
    chosen = counts([SAMPLES[i] for i in (0, 2, 3, 5)], kind)
    ends = intervals(chosen, np.arange(4), resamples=40_000)
    rows = [
        chosen.take(np.array(draw)).summarise().row()
        for draw in itertools.product(range(4), repeat=4)
    ]
    for column, (low, high) in ends.items():
        values = np.array([row[column] for row in rows])
        values = values[~np.isnan(values)]
        assert np.quantile(values, 0.02) - 1e-9 <= low <= np.quantile(values, 0.03) + 1e-9
        assert np.quantile(values, 0.97) - 1e-9 <= high <= np.quantile(values, 0.98) + 1e-9
    none = paired_intervals(chosen, chosen, np.arange(4), resamples=100)
    assert set(none.values()) == {(0.0, 0.0)}


def test_undefined_metrics_print_a_dash_and_are_null() -> None:
    samples = [s for s in SAMPLES if not s[2]]
    result = summary(counts(samples), range(len(samples)), [None] * len(samples))
    written = json.loads(json.dumps(result.as_dict(), allow_nan=False))["all"]
    assert written["N_acc"] is None
    assert written["bootstrap_95"]["N_acc"] is None
    assert written["bootstrap_95"]["cIoU"] is not None
    entry = tables.Entry("testB", result)
    shown = tables.Results("gRefCOCO", {"model": "lavt"}, "no_target_pixels=50", [entry])
    for form in (tables.as_text, tables.as_markdown, tables.as_latex, tables.as_csv):
        text = form(shown).replace("\\_", "_")
        assert "nan" not in text
        assert "no_target_pixels=50" in text
        assert "NOT the standard protocol" not in text
        for column in COLUMNS:
            assert column in text
    first = tables.as_markdown(shown).splitlines()[4]
    assert first.split("|")[7].strip() == "-"
    (measured, *_) = csv.DictReader(io.StringIO(tables.as_csv(shown)))
    assert measured["N_acc"] == ""
    assert float(measured["T_acc"]) == pytest.approx(written["T_acc"], abs=1e-4)


def test_published_results_of_others_are_shown_and_not_compared() -> None:
    result = summary(counts(SAMPLES), range(len(SAMPLES)), [None] * len(SAMPLES))
    others = other_models(("grefcoco", "unc", "val"), 10)
    shown = tables.Results("x", {}, "standard", [tables.Entry("val", result, None, others)])
    text = tables.as_text(shown)
    assert "published (ReLA, Swin-B)" in text
    assert "62.42" in text
    assert "difference" not in text
    (rmsin,) = other_models(("rrsisd", "unc", "val"), 1740)
    assert (rmsin.title, rmsin.values["mIoU"]) == ("RMSIN", 65.10)
    assert other_models(("rrsisd", "unc", "val"), 1739) == []  # a subset
    # What is not verified is nowhere.
    assert "57.64" not in str(OTHER_MODELS)
    assert "58.4" not in str(OTHER_MODELS)


# The protocol


def protocol(*words: str, dataset: str = "grefcoco") -> Protocol:
    return protocol_of(parse_train(["--dataset", dataset, "--val_expressions", "all", *words]))


def test_the_rule_is_part_of_the_label() -> None:
    usual = protocol()
    assert usual.label == "no_target_pixels=50"
    assert usual.is_standard
    assert usual.as_dict()["mask_mode"] == "union"
    head = protocol("--no_target_head")
    assert (head.label, head.is_standard) == ("no_target_pixels=head", True)
    other = protocol("--no_target_head", "--no_target_pixels", "0")
    assert (other.label, other.is_standard) == ("no_target_pixels=0", False)
    assert warning(other.label) == "NOT the standard protocol: no_target_pixels=0"
    both = Protocol(eval_mode="cat", no_target_pixels=50).label
    assert both == "eval_mode=cat no_target_pixels=50"
    assert warning(both) == f"NOT the standard protocol: {both}"
    assert at_original_size(usual.label) == "eval_size=original no_target_pixels=50"


@pytest.mark.parametrize("dataset", ["refcoco", "ref-zom", "rrsisd", "refsegrs", "risbench"])
def test_other_datasets_have_no_such_rule(dataset: str) -> None:
    assert protocol(dataset=dataset).label == "standard"
    assert "no_target_pixels" not in protocol(dataset=dataset).as_dict()
    message = one_line_error(parse_train, ["--dataset", dataset, "--no_target_pixels", "3"])
    assert message == "--no_target_pixels 3 has no meaning but with --dataset grefcoco"


def test_a_negative_number_of_pixels() -> None:
    words = ["--dataset", "grefcoco", "--no_target_pixels", "-1"]
    for parse, more in ((parse_train, []), (parse_test, ["--resume", "x"])):
        message = one_line_error(parse, [*words, *more])
        assert message == "--no_target_pixels -1: must be 0 or more"


# The files of predictions


def written(path: Path, kind: str, label: str) -> list[Line]:
    """Lines with masks whose counts are another protocol's."""
    rng = np.random.default_rng(1)
    lines: list[Line] = []
    for i, none in enumerate((True, True, True, False, False, False, False)):
        truth = np.zeros((20, 30), bool)
        if not none:
            truth[3:15, 4:20] = True
        mask = np.zeros((20, 30), bool)
        mask.flat[: (0, 7, 300, 0, 40, 400, 200)[i]] = True
        inter, union = int((truth & mask).sum()), int((truth | mask).sum())
        about = {"split": "val", "image_id": 1, "category_id": 1, "sentence": "x", "category": ""}
        about |= {"file_name": "a.jpg", "height": 20, "width": 30, "same_category": 0}
        about |= {"ref_id": i, "ann_ids": [] if none else [i], "sent_ids": [i], "score": 0.5}
        about |= {
            "metrics": kind,
            "no_target": none,
            "predicted_no_target": bool(rng.random() < 0.5),
        }
        about |= {"intersection": inter, "union": union, "iou": inter / union if union else 0.0}
        lines.append(about | {"segmentation": rle(mask), "truth": rle(truth), "protocol": label})
    write_lines(path, lines)
    return lines


def in_file(lines: list[Line], least: int | None = None) -> list[tuple[int, int, bool, bool]]:
    """The samples; with ``least``, predicted to be of no target with fewer pixels."""
    area = [coco_mask.decode(line["segmentation"]).sum() for line in lines]
    return [
        (
            line["intersection"],
            line["union"],
            line["no_target"],
            line["predicted_no_target"] if least is None else bool(area[i] < least),
        )
        for i, line in enumerate(lines)
    ]


@pytest.mark.parametrize(
    ("kind", "label", "least"),
    [
        ("generalised", "no_target_pixels=50", 50),
        ("generalised", "no_target_pixels=0", 1),
        ("generalised", "no_target_pixels=head", None),
        ("zero_target", "standard", 1),
    ],
)
def test_score(
    kind: str,
    label: str,
    least: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = written(tmp_path / "p.jsonl", kind, label)
    expected = by_table if kind == "generalised" else by_hand_zero
    for flags, decided in (([], None), (["--from_masks"], least)):
        score.main(["p.jsonl", "--json", "s.json", "--csv", "s.csv", *flags])
        content = json.loads(Path("s.json").read_text())["splits"]["val"]["all"]
        found = {f"P@{k}": v for k, v in content["precision"].items()} | content
        row = expected(in_file(lines, decided))
        for name, value in row.items():
            assert found[name] == pytest.approx(value), name
        (measured, *_) = csv.DictReader(io.StringIO(Path("s.csv").read_text()))
        assert float(measured[list(row)[-1]]) == pytest.approx(list(row.values())[-1], abs=1e-4)
    score.main(["p.jsonl", "p.jsonl", "--json", "c.json"])
    assert json.loads(Path("c.json").read_text())["splits"]["val"]["samples"]["equal"] == 7
    assert list(row)[-1] in capsys.readouterr().out


def test_files_of_other_metrics_are_not_compared(tmp_path: Path) -> None:
    for name, kind in (("a", "generalised"), ("b", "zero_target")):
        written(tmp_path / f"{name}.jsonl", kind, "no_target_pixels=50")
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert "different metrics" in one_line_error(score.main, paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": "best"}, "'metrics' is none of generalised, zero_target"),
        ({"no_target": 1}, "'no_target' is not true or false"),
        ({"predicted_no_target": None}, "'predicted_no_target' is not true or false"),
    ],
)
def test_damaged_lines(change: Line, message: str, tmp_path: Path) -> None:
    lines = written(tmp_path / "p.jsonl", "generalised", "no_target_pixels=50")
    path = write_lines(tmp_path / "q.jsonl", [lines[0], lines[1] | change])
    with pytest.raises(InputError, match=f"line 2: {message}"):
        read_records(path)


def test_report_shows_them(tmp_path: Path) -> None:
    written(tmp_path / "p.jsonl", "generalised", "no_target_pixels=50")
    samples = read_records(tmp_path / "p.jsonl")
    page = report.build_page(samples, ["p.jsonl"], {}, range(len(samples)))
    row = by_table([(s.intersection, s.union, s.no_target, s.predicted_no_target) for s in samples])
    for name, value in row.items():
        assert f"<th>{name}</th>" in page
        assert f"<td>{value:.2f}</td>" in page
    assert "Protocol: standard, no_target_pixels=50." in page
    columns = report.gallery(samples, [], {("a.jpg", 20, 30): 0}, None, [0, 6])["columns"]
    chosen = (samples[0], samples[6])
    assert columns["no_target"] == [[s.no_target, s.predicted_no_target] for s in chosen]
    assert columns["iou"][0] == float(samples[0].predicted_no_target)


# The head


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (batch, 7))
    return torch.randn(batch, 3, 56, 56), ids, torch.ones_like(ids)


def test_head_is_a_linear_layer_on_the_mean_of_the_deepest_features(build_nano: Build) -> None:
    model = build_nano(no_target_head=True).eval()
    assert isinstance(model, NoTargetLAVT)
    image, ids, mask = inputs()
    logits, said = model.encode(image, ids, mask)
    assert torch.equal(logits, model(image, ids, mask))
    assert logits.shape == (3, 2, 56, 56)
    deepest = model.backbone(image, model.encode_text(ids, mask), mask)[-1]
    head = model.no_target_head
    by_hand = deepest.double().flatten(2).mean(2) @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(said.double(), by_hand, rtol=1e-5, atol=1e-6)


def test_losses_are_named_and_weighted(build_nano: Build) -> None:
    model = build_nano(no_target_head=True).eval()
    image, ids, mask = inputs()
    target = torch.zeros(3, 56, 56, dtype=torch.long)
    target[1, 4:9, 5:7] = 1
    losses = model.losses(image, ids, mask, target, LOSSES["ce"])
    assert list(losses) == ["seg", "no_target"]
    said = model.encode(image, ids, mask)[1].detach().double().numpy()
    log = said - np.log(np.exp(said).sum(1, keepdims=True))
    # Class 1, weight 1.1, is no target; the mean is weighted.
    expected = -(1.1 * log[0, 1] + 0.9 * log[1, 0] + 1.1 * log[2, 1]) / (1.1 + 0.9 + 1.1)
    assert losses["no_target"].item() == pytest.approx(0.1 * expected, rel=1e-5)
    sum(losses.values()).backward()
    assert model.no_target_head.weight.grad is not None


@pytest.mark.parametrize("loss", ["ce", "dice"])
@pytest.mark.parametrize("name", ["lavt", "crossvlt"])
def test_empty_masks_train_without_nan(build_nano: Build, name: str, loss: str) -> None:
    model = build_nano(name, swin_type="micro").train()
    image, ids, mask = inputs(2)
    target = torch.zeros(2, 56, 56, dtype=torch.long)
    losses = model.losses(image, ids, mask, target, LOSSES[loss])
    total = sum(losses.values())
    total.backward()
    assert all(value.isfinite() for value in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    if name == "lavt":
        assert losses.keys() == {"seg"}


def test_averaged_expressions_average_what_the_head_says() -> None:
    class Model(torch.nn.Module):
        def encode(self, said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return said, said

    recorder = HeadRecorder(Model())
    # 0.27 and 0.88 are above one half together; a tie is a target, as of argmax.
    for said in ([[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.1]]):
        recorder(torch.tensor(said))
    groups = [torch.zeros(2, 1), torch.zeros(1, 1), torch.zeros(1, 1)]
    assert recorder.of_samples(groups).tolist() == [True, False, True]
    assert recorder.said == []


def test_only_lavt_has_the_head(build_nano: Build) -> None:
    with pytest.raises(InputError, match=r"^--no_target_head: crossvlt has no such option$"):
        build_nano("crossvlt", no_target_head=True)


def test_every_parameter_of_the_head_is_trained(build_nano: Build) -> None:
    model = build_nano("lavt_one", no_target_head=True)
    groups = {g["name"]: g["param_names"] for g in optim.parameter_groups(model, 0.01)}
    assert {"no_target_head.weight", "no_target_head.bias"} <= set(groups["decoder"])


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["lavt", "lavt_one"])
def test_a_checkpoint_rebuilds_the_head(
    build_nano: Build, name: str, recorded: bool, tmp_path: Path
) -> None:
    model = build_nano(name, no_target_head=True, text_config=TINY_BERT)
    content: dict[str, Any] = dict(model.to_published())
    if recorded:
        content["args"] = {"model": name, "no_target_head": True}
    write_checkpoint(content, tmp_path / "a.pth")
    given = {"ck_bert": str(TINY_BERT), "bert_tokenizer": str(TINY_BERT)}
    trained = open_trained(tmp_path / "a.pth", given)
    assert trained.settings["no_target_head"] is True
    assert "no_target_head True" in trained.summary
    assert torch.equal(trained.model.no_target_head.weight, model.no_target_head.weight)
    plain = build_nano(name, text_config=TINY_BERT)
    write_checkpoint(dict(plain.to_published()), tmp_path / "b.pth")
    assert open_trained(tmp_path / "b.pth", given).settings["no_target_head"] is False


# The documentation


def test_documented_numbers_are_the_published_ones() -> None:
    text = (REPO / "docs/datasets.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for data, models in OTHER_MODELS.items():
        for name, values in models.items():
            (row,) = [
                row
                for row in rows
                if row[0] == name and len(set(row[1:]) - {"-"}) == len(set(values.values()))
            ]
            assert [float(cell) for cell in row[1:] if cell != "-"] == list(values.values()), data
    for name in ("grefcoco", "rrsisd", "refsegrs", "risbench", "refcoco-m"):
        for split, size in ((k, v) for s in COUNTS[name].values() for k, v in s.items()):
            for number in {size.refs, size.sentences, size.images} - {None}:
                assert f"{number:,}" in text, (name, split)
    for unverified in ("57.64", "16,870", "18,712", "14,933"):
        assert unverified not in text
