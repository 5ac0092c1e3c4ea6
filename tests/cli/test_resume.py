"""Stopping and going on: what a run ends with does not depend on its interruptions."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train as train_script
import utils
from args import parse_train
from lib.errors import InputError
from lib.losses import LOSSES
from lib.training import trainer
from tests.scripts import REPO, Shapes, environment, jsonl, one_line_error

TIMES = ("seconds", "seconds_per_step", "peak_memory_gb")


@dataclass(frozen=True)
class Ended:
    """What a run that nothing interrupted left."""

    last: dict[str, Any]
    best: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        return self.last["progress"]["steps"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def options(shapes: Shapes) -> list[str]:
    """Two epochs of a few steps; log lines every third, so that most stops are between two."""
    return [*shapes.train_options, "--epochs", "2", "--print-freq", "3", "--drop_path", "0.2"]


@pytest.fixture(scope="module")
def uninterrupted(
    options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Ended]:
    """The run of a model from beginning to end, made once."""

    @cache
    def train(model: str) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(model))
            train_script.main([*options, "--model", model, "--model_id", "whole"])
            return Ended(state("whole"), state("whole", "best"), lines("whole"))

    return train


@pytest.fixture
def whole(uninterrupted: Callable[[str], Ended]) -> Ended:
    return uninterrupted("lavt")


def lines(model_id: str) -> list[dict[str, Any]]:
    """The metrics of a run, without what a clock measured."""
    records = jsonl(Path("models") / model_id / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def state(model_id: str, which: str = "last") -> dict[str, Any]:
    path = Path("checkpoints") / f"model_{which}_{model_id}.pth"
    content = torch.load(path, weights_only=True)
    return {k: v for k, v in content.items() if k != "args"}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, whatever it holds."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
    """Send this process a signal after so many steps."""
    real, steps = trainer.Trainer.save_if_due, 0

    def count_steps(self: trainer.Trainer) -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), number)
        real(self)

    monkeypatch.setattr(trainer.Trainer, "save_if_due", count_steps)


@pytest.mark.parametrize(
    ("model", "at", "number"),
    [
        ("lavt", 1, signal.SIGTERM),
        ("lavt", 5, signal.SIGUSR1),
        ("lavt_one", 8, signal.SIGINT),
        ("crossvlt", 7, signal.SIGTERM),
        ("lavt", 2, signal.SIGHUP),
    ],
)
def test_stopped_by_a_signal_and_resumed(
    model: str,
    at: int,
    number: int,
    options: list[str],
    uninterrupted: Callable[[str], Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted(model)
    options = [*options, "--model", model]
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        interrupt(patch, at, number)
        with pytest.raises(utils.Stopped, match=f"{signal.Signals(number).name}.*saved: "):
            train_script.main([*options, "--model_id", "parts"])
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert state("parts")["progress"]["step"] == (at - 1) % whole.steps + 1
    train_script.main([*options, "--model_id", "parts", "--resume", "auto"])
    assert_same(whole.last, state("parts"))
    assert_same(whole.best, state("parts", "best"))
    assert whole.lines == lines("parts")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_while_it_validates(
    number: int, options: list[str], whole: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained epoch is kept; only the validation is made again."""
    real = trainer.evaluate

    def count(*args: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", count)
        with pytest.raises(utils.Stopped, match="in validation; saved"):
            train_script.main([*options, "--model_id", "parts"])
    saved = state("parts")
    assert (saved["epoch"], saved["progress"]["step"]) == (-1, saved["progress"]["steps"])
    assert not any(r["kind"] == "epoch" for r in lines("parts"))
    train_script.main([*options, "--model_id", "parts", "--resume", "auto"])
    assert_same(whole.last, state("parts"))
    assert whole.lines == lines("parts")


def test_saving_on_the_way_changes_nothing(
    options: list[str], whole: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    real = trainer.StateFiles.save

    def watched(self: Any, content: dict[str, Any], **best: bool) -> None:
        saves.append((content["epoch"], content["progress"]["step"]))
        real(self, content, **best)

    monkeypatch.setattr(trainer.StateFiles, "save", watched)
    train_script.main([*options, "--model_id", "often", "--save-every", "2"])
    on_the_way = list(range(2, whole.steps + 1, 2))
    expected = [(e, s) for e in (-1, 0) for s in (*on_the_way, 0)]
    assert saves == [(e + 1, 0) if s == 0 else (e, s) for e, s in expected]
    assert_same(whole.last, state("often"))
    saves.clear()
    ticks = iter(range(0, 10_000_000, 25))  # every look at the clock is 25 seconds later
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(ticks))
    train_script.main([*options, "--model_id", "minutes", "--save-every", "1m"])
    assert 2 < len(saves) < 2 * whole.steps
    assert_same(whole.last, state("minutes"))


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_exit_code_of_a_stopped_run(options: list[str]) -> None:
    """With workers, and the signal sent to all of the job's processes, as schedulers do."""
    process = subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *options, "--workers", "2", "--epochs", "50"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = Path("models/lavt/log.txt")
    wait_for(lambda: log.is_file() and "epoch 0 step 3" in log.read_text())
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == utils.REQUEUE == 75
    told = [line for line in err.splitlines() if "SIGTERM" in line]
    assert told[0] == "SIGTERM: stopping after this step"
    assert told[-1].endswith("saved: checkpoints/model_last_lavt.pth; exit code 75")
    assert "Traceback" not in err
    wait_for(lambda: not group_alive(process.pid), 30)  # no worker stays behind


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_auto_starts_fresh_and_ends_at_once(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*options, "--epochs", "1"]
    train_script.main([*options, "--resume", "auto"])
    assert "starting fresh" in capsys.readouterr().out
    before = Path("checkpoints/model_last_lavt.pth").stat().st_mtime_ns
    train_script.main([*options, "--resume", "auto"])
    out = capsys.readouterr().out
    assert "checkpoints/model_last_lavt.pth: epoch 1 of 1: nothing left; --epochs N" in out
    assert "step" not in out
    assert Path("checkpoints/model_last_lavt.pth").stat().st_mtime_ns == before
    assert len(lines("lavt")) == len([r for r in lines("lavt") if r["epoch"] == 0])


def test_auto_passes_over_a_damaged_state(
    options: list[str], whole: Ended, capsys: pytest.CaptureFixture[str]
) -> None:
    train_script.main([*options, "--model_id", "parts", "--stop_after", "1", "--save-every", "4"])
    last = Path("checkpoints/model_last_parts.pth")
    raw = last.read_bytes()
    last.unlink()
    last.write_bytes(raw[:-5000])
    capsys.readouterr()
    train_script.main([*options, "--model_id", "parts", "--resume", "auto"])
    out = capsys.readouterr().out
    assert "not resumed: checkpoints/model_last_parts.pth is damaged" in out
    assert "resuming checkpoints/model_previous_parts.pth" in out
    assert_same(whole.last, state("parts"))
    assert whole.lines == lines("parts")


def test_a_fresh_run_renames_the_older_files(options: list[str]) -> None:
    options = [*options, "--epochs", "1"]
    train_script.main(options)
    first = state("lavt")
    train_script.main([*options, "--seed", "5"])
    kept = torch.load("checkpoints/model_last_lavt.1.pth", weights_only=True)
    assert_same(first["model"], kept["model"])
    assert Path("checkpoints/model_best_lavt.1.pth").is_file()
    assert Path("models/lavt/metrics.1.jsonl").is_file()
    assert state("lavt")["lr_scheduler"] == first["lr_scheduler"]


def test_within_an_epoch_the_division_must_stay(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGTERM)
        with pytest.raises(utils.Stopped):
            train_script.main(options)
    for changed in (["--batch-size", "2"], ["--batch-size", "2", "--accumulate", "2"]):
        message = one_line_error(train_script.main, [*options, "--resume", "auto", *changed])
        assert "batch_size 4 -> 2" in message
        assert "give the same processes, --batch_size" in message


def test_a_failed_validation_loses_no_epoch(
    options: list[str], whole: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*args: Any) -> Any:
        raise InputError("image x.jpg cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", unreadable)
        argv = [*options, "--model_id", "parts"]
        assert one_line_error(train_script.main, argv) == "image x.jpg cannot be read"
    assert state("parts")["progress"]["step"] == whole.steps
    train_script.main([*argv, "--resume", "auto"])
    assert_same(whole.last, state("parts"))
    assert whole.lines == lines("parts")


def test_other_options_are_told(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train_script.main([*options, "--stop_after", "1"])
    argv = [*options, "--resume", "auto", "--seed", "3", "--print-freq", "7", "--lr", "0.5"]
    train_script.main(argv)
    out = capsys.readouterr().out
    assert "--seed 3: the checkpoint was trained with 0" in out
    assert "--lr 0.5 is not used when resuming: the checkpoint's" in out
    assert "print_freq" not in out


@pytest.mark.parametrize("where", ["weights", "metrics"])
def test_a_disk_that_cannot_be_written_to(
    where: str, options: list[str], whole: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop, or go on and try again; the last good file stays either way."""
    full = True
    name, real = ("model_last", os.replace) if where == "weights" else ("metrics.jsonl", open)

    def fail(*args: Any, **kwargs: Any) -> Any:
        path = args[1] if where == "weights" else args[0]
        if full and name in str(path):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    argv = [*options, "--model_id", "other"]
    train_script.main([*argv, "--stop_after", "1"])
    good = state("other")
    target = (os, "replace") if where == "weights" else (utils, "open")
    monkeypatch.setattr(*target, fail, raising=False)
    resumed = [*argv, "--resume", "auto"]
    message = one_line_error(train_script.main, resumed)
    assert "No space left on device" in message
    assert "free some space" in message
    assert_same(good, state("other"))
    if where == "weights":
        ended = one_line_error(train_script.main, [*resumed, "--save_error", "continue"])
        assert "trained to the end, but the newest state is not saved" in ended
        assert_same(good, state("other"))
        real_save, tries = trainer.StateFiles.save, 0

        def second_try(self: Any, content: Any, **best: bool) -> None:
            nonlocal full, tries
            tries += 1
            full = tries == 1
            real_save(self, content, **best)

        monkeypatch.setattr(trainer.StateFiles, "save", second_try)
        saving = ["--save_error", "continue", "--save-every", "2"]
        train_script.main([*resumed, *saving])
        assert_same(whole.last, state("other"))


@pytest.fixture
def bad_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the loss of one step a NaN."""

    def plant(step: int) -> None:
        real, steps = LOSSES["dice"], 0

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            nonlocal steps
            steps += 1
            return real(logits, target) * (math.nan if steps == step else 1.0)

        monkeypatch.setitem(LOSSES, "dice", loss)

    return plant


def test_numbers_gone_wrong_stop_the_run(
    options: list[str], bad_loss: Callable[[int], None], shapes: Shapes
) -> None:
    bad_loss(4)
    message = one_line_error(train_script.main, [*options, "--save-every", "3"])
    assert "loss nan" in message
    assert "at epoch 0 step 4/" in message
    assert message.count("ref ") == 4
    assert message.count(".jpg") + message.count(".png") == 4
    assert "--nonfinite skip" in message
    saved = torch.load("checkpoints/model_nonfinite_lavt.pth", weights_only=True)
    assert saved["nonfinite"]["step"] == 4
    assert len(saved["nonfinite"]["samples"]) == 4
    weights = {k: v for k, v in state("lavt")["model"].items() if "bn" not in k}
    for name, value in weights.items():
        assert torch.equal(value, saved["model"][name]), name


def test_numbers_gone_wrong_are_skipped(
    options: list[str], bad_loss: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    bad_loss(4)
    train_script.main([*options, "--nonfinite", "skip"])
    out = capsys.readouterr().out
    assert out.count("step skipped: loss nan") == 1
    steps = [r for r in lines("lavt") if r["kind"] == "step"]
    assert [r.get("skipped") for r in steps][:2] == [None, 1]
    assert all(math.isfinite(r["loss"]) for r in lines("lavt"))
    for name, value in state("lavt")["model"].items():
        assert torch.isfinite(value).all(), name


def test_skipping_needs_no_room_on_the_disk(
    options: list[str],
    bad_loss: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file for inspection is missing then, and the message says so."""

    def fail(content: dict[str, Any], path: Path) -> None:
        raise InputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(trainer.checkpoint, "write_checkpoint", fail)
    bad_loss(4)
    train_script.main([*options, "--nonfinite", "skip", "--stop_after", "1"])
    [line] = [x for x in capsys.readouterr().out.splitlines() if "step skipped: loss nan" in x]
    assert "No space left on device" in line


def test_the_last_line_names_a_file_that_exists(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train_script.main([*options, "--stop_after", "1", "--eval_every", "2"])
    path = Path(capsys.readouterr().out.split("done: ")[1].strip())
    assert path == Path("checkpoints/model_last_lavt.pth")
    assert path.is_file()


def test_a_learning_rate_that_explodes(options: list[str]) -> None:
    """No planted number: what users really meet."""
    message = one_line_error(train_script.main, [*options, "--lr", "2e9", "--loss", "ce"])
    assert "lower --lr" in message
    assert Path("checkpoints/model_nonfinite_lavt.pth").is_file()


def test_deterministic_reruns_are_equal(options: list[str]) -> None:
    argv = [*options, "--epochs", "1", "--deterministic"]
    try:
        for name in ("a", "b"):
            train_script.main([*argv, "--model_id", name])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(state("a"), state("b"))
    assert lines("a") == lines("b")
    train_script.main([*options, "--epochs", "1", "--model_id", "c", "--seed", "1"])
    assert lines("a") != lines("c")
    args = json.loads(Path("models/a/args.json").read_text())
    assert args["environment"].keys() >= {"torch", "python", "git_commit", "time"}
    assert (args["seed"], args["deterministic"]) == (0, True)


def test_accumulation_trains_on_the_same_samples(options: list[str]) -> None:
    """Two batches of 2 are one of 4, but for batch norm."""
    train_script.main([*options, "--epochs", "1", "--model_id", "four", "--print-freq", "1"])
    two = [*options, "--epochs", "1", "--model_id", "two", "--print-freq", "1"]
    train_script.main([*two, "--batch-size", "2", "--accumulate", "2"])
    four, two_lines = lines("four"), lines("two")
    assert len(four) == len(two_lines)
    assert [r.get("lr") for r in four] == [r.get("lr") for r in two_lines]
    assert two_lines[0]["loss"] == pytest.approx(four[0]["loss"], abs=0.05)


@pytest.mark.parametrize("text", ["0", "0m", "-3", "5h", "m", "1.5"])
def test_save_every_takes_steps_or_minutes(text: str) -> None:
    with pytest.raises(InputError, match="give steps, like 500, or minutes, like 10m"):
        parse_train([f"--save-every={text}"])


def test_save_every() -> None:
    result = [parse_train(["--save-every", t]) for t in ("", "500", "2.5m")]
    assert [(a.save_steps, a.save_minutes) for a in result] == [(0, 0), (500, 0), (0, 2.5)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by name."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder)).Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics_lines(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that was stopped and went on, too: no step twice."""
    options = [*options, "--tensorboard"]
    with monkeypatch.context() as patch:
        interrupt(patch, 4, signal.SIGTERM)
        with pytest.raises(utils.Stopped):
            train_script.main(options)
    train_script.main([*options, "--resume", "auto"])
    shown = scalars(Path("models/lavt/tensorboard"))
    for kind, name, key in (
        ("step", "train/loss", "loss"),
        ("step", "train/lr", "lr"),
        ("epoch", "epoch/loss", "loss"),
    ):
        expected = [(r["step"], r[key]) for r in lines("lavt") if r["kind"] == kind]
        assert [s for s, _ in shown[name]] == [s for s, _ in expected]
        assert [v for _, v in shown[name]] == pytest.approx([v for _, v in expected])
    val = [(r["step"], r["val"]["mIoU"]) for r in lines("lavt") if r["kind"] == "epoch"]
    assert shown["val/mIoU"] == [(s, pytest.approx(v)) for s, v in val]
    # A fresh run of the same name does not write into the earlier run's files.
    train_script.main([*options, "--epochs", "1"])
    assert scalars(Path("models/lavt/tensorboard.1")) == shown
    later = scalars(Path("models/lavt/tensorboard"))["val/mIoU"]
    assert len(later) == 1 < len(shown["val/mIoU"])


def test_tensorboard_on_a_full_disk(
    options: list[str],
    whole: Ended,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The numbers are in metrics.jsonl anyway."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def fail(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", fail)
    train_script.main([*options, "--tensorboard"])
    out = capsys.readouterr().out
    assert out.count("TensorBoard's file lacks step 3: No space left on device") == 1
    assert_same(whole.last, state("lavt"))


def test_tensorboard_is_an_extra(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = one_line_error(train_script.main, [*options, "--tensorboard"])
    assert "pip install -r requirements-tools.txt" in message
