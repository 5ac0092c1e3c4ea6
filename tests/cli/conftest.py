"""A small RefShapes root and the command lines over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.refshapes import generate
from tests.scripts import Shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """A generated REFER root with its BERT folder; 8 training scenes."""
    root: Path = tmp_path_factory.mktemp("shapes")
    generate(root / "data", level="easy", seed=3, scenes=8, val_scenes=3, test_scenes=2)
    return Shapes(root / "data")
