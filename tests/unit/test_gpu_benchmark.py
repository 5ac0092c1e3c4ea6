"""The benchmarks of a GPU and of scale, rehearsed, and the tables that they write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, scale, speed
from benchmarks.pages import put_between
from lib.errors import InputError
from lib.swin import SWIN_SIZES, SwinSize
from refer.refer import REFER
from tests.scripts import Shapes

DOCS = Path(__file__).parents[2] / "docs"
CPU = torch.device("cpu")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> gpu.Sizes:
    """One batch size, and no compiling, which takes a minute."""
    monkeypatch.setattr(gpu.speed.runtime, "compile_module", lambda module: None)
    monkeypatch.setattr(speed, "BERT", gpu.DRY.bert)
    monkeypatch.setattr(gpu, "matmul_rates", lambda device: dict.fromkeys(gpu.KINDS, 1e9))
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(8, (1, 1, 1, 1), (1, 2, 4, 8)))
    return replace(gpu.DRY, swin="nano", side=32, batches=(1,))


def test_rows(sizes: gpu.Sizes) -> None:
    rows = list(gpu.train_rows(sizes, CPU, gpu.Budget(10)))
    assert [row["way"] for row in rows] == list(gpu.WAYS)
    for row in rows:
        assert "error" not in row
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
        share = row["gflop"] / row["seconds"]
        assert row["share_of_matmul"] == pytest.approx(share)


def test_rows_that_fail_or_come_too_late_are_named(
    sizes: gpu.Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(case: speed.Case, seconds: float) -> None:
        if case.amp == "off":
            raise torch.OutOfMemoryError("much text")
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(gpu, "time_steps", full)
    rows = list(gpu.train_rows(sizes, CPU, gpu.Budget(10)))
    assert {row["error"] for row in rows} == {"out of memory", "RuntimeError: no kernel"}
    record = {"rows": rows, "skipped": []}
    with pytest.raises(InputError, match="out of memory"):
        gpu.rehearsed(record)
    late = gpu.Budget(0.001)
    assert list(gpu.train_rows(sizes, CPU, late)) == []
    assert late.skipped[0] == "training, float32, batch 1"
    assert len(late.skipped) == len(gpu.WAYS)


def record() -> dict[str, object]:
    row = {"way": "bf16", "batch": 8, "gflop": 9520.0, "seconds": 0.1, "images_per_second": 80.0}
    row |= {"peak_memory_gb": 20.0, "start_seconds": 3.0, "share_of_matmul": 0.5, "mfu": 0.1}
    late = {"way": "float32", "batch": 32, "gflop": 38080.0, "error": "out of memory"}
    return {
        "rows": [row, late],
        "skipped": ["evaluation"],
        "level": "hard",
        "seconds": 300.0,
        "gflop_per_image": 1190.0,
        "sizes": {"swin": "base", "window": 12, "side": 480},
        "machine": {"cpu": "a CPU"},
        "environment": {"gpu": "A GPU", "torch": "2.15"},
        "learning": {"curve": [{"seconds": 20.0, "mIoU": 41.0, "loss": 0.3}], "flags": ["--fast"]},
    }


def test_tables() -> None:
    text = gpu.tables(json.loads(json.dumps(record())))
    assert "| bf16 | 8 | 80.0 | 0.100 | 10% | 50% | 20.00 GB | 3 s |" in text
    assert "| float32 | 32 | out of memory |" in text
    assert "| 20 | 41.0 | 0.300 |" in text
    assert "Not measured, the time was up: evaluation." in text


def test_the_page_has_the_marks(tmp_path: Path) -> None:
    copy = tmp_path / "speed.md"
    copy.write_text(gpu.PAGE.read_text())
    put_between(copy, gpu.MARKS, gpu.tables(json.loads(json.dumps(record()))))
    assert "| bf16 | 8 |" in copy.read_text()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--dry-run"):
        gpu.main([])
    with pytest.raises(InputError, match="--minutes"):
        gpu.main(["--minutes", "0"])


def test_peaks_are_found_by_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe"}
    names |= {"NVIDIA A100-SXM4-80GB": "A100", "NVIDIA L40S": "L40S"}
    for name, key in names.items():
        assert gpu.peaks_of(name) == gpu.PEAKS[key]
    assert gpu.peaks_of("a new one") is None


def test_loader_rates(shapes: Shapes) -> None:
    result = scale.loader_rates(shapes.root, 32, 4, (1,), 2)
    (row,) = result["rows"]
    assert row["images_per_second"] > 0
    assert row["images_per_cpu_second"] > 0
    assert "| 1 | " in scale.loader_table(result)


def test_repeated_arrays_are_the_same_references_again(shapes: Shapes) -> None:
    once = REFER(str(shapes.root)).arrays
    twice = scale.repeated(once, 2)
    number = len(once.ref_id)
    assert len(twice.ref_id) == 2 * number
    assert [*twice.raw] == [*once.raw] * 2
    for row in (0, len(once.ann_id) - 1):
        again = twice.segmentation(row + len(once.ann_id))
        for a, b in zip(once.segmentation(row), again, strict=True):
            assert np.array_equal(a, b)
    size = scale.size_of(once), scale.size_of(twice)
    assert size[1] == pytest.approx(2 * size[0], rel=0.02)


def test_gradients_are_those_of_the_trained_parameters() -> None:
    assert scale.gradients()["lavt"] == 4 * 187_629_434


def test_the_page_of_scale_shows_the_committed_results() -> None:
    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    files = sorted(scale.RESULTS.glob("scale_*.json"))
    assert files
    for file in files:
        assert scale.tables(json.loads(file.read_text())) in text, f"run --report {file}"
