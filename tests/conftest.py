"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BertConfig

from data.refshapes.generate import generate
from lib.lavt import LAVT
from lib.segmentation import build_model
from lib.swin import SWIN_SIZES, SwinSize
from tests.scripts import Shapes

# One thread: on a busy machine threads wait for each other far longer than they save.
torch.set_num_threads(1)

Build = Callable[..., LAVT]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The rehearsal of tests/gpu."""
    parser.addoption("--dry-run", action="store_true", help="rehearse tests/gpu on the CPU")


@pytest.fixture
def text_config() -> BertConfig:
    """A BERT of a few thousand parameters."""
    return BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
    )


@pytest.fixture
def build_nano(monkeypatch: pytest.MonkeyPatch, text_config: BertConfig) -> Build:
    """Builds models whose Swin is far smaller than any published, ``--swin_type nano``."""
    monkeypatch.setitem(SWIN_SIZES, "nano", SwinSize(8, (2, 2, 2, 2), (1, 2, 4, 8)))

    def build(name: str = "lavt", **options: object) -> LAVT:
        chosen = {"swin_type": "nano", "window_size": 7, "text_config": text_config} | options
        return build_model(name, **chosen)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """A generated REFER root with its BERT folder; 8 training scenes."""
    root = tmp_path_factory.mktemp("shapes") / "data"
    generate(root, level="easy", seed=3, scenes=8, val_scenes=3, test_scenes=2)
    return Shapes(root)
