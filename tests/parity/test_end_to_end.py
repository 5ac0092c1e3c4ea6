"""test.py over photos, with a checkpoint whose weights come from the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib.checkpoint import write_checkpoint
from lib.segmentation import build_model
from tests.parity import golden
from tests.refer_files import CC0_ROOT, REAL_ROOT, TINY_BERT
from tests.scripts import run, torchrun
from tools.score import score

OPTIONS = ["--swin_type", "tiny", "--img_size", "96", "--ck_bert", str(TINY_BERT)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAVT tiny with formula weights, in the published layout."""
    model = build_model("lavt", swin_type="tiny", window_size=7, text_config=TINY_BERT)
    golden.fill(model)
    with torch.no_grad():  # so that both classes occur
        model.get_parameter("classifier.conv1_1.bias").copy_(torch.tensor([0.0, -1.44]))
    path = tmp_path_factory.mktemp("formula") / "formula.pth"
    write_checkpoint(dict(model.to_published()), path)
    return path


with_coco = pytest.mark.skipif(not REAL_ROOT.is_dir(), reason="no refer_real")


@pytest.mark.parametrize(
    ("root", "split"),
    [(CC0_ROOT, "val"), pytest.param(REAL_ROOT, "testA", marks=with_coco)],
    ids=["public domain photos", "COCO photos"],
)
def test_same_numbers_however_it_is_run(
    root: Path, split: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Alone, in batches, by several processes, threads and workers: the same lines are printed.

    At equal batch size the pixel counts are, too; another batch size may flip near ties.
    """
    printed, counts = [], []
    # batch size, workers, processes, threads
    ways = [("1", "0", 1, 1), ("4", "0", 1, 1), ("4", "2", 1, 2)]
    ways += [("4", "0", 2, 1), ("4", "1", 3, 1)]
    for number, (batch, workers, processes, threads) in enumerate(ways):
        out = tmp_path / f"{number}.json"
        done = run(
            tmp_path,
            "test.py",
            *OPTIONS,
            *("--bert_tokenizer", str(TINY_BERT), "--refer_data_root", str(root)),
            *("--resume", str(checkpoint), "--split", split, "--ddp_trained_weights"),
            *("--batch-size", batch, "--workers", workers, "--device", "cpu"),
            *("--results", str(out)),
            launcher=torchrun(processes) if processes > 1 else (),
            threads=threads,
        )
        assert done.returncode == 0, done.stderr
        start = done.stdout.index("Final results:")
        printed.append(done.stdout[start : done.stdout.index("overall IoU")])
        counts.append(json.loads(out.read_text())["splits"])
    assert len(set(printed)) == 1
    assert counts[1] == counts[2] == counts[3] == counts[4]
    assert 0 < counts[0][split]["all"]["oIoU"] < 100


@pytest.mark.parametrize(
    ("root", "splits", "mode"),
    [(CC0_ROOT, "val", "cat"), pytest.param(REAL_ROOT, "val,testA,testB", "mean", marks=with_coco)],
    ids=["public domain photos", "COCO photos"],
)
def test_same_predictions_however_it_is_run(
    root: Path, splits: str, mode: str, checkpoint: Path, tmp_path: Path
) -> None:
    """At the photos' own size, by one process or two: the same file, which scores the same."""
    records = []
    for processes in (1, 2):
        done = run(
            tmp_path,
            "test.py",
            *OPTIONS,
            *("--bert_tokenizer", str(TINY_BERT), "--refer_data_root", str(root)),
            *("--resume", str(checkpoint), "--split", splits, "--device", "cpu"),
            *("--batch-size", "2", "--workers", "0", "--eval_mode", mode),
            *("--eval_size", "original", "--results", f"{processes}.json"),
            *("--predictions", f"{processes}.jsonl"),
            launcher=torchrun(processes) if processes > 1 else (),
        )
        assert done.returncode == 0, done.stderr
        records.append((tmp_path / f"{processes}.jsonl").read_bytes())
    assert records[0] == records[1]
    found = json.loads((tmp_path / "1.json").read_text())["splits"]
    assert list(found) == splits.split(",")
    assert all(0 < rows["all"]["oIoU"] < 100 for rows in found.values())
    for from_masks in (False, True):
        scored = score(tmp_path / "1.jsonl", from_masks).entries
        assert {entry.split: entry.summary.as_dict() for entry in scored} == found
