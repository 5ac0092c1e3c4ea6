"""Arrays kept on disk: found, missed, damaged, not writable, made by two processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from args import parse_test, refer_options
from bert import load_tokenizer
from bert.tokenizer import Tokenizer
from data import cache as cache_module
from data import dataset_refer_bert
from data.cache import ArrayCache, default_folder, digest
from data.dataset_refer_bert import ReferDataset
from lib.errors import InputError
from refer import REFER
from refer import refer as refer_module
from refer.arrays import Tables, Texts
from tests.refer_files import (
    CC0_ROOT,
    SQUARE,
    TINY_BERT,
    default_instances,
    default_refs,
    make_ref,
    write_root,
)

ARRAYS: dict[str, Any] = {
    "numbers": np.arange(7, dtype=np.float64),
    "grid": np.arange(12, dtype=np.int32).reshape(3, 4),
    "letters": np.frombuffer(b"abc", np.uint8),
    "none": np.zeros((0, 5), np.int64),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY_BERT)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the arrays of small data sets too."""
    monkeypatch.setattr(refer_module, "SMALL", 0)
    monkeypatch.setattr(dataset_refer_bert, "FEW", 0)


def assert_same(found: Any, expected: dict[str, Any]) -> None:
    assert found is not None
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_put_and_get(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "a" / "b")
    assert cache.get("kind", "key") is None
    assert_same(cache.put("kind", "key", ARRAYS), ARRAYS)
    found = cache.get("kind", "key")
    assert_same(found, ARRAYS)
    assert found is not None
    assert not found["grid"].flags.writeable  # a map of the file
    assert cache.get("kind", "other") is None
    assert [path.name for path in cache.folder.iterdir()] == ["kind-key.arrays"]


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    cache.put("kind", "key", ARRAYS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get("kind", "key") is None, place
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.get("kind", "key") is None, length
    path.write_bytes(whole + b"more")
    assert cache.get("kind", "key") is None
    assert_same(cache.put("kind", "key", ARRAYS), ARRAYS)  # written anew


def forged(header: Any) -> bytes:
    """A file with a right checksum, of somebody who knows how."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    rest = [len(text).to_bytes(8, "little"), text, bytes(64)]
    return b"".join([cache_module.MAGIC, cache_module._checksum(rest), *rest])


@pytest.mark.parametrize(
    "content",
    {
        "pickle": pickle.dumps(ARRAYS),
        "empty": b"",
        "other content": forged({"title": "kind other", "arrays": []}),
        "objects": forged({"title": "kind key", "arrays": [["a", "|O", [1], 0]]}),
        "behind the end": forged({"title": "kind key", "arrays": [["a", "<i8", [9], 0]]}),
        "before the beginning": forged({"title": "kind key", "arrays": [["a", "<i8", [1], -999]]}),
        "negative size": forged({"title": "kind key", "arrays": [["a", "<i8", [-1], 0]]}),
        "huge": forged({"title": "kind key", "arrays": [["a", "<i8", [2**62, 8], 0]]}),
        "no dtype": forged({"title": "kind key", "arrays": [["a", "nonsense", [1], 0]]}),
        "no list": forged({"title": "kind key", "arrays": 5}),
        "list": forged([]),
        "no JSON": forged(b"{"),
    }.items(),
    ids=lambda item: item[0],
)
def test_foreign_files_are_absent(tmp_path: Path, content: tuple[str, bytes]) -> None:
    (tmp_path / "kind-key.arrays").write_bytes(content[1])
    cache = ArrayCache(tmp_path)
    assert cache.get("kind", "key") is None
    assert_same(cache.put("kind", "key", ARRAYS), ARRAYS)


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    cache = ArrayCache(tmp_path / "taken")
    assert cache.get("kind", "key") is None
    assert_same(cache.put("kind", "key", ARRAYS), ARRAYS)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be written of it is taken away again."""

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    cache = ArrayCache(tmp_path)
    assert_same(cache.put("kind", "key", ARRAYS), ARRAYS)
    assert not list(tmp_path.iterdir())


def _put_often(folder: Path, barrier: Any) -> None:
    barrier.wait()
    for _ in range(50):
        assert_same(ArrayCache(folder).put("kind", "key", ARRAYS), ARRAYS)


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=_put_often, args=(tmp_path, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["kind-key.arrays"]


def test_digest_tells_where_parts_end() -> None:
    assert digest(b"ab", b"c") != digest(b"a", b"bc")
    assert digest(b"abc") == digest(np.frombuffer(b"abc", np.uint8))


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder(tmp_path) == tmp_path / ".cache"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert default_folder(tmp_path) == tmp_path / "own" / "lavt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder(tmp_path) == tmp_path / ".cache" / "lavt"


# ---- data sets ----


def everything(refer: REFER, tokenizer: Tokenizer, **options: Any) -> list[Any]:
    """All that a data set tells of its train split."""
    data = ReferDataset(refer, "train", tokenizer, 40, **options)
    samples = [{k: getattr(v, "tolist", lambda v=v: v)() for k, v in s.items()} for s in data]  # type: ignore[attr-defined]
    told = [data.describe(i) | {"other": data.other_object(i)} for i in range(len(data))]
    return [samples, told, list(data.records), [list(s) for s in data.samples_of_ref]]


@pytest.mark.parametrize("eval_mode", ["each", "cat", "mean"])
@pytest.mark.parametrize("text", ["raw", "sent"])
def test_samples_do_not_depend_on_the_cache(
    tmp_path: Path, tokenizer: Tokenizer, any_size: None, eval_mode: str, text: str
) -> None:
    options = {"eval_mode": eval_mode, "text": text, "photo_masks": True}
    plain = everything(REFER(CC0_ROOT), tokenizer, **options)
    cache = ArrayCache(tmp_path)
    first = everything(REFER(CC0_ROOT, cache=cache), tokenizer, **options)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in kept] == ["refcoco", "tokens"]
    second = everything(REFER(CC0_ROOT, cache=cache), tokenizer, **options)
    assert plain == first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_kept_data_set_reads_no_record(
    tmp_path: Path, tokenizer: Tokenizer, any_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    REFER(root, cache=cache)
    monkeypatch.setattr(REFER, "_read", lambda self: pytest.fail("the records were read"))
    refer = REFER(root, cache=cache)
    data = ReferDataset(refer, "train", tokenizer, 16)
    data.check_images()
    assert data[0]["target"].sum() > 0
    assert data.describe(0)["category"] == "thing"


def test_records_come_back_when_asked_for(tmp_path: Path, any_size: None) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    plain = REFER(root)
    for refer in (REFER(root, cache=cache), REFER(root, cache=cache)):
        for name in refer_module.RECORDS:
            assert getattr(refer, name) == getattr(plain, name), name
        assert refer.getRefIds(split="train") == [1, 2]
        assert refer.getMask(refer.Refs[1])["area"] == 36
    with pytest.raises(AttributeError, match="Reffs"):
        plain.Reffs  # noqa: B018


@pytest.mark.parametrize("file", ["refs(unc).p", "instances.json"])
def test_changed_files_are_read_anew(tmp_path: Path, any_size: None, file: str) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    assert len(REFER(root, cache=cache).tables.ref_id) == 4
    refs, instances = default_refs(), default_instances()
    if file == "refs(unc).p":
        refs.append(make_ref(5, 14, 102, "val", ["another"]))
    else:
        instances["images"][0]["height"] = 99
    write_root(tmp_path, refs, instances)
    tables = REFER(root, cache=cache).tables
    assert len(tables.ref_id) == len(refs)
    assert tables.height[0] == instances["images"][0]["height"]
    assert len(list(cache.folder.iterdir())) == 2


def test_damaged_data_is_an_error_with_a_cache_too(tmp_path: Path, any_size: None) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    REFER(root, cache=cache)
    (root / "refcoco" / "instances.json").write_text("{")
    with pytest.raises(InputError, match=r"instances\.json: not readable JSON"):
        REFER(root, cache=cache)
    (root / "refcoco" / "instances.json").unlink()
    with pytest.raises(InputError, match=r"instances\.json does not exist"):
        REFER(root, cache=cache)


def test_small_data_sets_are_not_kept(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    assert len(REFER(root, cache=cache).tables.ref_id) == 4
    assert not cache.folder.exists()


@pytest.mark.parametrize(
    "changed", [{"max_tokens": 5}, {"split": "val"}, {"text": "sent"}, {"eval_mode": "cat"}]
)
def test_tokens_of_other_texts_are_others(
    tmp_path: Path, tokenizer: Tokenizer, any_size: None, changed: dict[str, Any]
) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    usual = {"split": "train", "tokenizer": tokenizer, "img_size": 8}
    ReferDataset(REFER(root, cache=cache), **usual)  # type: ignore[arg-type]
    found = ReferDataset(REFER(root, cache=cache), **usual | changed)  # type: ignore[arg-type]
    plain = ReferDataset(REFER(root), **usual | changed)  # type: ignore[arg-type]
    assert len(found) == len(plain)
    for i in range(len(found)):
        assert found.text(i)["input_ids"].tolist() == plain.text(i)["input_ids"].tolist()
    assert len(list(cache.folder.glob("tokens-*"))) == 2


def test_tokens_of_another_vocabulary_are_others(tmp_path: Path, any_size: None) -> None:
    root = write_root(tmp_path)
    cache = ArrayCache(tmp_path / "cache")
    words = (TINY_BERT / "vocab.txt").read_text().splitlines()
    ids = []
    for name, vocabulary in (("a", words), ("b", [*words[:5], *reversed(words[5:])])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        data = ReferDataset(REFER(root, cache=cache), "train", load_tokenizer(folder), 8)
        ids.append(data.text(0)["input_ids"].tolist())
    assert ids[0] != ids[1]


def test_segmentations_survive(tmp_path: Path) -> None:
    """Polygons as numbers, all else as it was, errors included."""
    odd: list[Any] = [
        [SQUARE, SQUARE],
        {"size": [12, 16], "counts": [10, 6, 176]},
        [SQUARE, {"size": [12, 16], "counts": "abc"}],
        None,
        [],
        [["1", "2"]],
        [[1, 10**400]],
        [[True, 2.5, 3, float("inf")]],
        [[]],
        "text",
        7,
    ]
    refs = [make_ref(i, i, 101, "train", ["a"]) for i in range(len(odd))]
    instances = default_instances()
    instances["annotations"] = [
        {"id": i, "image_id": 101, "segmentation": shape} for i, shape in enumerate(odd)
    ]
    tables = REFER(write_root(tmp_path, refs, instances)).tables
    again = Tables.from_arrays(tables.arrays())
    for i, shape in enumerate(odd):
        found = again.segmentation(i)
        if isinstance(found, list):
            found = [x.tolist() if isinstance(x, np.ndarray) else x for x in found]
        assert found == shape


def test_texts() -> None:
    texts = ["", "a", "ünï", "\ud800 half", "", "\0", "😀"]
    packed = Texts.pack(texts)
    assert list(packed) == texts
    assert [packed[i] for i in range(len(packed))] == texts
    assert packed[1:3] == ["a", "ünï"]
    assert list(packed.take(np.array([6, 2, 2, 0]))) == ["😀", "ünï", "ünï", ""]
    assert list(packed.take(np.array([], np.int64))) == []
    assert list(Texts.pack([])) == []


def test_ids_beyond_64_bits_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    instances = default_instances()
    instances["images"].append({"id": 2**70, "file_name": "a.jpg", "width": 1, "height": 1})
    refer = REFER(write_root(tmp_path, instances=instances))
    with pytest.raises(InputError, match="64 bits"):
        ReferDataset(refer, "train", tokenizer, 8)


def test_options(tmp_path: Path) -> None:
    given = ["--resume", "a.pth", "--split", "val", "--refer_data_root", str(tmp_path)]
    assert refer_options(parse_test(given))["cache"].folder == tmp_path / ".cache"
    assert refer_options(parse_test([*given, "--data_cache", "off"]))["cache"] is None
    elsewhere = refer_options(parse_test([*given, "--data_cache", "elsewhere"]))
    assert elsewhere["cache"].folder == Path("elsewhere")
    REFER(**elsewhere | {"data_root": write_root(tmp_path)})
