"""The forward pass beside the release's, case by case."""

from __future__ import annotations

import pytest
import torch

from tests.parity import checks, golden


def test_the_weight_formula_is_the_measured_one() -> None:
    checks.require(checks.formula_rows())


@pytest.mark.parametrize("letter", checks.CASES)
def test_single_precision(letter: str) -> None:
    checks.require(checks.input_rows(letter))
    checks.require(checks.float32_rows(letter, checks.outputs(letter, torch.float32)))


@pytest.mark.parametrize("letter", checks.CASES)
def test_double_precision(letter: str) -> None:
    checks.require(checks.float64_rows(letter, checks.outputs(letter, torch.float64)))


@pytest.mark.parametrize("letter", checks.CASES)
def test_parameter_counts(letter: str) -> None:
    case = golden.cases()[letter]
    model = checks.meta_model(case["model"], case["swin"], case["window"])
    text = sum(p.numel() for p in model.text_encoder.parameters())
    rest = sum(p.numel() for p in model.parameters()) - text
    published = rest + text if case["model"] == "lavt_one" else rest
    assert (published, text) == (case["params_model"], case["params_bert"])
