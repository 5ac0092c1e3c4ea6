"""Runs with everything beyond the published recipes: resumed to the bit, evaluated, tracked."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import test as test_script
import train as train_script
import utils
from lib.training import trainer
from tests.cli.test_resume import assert_same, interrupt, lines, scalars, state
from tests.scripts import Shapes, jsonl, one_line_error

METHODS = shlex.split("""
    --loss ce:0.9,dice:0.1 --maskris --maskris_patch 16 --mosaic 0.5 --mosaic_directions
    --sched cosine --min_lr 1e-5 --warmup_steps 3 --backbone_lr_scale 0.1
    --norm_decay biases --model_ema --model_ema_decay 0.8 --clip_grad 1
""")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def options(shapes: Shapes) -> list[str]:
    small = ["--img_size", "32", "--ape", "8", "--epochs", "2"]
    return [*shapes.train_options, *small, "--print_freq", "3", "--drop_path", "0.2"]


@pytest.mark.parametrize("model", ["lavt_one", "crossvlt"])
def test_a_stopped_run_ends_with_the_same_bits(
    model: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, mosaics, schedule and both sets of weights; stopped within each epoch."""
    options = [*options, *METHODS, "--model", model]
    train_script.main([*options, "--model_id", "whole"])
    for at in (2, 5):
        with monkeypatch.context() as patch:
            interrupt(patch, at, signal.SIGTERM)
            with pytest.raises(utils.Stopped):
                train_script.main([*options, "--model_id", "parts", "--resume", "auto"])
    train_script.main([*options, "--model_id", "parts", "--resume", "auto"])
    assert_same(state("whole"), state("parts"))
    assert_same(state("whole", "best"), state("parts", "best"))
    assert lines("whole") == lines("parts")
    losses = [record["losses"] for record in lines("whole") if record["kind"] == "step"]
    aligned = [f"align_{i}" for i in range(1, 5)] if model == "crossvlt" else []
    assert all(list(each) == ["ce", "dice", *aligned, "distill"] for each in losses)


def test_the_average_is_evaluated_and_saved(
    options: list[str], shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``model`` is the average that the validation saw; training goes on from the raw weights."""
    seen: list[dict[str, Any]] = []
    real = trainer.evaluate

    def watched(model: Any, *others: Any) -> Any:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, *others)

    monkeypatch.setattr(trainer, "evaluate", watched)
    plain = [*options, "--model", "lavt_one", "--epochs", "1"]
    train_script.main([*plain, "--model_id", "plain"])
    train_script.main([*plain, "--model_id", "average", "--model_ema", "--model_ema_decay", "0.8"])
    without, with_average = state("plain"), state("average")
    assert_same(without["model"], with_average["raw_model"])
    assert_same(without["optimizer"], with_average["optimizer"])
    assert_same(dict(with_average["model"]), seen[1])
    different = [k for k, v in seen[1].items() if not torch.equal(v, without["model"][k])]
    assert any("running_mean" in k for k in different)
    assert any("word_embeddings" in k for k in different)
    best = "checkpoints/model_best_average.pth"
    where = [*shapes.options[:6], "--device", "cpu", "--split", "val", "--results", "r.json"]
    test_script.main([*where, "--resume", best])
    # Without the flag, a resumed run continues from the raw weights.
    goes_on = [*options, "--model", "lavt_one", "--model_id", "plain"]
    train_script.main([*goes_on, "--resume", "checkpoints/model_last_plain.pth"])
    train_script.main([*goes_on, "--resume", "checkpoints/model_last_average.pth"])
    assert "raw_model" not in state("plain")
    content = torch.load(best, weights_only=True)
    torch.save(content | {"raw_model": {"x": torch.zeros(1)}}, "damaged.pth")
    message = one_line_error(train_script.main, [*goes_on, "--resume", "damaged.pth"])
    assert "damaged.pth: its 'raw_model' is damaged" in message


def test_methods_that_are_new_within_an_epoch(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average may begin there; other parameter groups are refused, with the flag's name."""
    options = [*options, "--model", "lavt_one", "--epochs", "1", "--model_id", "a"]
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGTERM)
        with pytest.raises(utils.Stopped):
            train_script.main(options)
    options += ["--resume", "checkpoints/model_last_a.pth"]
    message = one_line_error(train_script.main, [*options, "--backbone_lr_scale", "0.1"])
    assert "resume with the flags" in message
    assert "--backbone_lr_scale" in message
    train_script.main([*options, "--model_ema", "--model_ema_decay", "0.5"])
    saved = state("a")
    assert any(not torch.equal(v, saved["raw_model"][k]) for k, v in saved["model"].items())


class FakeWandb(SimpleNamespace):
    """The functions of wandb that are used; remembers what they were given."""

    def __init__(self, fail: str = "") -> None:
        super().__init__(runs=[], logged=[], fail=fail)

    def init(self, **options: Any) -> FakeWandb:
        if self.fail:
            raise RuntimeError(self.fail)
        self.runs.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def Image(self, image: Any, caption: str) -> tuple[Any, str]:
        return image, caption


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeWandb]:
    def install(fail: str = "") -> FakeWandb:
        module = FakeWandb(fail)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def test_tracking(
    options: list[str], fake: Callable[..., FakeWandb], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id across resumes, the names of TensorBoard, and images of each validation."""
    wandb = fake()
    options = [*options, "--wandb", "shapes", "--tensorboard", "--backbone_lr_scale", "0.1"]
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGTERM)
        with pytest.raises(utils.Stopped):
            train_script.main(options)
    train_script.main([*options, "--resume", "auto"])
    first, second = wandb.runs
    assert first["id"] == second["id"]
    assert (first["project"], first["resume"], first["name"]) == ("shapes", "allow", "lavt")
    assert first["config"]["img_size"] == 32
    records = jsonl(Path("models/lavt/metrics.jsonl"))
    shown: dict[str, list[tuple[int, float]]] = {}
    images: list[tuple[int, Any]] = []
    for step, values in wandb.logged:
        for name, value in values.items():
            if name == "val/predictions":
                images.append((step, value))
            else:
                shown.setdefault(name, []).append((step, value))
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert shown["train/loss_dice"] == [(r["step"], r["losses"]["dice"]) for r in steps]
    assert shown["train/grad_norm"] == [(r["step"], r["grad_norm"]) for r in steps]
    assert shown["train/lr_decoder"] == [(r["step"], pytest.approx(r["lr"])) for r in steps]
    assert shown["train/lr_text"] == [(r["step"], pytest.approx(0.1 * r["lr"])) for r in steps]
    pace = [(r["step"], pytest.approx(4 / r["seconds_per_step"])) for r in steps]
    assert shown["train/images_per_second"] == pace
    assert shown["val/mIoU"] == [(r["step"], r["val"]["mIoU"]) for r in epochs]
    assert shown["val/P@0.5"] == [(r["step"], r["val"]["precision"]["0.5"]) for r in epochs]
    assert shown.keys() == scalars(Path("models/lavt/tensorboard")).keys()
    assert [step for step, _ in images] == [r["step"] for r in epochs]
    assert all(len(each) == 4 for _, each in images)
    image, caption = images[0][1][0]
    assert image.size == (64, 32)  # ground truth and prediction, side by side
    assert caption

    train_script.main([*options, "--epochs", "1"])  # a new run of the same name
    assert wandb.runs[-1]["id"] != first["id"]


def test_tracking_that_does_not_start(
    options: list[str], fake: Callable[..., FakeWandb], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("no API key\nat all")
    message = one_line_error(train_script.main, [*options, "--wandb"])
    assert message == "--wandb does not start (no API key at all): try WANDB_MODE=offline"
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = one_line_error(train_script.main, [*options, "--wandb"])
    assert message == "--wandb needs a package: pip install wandb"
