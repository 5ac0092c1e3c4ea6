"""The tokenizer: ids, and what is said when there is no vocabulary."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bert import encode, hub, load_tokenizer
from bert.tokenizer import Tokenizer
from lib.errors import InputError
from tests.refer_files import TINY_BERT

CLS, SEP, UNK = 2, 3, 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY_BERT)


def test_ids_and_mask(tokenizer: Tokenizer) -> None:
    ids, mask = encode(tokenizer, ["The RED square", "red"], 7)
    assert ids.dtype == mask.dtype == torch.int64
    words = tokenizer.get_vocab()
    expected = [CLS, words["the"], words["red"], words["square"], SEP, 0, 0]
    assert ids[0].tolist() == expected
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]


def test_long_expressions_lose_their_end(tokenizer: Tokenizer) -> None:
    ids, mask = encode(tokenizer, ["red " * 18, "red " * 19, "red " * 2000], 20)
    assert ids[0, -1] == SEP
    assert ids[1].equal(ids[2])
    assert (ids[1, 1:] == tokenizer.get_vocab()["red"]).all()
    assert mask.all()


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\0", "\u200b"])
def test_empty_expressions(tokenizer: Tokenizer, text: str) -> None:
    ids, mask = encode(tokenizer, [text], 4)
    assert ids.tolist() == [[CLS, SEP, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0]]


def test_odd_texts(tokenizer: Tokenizer) -> None:
    ids, mask = encode(tokenizer, ["!?", "\ud800", "\u7ea2\u8272", "[CLS]", "caf\xe9"], 8)
    assert ids[0, 0] == CLS
    assert ids[0, 3] == SEP
    assert ids[2, :4].tolist() == [CLS, UNK, UNK, SEP]
    assert UNK not in ids[4]  # accents are dropped
    assert (mask.sum(dim=1) >= 3).all()


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["left circle", "a", "", "the big blue man on the left of the small woman"]
    ids, mask = encode(tokenizer, texts, 9)
    for i, text in enumerate(texts):
        one_ids, one_mask = encode(tokenizer, [text], 9)
        assert torch.equal(ids[i], one_ids[0])
        assert torch.equal(mask[i], one_mask[0])
    assert encode(tokenizer, [], 9)[0].shape == (0, 9)


def refusal(name: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(name)
    message = str(caught.value)
    assert "\n" not in message
    assert "vocab.txt" in message
    assert "--bert_tokenizer FOLDER" in message
    return message


def test_a_vocabulary_is_enough(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(TINY_BERT / "vocab.txt", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert torch.equal(encode(bare, ["The man!"])[0], encode(tokenizer, ["The man!"])[0])


@pytest.mark.parametrize("content", [b"", b"[PAD]\n[UNK]\n", b"red\nblue\n" * 9, b"\xff\xfe\0" * 9])
def test_bad_vocabulary(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    assert str(tmp_path) in refusal(tmp_path)


def test_folder_without_vocabulary(tmp_path: Path) -> None:
    shutil.copy(TINY_BERT / "config.json", tmp_path)
    assert f"folder {tmp_path} has no vocab.txt" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a":')
    assert "cannot load tokenizer" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["", "./no", "/no/such", "~/no/such", "a/b/c", "a b", "a\0", "-x"])
def test_neither_folder_nor_name(name: str) -> None:
    assert "neither a folder nor a name on the hub" in refusal(name)


def test_file_instead_of_folder() -> None:
    assert "neither a folder" in refusal(TINY_BERT / "vocab.txt")


@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/some-bert"])
def test_hub_switched_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hub, "_cached", lambda name, files: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in refusal(name)


def test_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that swallows packets must not hang the run."""
    monkeypatch.setattr(hub, "_cached", lambda name, files: False)
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        start = time.monotonic()
        assert "the hub cannot be reached" in refusal("bert-base-uncased")
        assert time.monotonic() - start < 5


def test_cached_name_needs_no_network(tmp_path: Path) -> None:
    """The hub's own folders: a snapshot named by a commit, and a ref that points to it."""
    commit = "0" * 40
    model = tmp_path / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(TINY_BERT, model / "snapshots" / commit)
    code = (
        "from bert import hub, tokenizer\n"
        "hub.hub_answers = None  # calling it would fail\n"
        "print(tokenizer.load_tokenizer('someone/tiny').vocab_size)\n"
    )
    done = subprocess.run(  # the cache's place is fixed at import
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        timeout=100,
    )
    assert done.stdout == "117\n", done.stderr
