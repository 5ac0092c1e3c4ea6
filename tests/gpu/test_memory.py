"""Peak memory of a training step of the published network, with and without --grad_checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, speed

pytestmark = pytest.mark.gpu


def test_grad_checkpoint_takes_less(
    device: torch.device, dry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, window 12, 480 px, batch 8 (2 below 60 GB): a quarter less, for at most 1.6x time."""
    sizes = gpu.DRY if dry else gpu.FULL
    monkeypatch.setattr(speed, "BERT", sizes.bert)
    *_, case = next(gpu.cases(sizes, device))
    assert dry or (case.swin, case.window, case.side, case.batch) == ("base", 12, 480, 8)
    if not dry and torch.cuda.get_device_properties(device).total_memory < 60e9:
        case = replace(case, batch=2)
    plain, less = (
        gpu.time_steps(replace(case, grad_checkpoint=on), 0.5 * (not dry)) for on in (False, True)
    )
    for name, row in (("plain", plain), ("--grad_checkpoint", less)):
        print(f"{name}: {row['peak_memory_gb']:.2f} GB, {row['seconds']:.3f} s a step")
    if not dry:  # a process's memory does not shrink on the CPU
        assert less["peak_memory_gb"] < 0.75 * plain["peak_memory_gb"]
        assert less["seconds"] < 1.6 * plain["seconds"]
