"""test.py's protocols and files, with a network of random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import test as test_script
from args import parse_test, protocol_of
from bert import encode, load_tokenizer
from data.transforms import as_tensor, normalize, resize_image
from lib.checkpoint import write_checkpoint
from lib.errors import InputError
from lib.evaluation.metrics import summarise
from lib.segmentation import build_model
from refer import REFER
from tests.by_hand import averaged, counts, resized
from tests.scripts import Shapes, one_line_error
from tools import score
from tools.report.records import read_records
from tools.trained import name_outputs, open_model

SPLITS = ("val", "testA")


@pytest.fixture(scope="module")
def checkpoint(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LAVT that was never trained, whose masks are neither empty nor full."""
    torch.manual_seed(0)
    bert = shapes.root / "bert"
    model = build_model("lavt", swin_type="micro", window_size=7, text_config=bert, ape_grid=14)
    model.eval()
    ids, mask = encode(load_tokenizer(bert), ["the red square"], 20)
    with torch.no_grad():
        for parameter in model.get_submodule("classifier").parameters():
            parameter.mul_(1.5)
        logits = model(torch.randn(1, 3, 56, 56), ids, mask)
        gap = (logits[:, 1] - logits[:, 0]).median()
        model.get_parameter("classifier.conv1_1.bias")[1] -= gap
    path = tmp_path_factory.mktemp("random") / "random.pth"
    write_checkpoint(dict(model.to_published()), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(shapes: Shapes, checkpoint: Path, *options: str) -> dict[str, Any]:
    argv = [*shapes.options, "--resume", str(checkpoint), "--split", ",".join(SPLITS)]
    test_script.main([*argv, "--results", "r.json", "--predictions", "p.jsonl", *options])
    return json.loads(Path("r.json").read_text())


PROTOCOLS = {
    "": "img_size=56",
    "--eval_mode cat --max_tokens 40": "eval_mode=cat img_size=56 max_tokens=40",
    "--eval_mode mean": "eval_mode=mean img_size=56",
    "--eval_mode mean --eval_size original": "eval_mode=mean eval_size=original img_size=56",
    "--text sent --mask_mode union": "text=sent mask_mode=union img_size=56",
    "--val_expressions one": "val_expressions=one img_size=56",
}


@pytest.mark.parametrize("options", PROTOCOLS)
def test_every_number_says_its_protocol_and_can_be_scored_again(
    options: str,
    shapes: Shapes,
    checkpoint: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    label = PROTOCOLS[options]
    content = evaluate(shapes, checkpoint, *options.split())
    printed = capsys.readouterr().out
    assert content["protocol"]["label"] == label
    assert content["protocol"]["standard"] is False
    texts = [printed, *(Path(f"r.{ending}").read_text() for ending in ("md", "csv", "tex"))]
    for text in texts:
        assert label in text.replace("\\_", "_")
        assert "NOT the standard protocol" in text or text is texts[2]  # a column of the CSV
    assert printed.count(f"NOT the standard protocol: {label}") == len(SPLITS) + 1
    samples = read_records("p.jsonl")
    assert {sample.protocol for sample in samples} == {label}
    refer = REFER(shapes.root, "refcoco", "unc")
    refs = {split: refer.loadRefs(refer.getRefIds(split=split)) for split in SPLITS}
    whole = {(s, r["ref_id"], tuple(r["sent_ids"])) for s in SPLITS for r in refs[s]}
    each = {(s, r["ref_id"], (i,)) for s in SPLITS for r in refs[s] for i in r["sent_ids"]}
    keys = {sample.key for sample in samples}
    if "one" in label:
        assert len(samples) == len(whole)
        assert keys < each
    else:
        assert keys == (whole if "eval_mode" in label else each)
        assert list(dict.fromkeys((s.split, s.ref_id) for s in samples)) == [
            (s, r["ref_id"]) for s in SPLITS for r in refs[s]
        ]
    score.main(["p.jsonl", "--json", "s.json"])
    assert json.loads(Path("s.json").read_text())["splits"] == content["splits"]


def test_averages_at_the_size_of_the_image_against_numpy(
    shapes: Shapes, checkpoint: Path, here: Path
) -> None:
    """From the model's logits on: each expression's are resized, made probabilities, averaged."""
    options = ("--eval_mode", "mean", "--eval_size", "original", "--text", "sent", "-b", "3")
    result = evaluate(shapes, checkpoint, *options, "--mask_mode", "union")["splits"]
    bert = shapes.root / "bert"
    model = build_model("lavt", swin_type="micro", window_size=7, text_config=bert, ape_grid=14)
    state = torch.load(checkpoint, weights_only=True)
    text = {f"text_encoder.{k}": v for k, v in state["bert_model"].items()}
    model.load_state_dict(state["model"] | text)
    model.eval()
    refer, tokenizer = REFER(shapes.root, "refcoco", "unc"), load_tokenizer(bert)
    samples = iter(read_records("p.jsonl"))
    for split in SPLITS:
        pairs = []
        for ref in refer.loadRefs(refer.getRefIds(split=split)):
            truth = refer.getMask(ref)["mask"] > 0
            image = normalize(as_tensor(resize_image(refer.open_image(ref["image_id"]), 56)))[None]
            sents = [sentence["sent"] for sentence in ref["sentences"]]
            with torch.inference_mode():
                logits = torch.cat(
                    [model(image, *encode(tokenizer, [s], 20)) for s in sents]
                ).numpy()
            probability = averaged(resized(logits.astype(np.float64), *truth.shape))
            sample = next(samples)
            mask = coco_mask.decode(sample.segmentation.as_coco) > 0
            clear = np.abs(probability - 0.5) > 1e-4  # elsewhere rounding may decide
            assert clear.mean() > 0.99
            np.testing.assert_array_equal(mask[clear], probability[clear] > 0.5)
            np.testing.assert_array_equal(coco_mask.decode(sample.truth.as_coco), truth)
            pairs.append(counts(mask, truth))
            assert sample.sentence == " | ".join(sents)
            assert (sample.intersection, sample.union) == pairs[-1]
            assert mask.any()
            assert sample.score == pytest.approx(probability[mask].mean(), abs=1e-5)
        expected = summarise(*np.array(pairs).T).as_dict()
        assert result[split]["all"].items() >= expected.items()
        assert expected["oIoU"] > 0
    assert next(samples, None) is None


def test_masks_of_a_record_are_those_of_the_image_size_protocol(
    shapes: Shapes, checkpoint: Path, here: Path
) -> None:
    at_original = evaluate(shapes, checkpoint, "--eval_size", "original")["splits"]
    masks = Path("p.jsonl").read_text().replace("eval_size=original ", "")
    at_model = evaluate(shapes, checkpoint)["splits"]
    assert at_model != at_original
    score.main(["p.jsonl", "--from_masks", "--json", "s.json"])
    content = json.loads(Path("s.json").read_text())
    assert content["splits"] == at_original
    assert content["protocol"] == "eval_size=original img_size=56"
    fields = ("segmentation", "truth", "score", "sentence")
    lines = [map(json.loads, text.splitlines()) for text in (masks, Path("p.jsonl").read_text())]
    for a, b in zip(*lines, strict=True):
        assert [a[f] for f in fields] == [b[f] for f in fields]


def test_default_places_tell_protocols_apart(checkpoint: Path, shapes: Shapes) -> None:
    base = ["--resume", str(checkpoint), "--split", "val,testA", "--model_id", "x"]
    base += ["--bert_tokenizer", str(shapes.root / "bert")]

    def named(*argv: str) -> argparse.Namespace:
        args = parse_test([*base, *argv])
        open_model(args, torch.device("cpu"))
        name_outputs(args)
        return args

    standard = named("--predictions")
    assert standard.results == "models/x/results_refcoco_unc_val_testA.json"
    assert standard.predictions == "models/x/predictions_refcoco_unc_val_testA.jsonl"
    assert protocol_of(standard).is_standard
    assert named().predictions is None
    other = named("--eval_mode", "cat", "--predictions", "--img_size", "448")
    assert other.results == "models/x/results_refcoco_unc_val_testA_eval_mode-cat.json"
    assert other.predictions == "models/x/predictions_refcoco_unc_val_testA_eval_mode-cat.jsonl"
    elsewhere = named("--results", "a/r.json", "--predictions")
    assert elsewhere.predictions == "a/predictions_refcoco_unc_val_testA.jsonl"


def test_results_say_with_what_they_were_made(shapes: Shapes, checkpoint: Path, here: Path) -> None:
    content = evaluate(shapes, checkpoint, "--seed", "5")
    made = content["environment"]
    assert (made["processes"], made["device"], content["seed"]) == (1, "cpu", 5)
    assert made["threads"] == torch.get_num_threads()
    packages = ("torch", "timm", "pycocotools", "pillow", "numpy", "transformers", "scipy")
    assert all(made[name] for name in packages)
    assert content["args"]["eval_mode"] == "each"
    assert content["protocol"]["max_tokens"] == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--eval_mode", "cat", "--val_expressions", "one"],
            ["--eval_mode cat", "give one"],
        ),
        (["--eval_mode", "both"], ["both", "mean"]),
        (["--eval_size", "480"], ["480", "original"]),
        (["--max_tokens", "0"], ["--max_tokens 0"]),
        (["--max_tokens", "65"], ["--max_tokens 65", "64 positions"]),
        (["--results", "r.md"], ["r.md", ".json"]),
        (["--results", "p.jsonl"], ["--predictions p.jsonl"]),
        (["--predictions", "file/p.jsonl"], ["file/p.jsonl"]),
        (["--results", "file/r.json"], ["file"]),
    ],
)
def test_bad_options(
    shapes: Shapes, checkpoint: Path, here: Path, options: list[str], words: list[str]
) -> None:
    (here / "file").write_text("not a folder")
    argv = [*shapes.options, "--resume", str(checkpoint), "--split", "val"]
    argv += ["--results", "r.json", "--predictions", "p.jsonl"]
    line = one_line_error(test_script.main, [*argv, *options])
    assert all(word in line for word in words), line
    assert [p.name for p in here.iterdir()] == ["file"]


def test_a_failed_run_leaves_no_predictions(
    shapes: Shapes, checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("an image is damaged")

    monkeypatch.setattr("data.dataset_refer_bert.ReferDataset.original_image", fail)
    with pytest.raises(InputError, match="damaged"):
        evaluate(shapes, checkpoint)
    assert list(here.iterdir()) == []
