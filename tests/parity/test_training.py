"""Three training steps, parameter groups and learning rates beside the release's."""

from __future__ import annotations

import pytest
import torch

from lib.losses import cross_entropy
from lib.training import optim
from tests.conftest import Build
from tests.parity import checks, golden


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_three_steps(precision: str) -> None:
    run = checks.run_training(getattr(torch, precision))
    checks.require(checks.training_rows(run, precision))
    meta = golden.read_json("train_a.json")["meta"]
    assert run.learning_rates == meta["lr_used"]
    assert [k for k, v in run.gradient.items() if v is None] == meta["no_grad_at_all"]


def test_groups_and_learning_rates() -> None:
    checks.require(checks.group_rows())


def test_tiny_has_the_published_number_of_tensors() -> None:
    groups = optim.parameter_groups(checks.meta_model("lavt", "tiny", 7), 1e-2)
    assert [len(g["params"]) for g in groups] == [76, 157, 20, 160]


@pytest.mark.parametrize("name", ["lavt", "lavt_one"])
def test_only_lavt_one_trains_with_text_dropout(name: str, build_nano: Build) -> None:
    model = build_nano(name).train()
    with_dropout = name == "lavt_one"
    assert model.text_encoder.training is with_dropout
    assert model.backbone.training
    assert model.classifier.training
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        first, second = (model.encode_text(ids, torch.ones_like(ids)) for _ in range(2))
    assert torch.equal(first, second) is not with_dropout
    model.eval()
    assert not any(m.training for m in model.modules())


def test_asking_for_no_unused_gradients_changes_no_update(build_nano: Build) -> None:
    def train(freeze: bool) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = build_nano(drop_path=0.0).double()
        groups = optim.parameter_groups(model, 1e-2, lang_layers=1)
        if freeze:
            optim.freeze_unused(model, groups)
        optimizer = optim.build_optimizer(groups, 1e-3)
        image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        ids, target = torch.randint(1, 60, (2, 20)), torch.randint(0, 2, (2, 64, 64))
        model.train()
        for _ in range(2):
            loss = cross_entropy(model(image, ids, torch.ones_like(ids)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict(), sum(p.grad is not None for p in model.parameters())

    (free, many), (frozen, few) = train(False), train(True)
    assert few < many
    for name, value in free.items():
        torch.testing.assert_close(frozen[name], value, rtol=0, atol=1e-14)
