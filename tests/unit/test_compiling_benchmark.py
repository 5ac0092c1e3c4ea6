"""The benchmark of compiling, at the smallest size and without C++."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compiling, speed
from lib.swin import SWIN_SIZES, SwinSize


@pytest.mark.parametrize("way", compiling.WAYS)
def test_a_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setitem(SWIN_SIZES, "micro", SwinSize(8, (1, 1, 1, 1), (1, 2, 4, 8)))
    monkeypatch.setattr(speed, "BERT", {"num_hidden_layers": 1, "hidden_size": 24})
    flags = ["--swin_type", "micro", "--window", "7", "--img_size", "32", "--backend", "eager"]
    row = compiling.measure(way, compiling.parse(flags))
    assert row["way"] == way
    assert row["first"] > 0
    assert row["later"] > 0
    if way != "eager":
        assert row["first"] > row["later"]


def test_every_way_has_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"way": "whole", "first": 9.0, "later": 0.5}
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    monkeypatch.setattr(compiling.json, "loads", lambda line: row | {"command": line})
    output = tmp_path / "compiling.json"
    compiling.main(["--img_size", "64", "--ways", "whole", "--output", str(output)])
    text = output.read_text()
    assert "--img_size 64" in text
    assert "--one whole" in text
    assert "| whole | 9.0 | 0.500 |" in capsys.readouterr().out
