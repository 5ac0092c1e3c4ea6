"""Two processes count samples with and without target exactly as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib.checkpoint import write_checkpoint
from lib.segmentation import build_model
from tests.many_targets import write_grefcoco
from tests.scripts import Shapes, run, torchrun


@pytest.mark.parametrize("flags", [[], ["--no_target_pixels", "900"]], ids=["head", "pixels"])
def test_metrics_of_two_processes(flags: list[str], shapes: Shapes, tmp_path: Path) -> None:
    """Seven samples in batches of two do not divide evenly."""
    write_grefcoco(tmp_path / "data")
    torch.manual_seed(0)
    bert = shapes.root / "bert"
    options = {"swin_type": "micro", "window_size": 7, "ape_grid": 14, "no_target_head": True}
    model = build_model("lavt", text_config=bert, accelerate=False, **options)  # type: ignore[arg-type]
    write_checkpoint(dict(model.to_published()), tmp_path / "a.pth")
    words = [*shapes.options, "--refer_data_root", str(tmp_path / "data"), "--dataset", "grefcoco"]
    words += ["--resume", "a.pth", "--split", "val", "-b", "2", *flags]
    found = []
    for world in (1, 2):
        out = ["--results", f"{world}.json", "--predictions", f"{world}.jsonl"]
        done = run(tmp_path, "test.py", *words, *out, launcher=torchrun(world) if world > 1 else ())
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / f"{world}.json").read_text())
        found.append((content["splits"], (tmp_path / f"{world}.jsonl").read_text()))
    assert found[0] == found[1]
    assert found[0][0]["val"]["all"]["samples"] == 7
