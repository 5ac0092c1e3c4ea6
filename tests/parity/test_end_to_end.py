"""test.py over real images, with a checkpoint whose weights come from the formula."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bert import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.transforms import normalize
from lib.checkpoint import write_checkpoint
from lib.model import Segmenter
from lib.segmentation import build_model
from refer.refer import REFER
from tests.parity import golden
from tests.parity.checks import float32_tolerance
from tests.refer_files import CC0_ROOT, REAL_ROOT, TINY_BERT
from tests.scripts import run, torchrun
from tools.score import score

IMG_SIZE = 96
OPTIONS = ["--swin_type", "tiny", "--img_size", str(IMG_SIZE), "--ck_bert", str(TINY_BERT)]


def formula_model() -> Segmenter:
    """LAVT tiny with formula weights, and a head whose masks hold both classes."""
    model = build_model("lavt", swin_type="tiny", window_size=7, text_config=TINY_BERT)
    golden.fill(model)
    with torch.no_grad():
        model.get_parameter("classifier.conv1_1.bias").copy_(torch.tensor([0.0, -1.44]))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The formula model in the published layout."""
    path = tmp_path_factory.mktemp("formula") / "formula.pth"
    write_checkpoint(dict(formula_model().to_published()), path)
    return path


with_coco = pytest.mark.skipif(not REAL_ROOT.is_dir(), reason="no refer_real")


each_root = pytest.mark.parametrize(
    ("root", "split"),
    [(CC0_ROOT, "val"), pytest.param(REAL_ROOT, "testA", marks=with_coco)],
    ids=["public domain images", "COCO images"],
)


@each_root
def test_same_numbers_for_any_batch_size_and_number_of_processes(
    root: Path, split: str, checkpoint: Path, tmp_path: Path
) -> None:
    """The same pixel counts and printed lines; each process has one thread."""
    printed, counts = [], []
    ways = [(1, 0, 1), (2, 1, 2), (3, 0, 3)]  # batch size, workers, processes
    for number, (batch, workers, processes) in enumerate(ways):
        out = tmp_path / f"{number}.json"
        done = run(
            tmp_path,
            "test.py",
            *OPTIONS,
            *("--bert_tokenizer", str(TINY_BERT), "--refer_data_root", str(root)),
            *("--resume", str(checkpoint), "--split", split, "--ddp_trained_weights"),
            *("--batch-size", str(batch), "--workers", str(workers), "--device", "cpu"),
            *("--results", str(out)),
            launcher=torchrun(processes) if processes > 1 else (),
        )
        assert done.returncode == 0, done.stderr
        start = done.stdout.index("Final results:")
        printed.append(done.stdout[start : done.stdout.index("overall IoU")])
        counts.append(json.loads(out.read_text())["splits"])
    assert len(set(printed)) == 1
    assert counts[0] == counts[1] == counts[2]
    assert 0 < counts[0][split]["all"]["oIoU"] < 100


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each_root
@torch.inference_mode()
def test_another_number_of_threads_changes_near_ties_only(root: Path, split: str) -> None:
    """Where the masks differ, the classes' logits are closer than rounding can move them."""
    model = formula_model().eval()
    exact_model = copy.deepcopy(model).double()
    tokenizer = load_tokenizer(TINY_BERT)
    dataset = ReferDataset(REFER(str(root), "refcoco", "unc"), split, tokenizer, IMG_SIZE)
    for sample in (dataset[i] for i in range(min(len(dataset), 8))):
        image = normalize(sample["image"][None])
        words = sample["input_ids"][None], sample["attention_mask"][None]
        exact = exact_model(image.double(), *words)
        logits = []
        for number in (1, 2):
            with threads(number):
                logits.append(model(image, *words))
        rounding = (logits[0].double() - exact).abs().max().item()
        near_tie = 2 * float32_tolerance(rounding)  # two logits differ
        margin = (exact[:, 1] - exact[:, 0]).abs()
        one, two = (x[:, 1] > x[:, 0] for x in logits)
        assert (margin < near_tie).float().mean() < 0.01
        assert (margin[one != two] < near_tie).all()


@pytest.mark.parametrize(
    ("root", "splits", "mode"),
    [(CC0_ROOT, "val", "cat"), pytest.param(REAL_ROOT, "val,testA,testB", "mean", marks=with_coco)],
    ids=["public domain images", "COCO images"],
)
def test_same_predictions_for_any_number_of_processes(
    root: Path, splits: str, mode: str, checkpoint: Path, tmp_path: Path
) -> None:
    """At the images' original size: the same file, which scores the same."""
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
    results = json.loads((tmp_path / "1.json").read_text())["splits"]
    assert list(results) == splits.split(",")
    assert all(0 < rows["all"]["oIoU"] < 100 for rows in results.values())
    for from_masks in (False, True):
        scored = score(tmp_path / "1.jsonl", from_masks).entries
        assert {entry.split: entry.summary.as_dict() for entry in scored} == results
