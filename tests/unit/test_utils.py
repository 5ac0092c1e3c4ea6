"""Metrics files, JSON writing and logging of utils.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import utils
from data import loaders
from lib import runtime
from lib.errors import InputError
from lib.training.state_files import rename_existing
from tests.scripts import jsonl


def test_a_fresh_run_renames_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for run in range(3):
        utils.append_jsonl({"step": 1, "run": run}, path)
        rename_existing(path)
    assert not path.exists()
    kept = [jsonl(tmp_path / f"metrics.{n}.jsonl")[0]["run"] for n in (1, 2, 3)]
    assert kept == [0, 1, 2]


def test_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        utils.append_jsonl({"step": step}, path)
    with path.open("a") as f:
        f.write('{"step": 3, "lo')  # cut off by a crash
    utils.trim_jsonl(path, lambda record: record["step"] <= 3)
    assert [r["step"] for r in jsonl(path)] == [1, 2, 3]


def test_no_nan_in_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    utils.append_jsonl({"loss": float("nan"), "lr": 0.5}, path)
    assert jsonl(path) == [{"loss": None, "lr": 0.5}]


def test_write_json_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    utils.write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        utils.write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        utils.write_json({}, tmp_path / "file" / "results.json")


def test_device_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = utils.init_distributed("cuda:0")
    assert (info.device.type, info.rank, info.world, info.is_main) == ("cpu", 0, 1, True)


@pytest.mark.parametrize("device", ["meta", "vulkan", "xla", "hpu", "privateuseone"])
def test_devices_that_are_not_here(device: str) -> None:
    with pytest.raises(InputError, match=f"--device {device} does not work here: give cpu"):
        utils.init_distributed(device)


def test_other_devices_are_for_trained_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the tensors are on the CPU."""
    one = torch.ones(1)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: one)
    assert utils.init_distributed("mps").device.type == "mps"
    with pytest.raises(InputError, match="--device mps: training needs cpu or cuda"):
        utils.init_distributed("mps", training=True)
    assert utils.init_distributed("cpu", training=True).device.type == "cpu"
    assert runtime.resolve_amp("auto", torch.device("mps")) == "off"
    with runtime.autocast(torch.device("mps"), "auto"):
        pass


def test_a_closed_session_stops_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with utils.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.name == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with utils.StopSignals() as signals, pytest.raises(utils.Stopped, match="by SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_with_fewer_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Windows."""
    for name in ("SIGUSR1", "SIGHUP", "SIGALRM", "alarm"):
        monkeypatch.delattr(signal, name)
    with utils.StopSignals() as signals, pytest.raises(utils.Stopped, match="by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.name == "SIGTERM"
    handled = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    loaders._ignore_signals(0)
    assert handled == [signal.SIGINT]


def test_loader_processes_leave_signals_to_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    handled = {}
    monkeypatch.setattr(signal, "signal", handled.__setitem__)
    loaders._ignore_signals(0)
    ignored = {number for number, handler in handled.items() if handler == signal.SIG_IGN}
    assert ignored == {signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}


def test_a_message_of_a_signal_needs_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(handle: int, text: bytes) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(utils.os, "write", gone)
    with utils.StopSignals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.name == "SIGTERM"


@pytest.mark.parametrize("stream", [None, "closed", "full"])
def test_log_lines_that_nobody_reads(
    stream: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = None if stream is None else open("/dev/full", "w")  # noqa: SIM115
    if stream == "closed" and gone:
        gone.close()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", gone)
        patch.setattr("sys.stderr", gone)
        utils.setup_logging(tmp_path, 0)
        utils.log.info("words")
        assert list(utils.progress([1, 2], "bar", 0)) == [1, 2]
    if gone:
        with contextlib.suppress(OSError):
            gone.close()
    assert (tmp_path / "log.txt").read_text().endswith(" words\n")


def test_seeds_of_several_numbers() -> None:
    def draw(*parts: int) -> float:
        utils.seed_everything(*parts)
        return torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 0), draw(0, 0, 1), draw(1, 0, 0), draw(0, 1, 1)}) == 4


def test_peak_memory_is_that_of_this_process() -> None:
    before = utils.peak_memory_gb(torch.device("cpu"))
    torch.ones(50_000_000)
    assert 0.05 < utils.peak_memory_gb(torch.device("cpu")) < 50
    assert utils.peak_memory_gb(torch.device("cpu")) >= before


def test_peak_memory_is_unknown_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(utils.peak_memory_gb(torch.device("cpu")))


def test_the_gpus_generator_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the calls of torch.cuda are replaced."""
    state = {"cuda:1": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state[str(device)].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda value, device: state.update({str(device): value})
    )
    device = torch.device("cuda", 1)
    saved = utils.rng_state(device)
    numbers = torch.rand(3)
    state["cuda:1"] = torch.tensor([9, 9, 9], dtype=torch.uint8)
    utils.set_rng_state(saved, device)
    assert torch.equal(torch.rand(3), numbers)
    assert state["cuda:1"].tolist() == [1, 2, 3]
    utils.set_rng_state(saved, torch.device("cpu"))  # a run that moved to the CPU
    assert torch.equal(torch.rand(3), numbers)
    assert len(utils.rng_state(torch.device("cpu"))) == 1


def test_flags_with_hyphens_and_underscores() -> None:
    parser = utils.Parser()
    parser.add_argument("--save_every")
    parser.add_argument("words", nargs="*")
    for spelling in ("--save-every=a-b", "--save_every=a-b"):
        assert parser.parse_args([spelling]).save_every == "a-b"
    assert parser.parse_args(["--save-every", "a-b", "c-d"]).words == ["c-d"]
    value = "--img-size 56 --ape 14"  # a flag's value may have flags of its own
    assert parser.parse_args(["--save-every", value]).save_every == value
