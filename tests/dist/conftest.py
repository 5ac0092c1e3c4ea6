"""What tests of several processes compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.scripts import Shapes, run, torchrun

PROCESSES = 2
EPOCHS = 6


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing stopped.

    Attributes:
        folder: that it was started in.
        options: of train.py.
        steps: of the whole run.
    """

    folder: Path
    options: list[str]
    steps: int


@pytest.fixture(scope="session")
def undisturbed(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Two processes of one machine train a small model."""
    options = [*shapes.train_options, "--batch-size", "2", "--epochs", str(EPOCHS)]
    options += ["--save-every", "2"]
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder, "train.py", *options, launcher=torchrun(PROCESSES))
    assert done.returncode == 0, done.stderr
    lines = (folder / "models/lavt/metrics.jsonl").read_text().splitlines()
    return Undisturbed(folder, options, sum('"kind": "step"' in line for line in lines))
