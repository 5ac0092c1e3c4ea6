"""The official release's numbers, computed on a GPU in float32 without TF32, and in float64.

Tolerances are those of tests/parity, with a margin of 64 instead of 16 for single-precision forward
passes: cuDNN may compute 3 x 3 convolutions by Winograd's method, which rounds several times more.
A rehearsal takes the smallest case of each kind.
"""

from __future__ import annotations

import pytest
import torch

from data.transforms import normalize
from lib.evaluation.metrics import intersection_union
from tests.parity import checks, golden, test_crossvlt
from tests.parity.test_preprocessing import every_value

pytestmark = pytest.mark.gpu
MARGIN = 64
SMALLEST = ("b", "tiny96")


def skip_large(case: str, dry: bool) -> None:
    if dry and case not in SMALLEST:
        pytest.skip("the rehearsal takes the smallest case")


@pytest.mark.parametrize("letter", checks.CASES)
def test_forward(letter: str, device: torch.device, dry: bool) -> None:
    skip_large(letter, dry)
    case = golden.cases()[letter]
    model = golden.build(case, accelerate=False).to(device)
    checks.require(checks.float32_rows(letter, checks.run_forward(model, case), MARGIN))
    checks.require(checks.float64_rows(letter, checks.run_forward(model.double(), case)))


@pytest.mark.parametrize("name", test_crossvlt.CASES)
def test_crossvlt_forward(name: str, device: torch.device, dry: bool) -> None:
    skip_large(name, dry)
    run = test_crossvlt.forward(name, device, MARGIN)
    for precision in test_crossvlt.PRECISIONS:
        test_crossvlt.test_logits(run, precision)
        for part in ("lang", "xproj", "stage", "next", "cls", "sim"):
            test_crossvlt.test_each_stage(run, part, precision)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_three_training_steps(precision: str, device: torch.device, dry: bool) -> None:
    if dry and precision == "float64":
        pytest.skip("the rehearsal takes one precision")
    run = checks.run_training(getattr(torch, precision), device=str(device))
    checks.require(checks.training_rows(run, precision))


def test_normalize_is_the_same(device: torch.device) -> None:
    assert torch.equal(normalize(every_value().to(device)).cpu(), normalize(every_value()))


def test_counts_are_the_same(device: torch.device) -> None:
    target, pred = checks.metric_masks()
    on_device = intersection_union(pred.to(device), target.to(device))
    for found, expected in zip(on_device, intersection_union(pred, target), strict=True):
        assert torch.equal(found.cpu(), expected)
