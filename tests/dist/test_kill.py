"""Kills at random moments: a few of the 30 that ``python -m tests.stress.kill`` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import REPO, TIMEOUT, environment


@pytest.mark.parametrize(("processes", "kills", "seed"), [(1, 5, 4), (2, 2, 4)])
def test_nothing_is_lost(processes: int, kills: int, seed: int, tmp_path: Path) -> None:
    out = tmp_path / "kill.json"
    options = ["--processes", str(processes), "--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.kill", *options, "--output", str(out)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())["runs"]
    assert result["equal"]
    assert result["faults"] == []
    assert result["kills"] == kills
    assert "writing" in {kill["aim"] for kill in result["each"]}
