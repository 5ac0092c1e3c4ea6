"""Checkpoints of an earlier version of this project load, resume and give the same numbers."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

import test as test_script
import train as train_script
from args import dataset_options, parse_test, refer_options
from data.dataset_refer_bert import ReferDataset
from data.transforms import normalize
from lib.swin import SWIN_SIZES, SwinSize
from refer import REFER
from tests.refer_files import CC0_ROOT, FIXTURES, TINY_BERT
from tests.scripts import jsonl
from tools.trained import open_model

CHECKPOINTS = FIXTURES / "checkpoints"
EXPECTED: dict[str, dict[str, Any]] = json.loads((CHECKPOINTS / "expected.json").read_text())
PIXELS = 3  # of a split that may differ: near ties of the logits, on another CPU


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(8, (2, 2, 2, 2), (1, 2, 4, 8)))
    monkeypatch.setitem(SWIN_SIZES, "thin", SwinSize(32, (1, 1, 1, 1), (1, 1, 1, 1)))


def unpack(model: str) -> str:
    path = Path(f"{model}.pth")
    path.write_bytes(lzma.decompress((CHECKPOINTS / f"{model}.pth.xz").read_bytes()))
    return str(path)


def options(model: str) -> list[str]:
    data = ["--refer_data_root", str(CC0_ROOT), "--ck_bert", str(TINY_BERT)]
    size = ["--swin_type", EXPECTED[model]["swin"], "--img_size", "56", "--workers", "0"]
    common = ["--model", model, "--device", "cpu", "--bert_tokenizer", str(TINY_BERT)]
    return [*common, *data, *size, "--data_cache", "off"]


@pytest.mark.parametrize("model", EXPECTED)
def test_tests_with_the_same_numbers(model: str) -> None:
    argv = [*options(model), "--resume", unpack(model), "--split", "val,testA"]
    test_script.main([*argv, "--batch-size", "2", "--results", "r.json"])
    splits = json.loads(Path("r.json").read_text())["splits"]
    for split, expected in EXPECTED[model]["splits"].items():
        row = splits[split]["all"]
        assert row["samples"] == expected["samples"]
        for name in ("intersection", "union"):
            assert abs(row[name] - expected[name]) <= PIXELS
        for name in ("mIoU", "oIoU"):
            assert row[name] == pytest.approx(expected[name], abs=0.1)

    args = parse_test([*argv[:-1], "val"])
    trained = open_model(args, torch.device("cpu"))
    network, refer = trained.model, REFER(**refer_options(args))
    data = ReferDataset(refer, "val", trained.tokenizer, **dataset_options(args))
    with torch.no_grad():
        logits = [
            network(
                normalize(sample["image"][None]),
                sample["input_ids"][None],
                sample["attention_mask"][None],
            )
            for sample in (data[i] for i in range(len(data)))
        ]
    measured = torch.cat(logits)[:, :, ::7, ::7].flatten()
    torch.testing.assert_close(
        measured, torch.tensor(EXPECTED[model]["logits"]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("model", EXPECTED)
def test_resumes_with_the_same_numbers(model: str) -> None:
    expected = EXPECTED[model]
    argv = [*options(model), *expected["options"], "--fused_adamw", "on"]
    train_script.main([*argv, "--resume", unpack(model)])
    lines = jsonl(Path("models") / model / "metrics.jsonl")
    start = len(expected["lines"]) - len(lines)  # the first run wrote the lines before
    assert start >= 0
    for line, old in zip(lines, expected["lines"][start:], strict=True):
        assert [line[k] for k in ("kind", "epoch", "step")] == [
            old[k] for k in ("kind", "epoch", "step")
        ]
        assert line["loss"] == pytest.approx(old["loss"], rel=2e-3)
        assert "lr" not in old or line["lr"] == pytest.approx(old["lr"], rel=1e-9)
        assert "grad_norm" not in old or line["grad_norm"] == pytest.approx(
            old["grad_norm"], rel=2e-2
        )
        if "val_oIoU" in old:
            assert line["val"]["oIoU"] == pytest.approx(old["val_oIoU"], abs=0.5)


def test_a_new_checkpoint_has_the_entries_that_older_versions_read() -> None:
    argv = [*options("lavt"), *EXPECTED["lavt"]["options"], "--model_id", "new"]
    train_script.main([*argv, "--stop_after", "1"])
    content = torch.load("checkpoints/model_last_new.pth", weights_only=True)
    old = torch.load(unpack("lavt"), weights_only=True)
    assert content.keys() >= old.keys()
    assert content["epoch"] == 0  # of the last finished epoch, as published
    assert content["progress"].keys() >= old["progress"].keys()
    assert [len(entry) for entry in content["progress"]["recent"]] == []
    for part in ("model", "bert_model"):
        assert list(content[part]) == list(old[part])
    for entry in ("optimizer", "lr_scheduler"):
        assert content[entry].keys() == old[entry].keys()
    mine, theirs = content["optimizer"]["param_groups"], old["optimizer"]["param_groups"]
    assert [(g["name"], len(g["params"])) for g in mine] == [
        (g["name"], len(g["params"])) for g in theirs
    ]
