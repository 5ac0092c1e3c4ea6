"""The speed benchmark: what it counts, that it runs, and that its page shows its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import speed
from lib.errors import InputError
from lib.swin import SWIN_SIZES, SwinSize

DOCS = Path(__file__).parents[2] / "docs/speed.md"
NANO = SwinSize(8, (2, 2, 2, 2), (1, 2, 4, 8))


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> speed.Case:
    monkeypatch.setitem(SWIN_SIZES, "nano", NANO)
    monkeypatch.setattr(speed, "BERT", {"num_hidden_layers": 1, "hidden_size": 24})
    args = speed.parse(["--models", "lavt:nano:7:56", "--amp", "off", "--quick", "--threads", "1"])
    (result,) = speed.cases(args)
    return replace(result, device="cpu")


def test_flops_of_tiny_are_the_known_ones() -> None:
    """172 G a forward, the last gate apart, which is not computed; BERT has 3.4 G."""
    (row,) = speed.cases(speed.parse(["--models", "lavt:tiny:7:480", "--amp", "off"]))
    total, parts = speed.flops(replace(row, device="cpu"))
    bert = parts["LAVT.text_encoder"]
    last_gate = 2 * 2 * 15 * 15 * 768**2
    assert bert == pytest.approx(3.4e9, rel=0.02)
    assert total - bert + last_gate == pytest.approx(172e9, rel=0.005)


def test_a_training_step_is_about_three_forward_passes(case: speed.Case) -> None:
    forward, _ = speed.flops(case)
    step, _ = speed.flops(replace(case, mode="step"))
    assert 2.5 < step / forward < 3
    assert speed.flops(replace(case, batch=3))[0] == 3 * forward


@pytest.mark.parametrize("mode", speed.MODES)
@pytest.mark.parametrize("plain", [False, True])
def test_a_row(case: speed.Case, mode: str, plain: bool) -> None:
    case = replace(case, mode=mode, plain=plain, profile=mode == "forward", repeats=1)
    row = speed.measure(case, *speed.flops(case))
    assert row["seconds"] > 0
    assert 0 < row["share"] <= row["share_of_mm"]
    record = {"rows": [row], "machine": speed.machine(), "environment": {"gpu": None, "torch": "x"}}
    text = speed.summary(json.loads(json.dumps(record)))
    assert f"| {case.name} | 7 | 56 | 1 | off | {mode} |" in text
    if mode == "forward":
        parts = {part["part"]: part for part in row["profile"]}
        assert set(speed.PARTS) <= set(parts)
        assert sum(part["gflop"] for part in row["profile"]) == pytest.approx(row["gflop"])
        assert all(part["seconds"] > 0 for part in row["profile"])
        assert "| decoder |" in text


@pytest.mark.parametrize(
    "options", [["--models", "lavt"], ["--amp", "half"], ["--models", "x:y:7:8"]]
)
def test_options_that_make_no_sense(options: list[str]) -> None:
    with pytest.raises(InputError, match=options[0]):
        speed.cases(speed.parse(options))


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    for name in ("x.json", "none.json"):
        with pytest.raises(InputError, match="no result file"):
            speed.main(["--report", str(tmp_path / name)])


def test_the_page_shows_the_committed_results() -> None:
    files = sorted(speed.RESULTS.glob("speed_*.json"))
    assert files
    text = DOCS.read_text(encoding="utf-8")
    for file in files:
        assert speed.summary(speed.read_report(str(file))) in text, f"run --report {file}"
