"""What --fast stands for on simulated devices, and that other flags win."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from args import parse_test, parse_train
from lib import fast, runtime

GPU_FLAGS = ["--amp", "bf16", "--channels_last", "--pin_mem", "--tf32", "--compile"]


def switches(args: argparse.Namespace) -> list[bool]:
    return [args.compile, args.channels_last, args.tf32, args.pin_mem]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulated: two GPUs that have it all, the second one older."""
    found = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index])
    monkeypatch.setattr(fast, "can_compile", lambda: True)
    return monkeypatch


def test_on_gpus(gpu: pytest.MonkeyPatch) -> None:
    assert fast.fast_flags("cuda:0", "train.py") == GPU_FLAGS
    assert fast.fast_flags("cuda", "demo_inference.py") == GPU_FLAGS[:-1]
    old = ["--channels_last", "--pin_mem", "--compile"]  # bf16 would be emulated
    assert fast.fast_flags("cuda:0", "train.py", local_rank=1) == old
    gpu.setattr(fast, "can_compile", lambda: False)
    assert fast.fast_flags("cuda:0", "test.py") == GPU_FLAGS[:-1]
    assert fast.fast_flags("cpu", "train.py") == fast.fast_flags("cpu", "test.py")
    assert fast.fast_flags("mps", "test.py") == []


@pytest.mark.parametrize("native", [True, False])
def test_on_a_cpu(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    expected = ["--amp", "bf16"] if native else []
    assert fast.fast_flags("cuda:0", "train.py") == expected
    args = parse_train(["--fast"])
    assert args.fast == ("--amp bf16" if native else "no other flag here")
    assert args.amp == ("bf16" if native else "off")
    assert switches(args) == [False] * 4


def test_the_flags_are_set_and_recorded(gpu: pytest.MonkeyPatch) -> None:
    args = parse_train(["--fast"])
    assert args.amp == "bf16"
    assert switches(args) == [True] * 4
    assert args.fast.split() == GPU_FLAGS
    assert parse_test(["--fast", "--resume", "x"]).compile
    assert parse_train([]).fast == ""


def test_flags_that_are_given_win(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for words in (["--fast", "--amp", "off"], ["--amp", "off", "--fast"]):
        args = parse_train(words)
        assert (args.amp, args.compile) == ("off", True)
    without = ["--no-compile", "--no_tf32", "--no-pin-mem", "--no_channels_last"]
    args = parse_train([*without, "--fast"])
    assert switches(args) == [False] * 4
    assert args.amp == "bf16"
    assert args.fast == "--amp bf16"  # what is printed
    assert "--amp" not in parse_train(["--fast", "--amp", "off"]).fast
    recipe = tmp_path / "quick.args"
    recipe.write_text("--fast\n--amp fp16\n")
    assert parse_train([f"@{recipe}"]).amp == "fp16"
    assert parse_train([f"@{recipe}", "--amp", "off"]).amp == "off"


def test_each_process_asks_its_own_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("LOCAL_RANK", "1")
    assert parse_train(["--fast"]).amp == "off"


def test_compiling_needs_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "find_spec", lambda name: object())
    monkeypatch.setattr(fast.shutil, "which", lambda name: "/usr/bin/gcc")
    assert fast.can_compile()
    monkeypatch.setattr(fast.shutil, "which", lambda name: None)
    assert not fast.can_compile()
    monkeypatch.undo()
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    assert not fast.can_compile()


def test_auto_is_bf16_only_where_the_hardware_has_it(gpu: pytest.MonkeyPatch) -> None:
    """torch.cuda.is_bf16_supported also says yes where bfloat16 is emulated."""
    assert runtime.resolve_amp("auto", torch.device("cuda", 0)) == "bf16"
    assert runtime.resolve_amp("auto", torch.device("cuda", 1)) == "off"
