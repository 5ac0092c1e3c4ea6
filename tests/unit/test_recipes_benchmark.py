"""The benchmark of recipes: its flags, budgets and table, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from args import parse_train
from benchmarks import recipes
from lib.errors import InputError


def one(score: float, curve: list[tuple[int, float, float]], tflop: float = 0.5) -> dict[str, Any]:
    ends = {"mIoU": [score - 2, score + 2], "oIoU": [score - 1, score + 3]}
    val = {"mIoU": score, "oIoU": score + 1, "bootstrap_95": ends}
    return {"val": val, "curve": curve, "tflop_per_step": tflop, "passes": 1}


def test_every_row_is_a_command_line() -> None:
    args = recipes.parse([])
    for row in recipes.ROWS:
        flags = parse_train([*recipes.flags_of(row, args), *recipes.data_flags(args)])
        assert flags.maskris == (recipes.passes(row) == 2)
    assert flags.maskris
    assert flags.img_size % flags.maskris_patch == 0
    given = (flags.loss, flags.model_ema, flags.mosaic, flags.warmup_steps)
    assert given == ("dice", True, 0.5, args.warmup)


def test_two_passes_have_half_the_epochs_for_equal_computation() -> None:
    assert recipes.budgets("Dice", 8) == {"steps": 8}
    assert recipes.budgets("MaskRIS", 8) == {"steps": 8, "computation": 4}
    with pytest.raises(InputError, match="--epochs 3: give an even number"):
        recipes.parse(["--epochs", "3"])
    with pytest.raises(InputError, match="--rows x: choose of 'published'"):
        recipes.parse(["--rows", "x"])


def test_the_table_has_what_it_costs_to_reach_the_published_score() -> None:
    runs = {
        "published | steps | 0": one(50, [(10, 5.0, 30.0), (20, 10.0, 50.0)]),
        "published | steps | 1": one(54, [(10, 5.0, 30.0), (20, 10.0, 54.0)]),
        "Dice | steps | 0": one(60, [(10, 6.0, 53.0), (20, 12.0, 60.0)]),
        "Dice | steps | 1": one(50, [(10, 6.0, 20.0), (20, 12.0, 50.0)]),
        "MaskRIS | computation | 0": one(10, [(10, 9.0, 10.0)]),
    }
    lines = recipes.table(runs).splitlines()
    assert "| published | steps | 2 | 52.00 [50.00 to 54.00; 50.00 to 54.00] |" in lines[2]
    assert "| Dice | steps | 2 | 55.00 [50.00 to 60.00; 53.00 to 57.00] | +3.00 |" in lines[3]
    assert "| 6 (1 of 2 do not reach it) | 5.0 (1 of 2 do not reach it) |" in lines[3]
    assert lines[4].startswith("| MaskRIS | computation | 1 | 10.00")
    assert lines[4].endswith("| never | never |")
    assert "mIoU 52.00" in lines[-1]


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"settings": {"epochs": 2}, "runs": {}}')
    with pytest.raises(InputError, match="other settings: give another file by --results"):
        recipes.load(path, {"epochs": 4})


def test_runs_are_written_as_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first failure ends the benchmark; started again it makes only what is missing."""
    made: list[tuple[str, int]] = []

    def fake(row: str, budget: str, epochs: int, seed: int, args: object) -> dict[str, Any]:
        if seed == 1 and len(made) < 3:
            raise InputError("train.py failed")
        made.append((row, seed))
        return one(50 + seed, [(10, 5.0, 30.0), (20, 10.0, 50.0)])

    monkeypatch.setattr(recipes, "run", fake)
    page, results = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text("\n".join(recipes.MARKS))
    own = ["--rows", "published", "Dice", "--seeds", "2", "--results", str(results)]
    with pytest.raises(InputError, match=r"train\.py failed"):
        recipes.main([*own, "--page", str(page)])
    assert {("published", 0), ("Dice", 0)} == set(made)
    made.append(("other", 0))
    recipes.main([*own, "--page", str(page), "--jobs", "2"])
    recipes.main([*own, "--page", str(page), "--jobs", "2"])
    assert made.count(("Dice", 1)) == made.count(("published", 1)) == 1
    assert "| Dice | steps | 2 | 50.50" in page.read_text()
    assert "| Dice |" in capsys.readouterr().out
