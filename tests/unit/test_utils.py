"""Metrics files, JSON writing and logging of utils.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import utils
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
