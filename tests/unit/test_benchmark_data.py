"""The benchmark of starting and loading runs, and notices samples that are not the release's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import data as benchmark
from benchmarks import refcoco_size
from lib.errors import InputError
from refer import REFER
from tests.scripts import Shapes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Annotations like RefCOCO's, of a hundredth of the size."""
    sizes = {"train": (424, 1206, 170), "val": (38, 108, 15), "testA": (20, 57, 8)}
    monkeypatch.setattr(refcoco_size, "SPLITS", sizes)
    monkeypatch.setattr(refcoco_size, "ANNOTATIONS", 1967)
    refcoco_size.write(tmp_path)
    return tmp_path


def options(root: Path, bert: Path, *more: str) -> Any:
    where = ["--refer_data_root", str(root), "--bert_tokenizer", str(bert)]
    return benchmark.parse([*where, *more])


def test_made_up_annotations_have_the_sizes(small: Path) -> None:
    refer = REFER(small)
    for split, (objects, expressions, images) in refcoco_size.SPLITS.items():
        ids = refer.getRefIds(split=split)
        assert len(ids) == objects
        assert sum(len(ref["sentences"]) for ref in refer.loadRefs(ids)) == expressions
        assert len(refer.getImgIds(ref_ids=ids)) == images
    assert len(refer.Anns) == 1967


def test_parts(small: Path, shapes: Shapes) -> None:
    bert = shapes.root / "bert"
    run = benchmark.start(options(small, bert))
    assert run["wall"] > run["wall_load"] > 0
    few = ("--workers", "1", "--reads", "40")
    for part in ("arrays", "dicts"):
        used = benchmark.memory(options(small, bert, "--part", part, *few))
        assert used["reads"] == 40
        assert used["after_mb"] > used["worker_after_mb"] > 0


def test_samples_are_compared(shapes: Shapes) -> None:
    small = ("--img_size", "32", "--batch-size", "2", "--batches", "2", "--rounds", "1")
    result = benchmark.measure_samples(options(shapes.root, shapes.root / "bert", *small))
    for order in ("training", "evaluation"):
        assert result[order]["ratio"] > 0
    batch = {
        "image": torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        "target": torch.zeros(1, 2, 2, dtype=torch.uint8),
        "index": torch.tensor([7]),
    }
    same = {"image": benchmark.normalize(batch["image"]), "target": batch["target"].long()}
    benchmark.check_equal(batch, same)
    same["target"][0, 1, 1] = 1
    with pytest.raises(InputError, match=r"target of samples \[7\] is not the release's"):
        benchmark.check_equal(batch, same)


def test_the_documents_tables_are_those_of_the_results() -> None:
    root = Path(benchmark.__file__).parents[1]
    text = (root / "docs" / "data_speed.md").read_text(encoding="utf-8")
    named = re.findall(r"<!-- tables of (\S+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert named
    for path, tables in named:
        assert tables.strip() == benchmark.tables(json.loads((root / path).read_text()))
