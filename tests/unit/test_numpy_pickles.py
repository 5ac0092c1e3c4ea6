"""NumPy's values in a refs pickle become plain ones, without NumPy's own functions."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.errors import InputError
from refer import REFER
from refer.pickles import load_refs
from tests.refer_files import default_refs, write_root

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def with_numpy() -> list[dict[str, Any]]:
    """`default_refs` as people write them who work with arrays and tables."""
    refs: Any = default_refs()
    for ref in refs:
        ref["ref_id"] = np.int64(ref["ref_id"])
        ref["image_id"] = np.float64(ref["image_id"])
        ref["ann_ids"] = np.array([ref.pop("ann_id")], np.int32)
        ref["category_id"] = np.array(ref["category_id"])
        ref["split"] = np.str_(ref["split"])
        for sentence in ref["sentences"]:
            sentence["sent_id"] = np.uint16(sentence["sent_id"])
            sentence["raw"] = np.str_(sentence["raw"])
            sentence["tokens"] = np.array(sentence["tokens"])
    return refs


@pytest.fixture
def expected(tmp_path: Path) -> list[Any]:
    path = tmp_path / "plain.p"
    path.write_bytes(pickle.dumps(default_refs()))
    return [{k: v for k, v in ref.items() if k != "ann_id"} for ref in load_refs(path)]


def of_numpy_1(data: bytes) -> bytes:
    """A pickle without lengths of names, as NumPy 1 writes it."""
    return data.replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_of_every_protocol(tmp_path: Path, protocol: int, expected: list[Any]) -> None:
    path = tmp_path / "refs(x).p"
    data = pickle.dumps(with_numpy(), protocol)
    path.write_bytes(data)
    loaded = load_refs(path)
    assert loaded == expected
    # Equal is not enough: NumPy's numbers are equal to Python's.
    assert repr(loaded) == repr(expected)
    if protocol < 4:
        path.write_bytes(of_numpy_1(data))
        assert repr(load_refs(path)) == repr(expected)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.bool_(True), True),
        (np.int8(-3), -3),
        (np.array([1, 2**40], ">i8"), [1, 2**40]),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.str_(""), ""),
        (np.str_("Größe"), "Größe"),
        (np.bytes_(b"ab"), "ab"),
        (np.array(["a", "bcd"]), ["a", "bcd"]),
        (np.array([]), []),
        (np.array(7), 7),
        (np.array([1, "x", [2, {"a": np.int64(3)}]], dtype=object), [1, "x", [2, {"a": 3}]]),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_kinds_of_values(tmp_path: Path, value: Any, plain: Any, protocol: int) -> None:
    refs: Any = default_refs()
    refs[0]["own"] = value
    path = tmp_path / "refs(x).p"
    path.write_bytes(pickle.dumps(refs, protocol))
    assert repr(load_refs(path)[0]["own"]) == repr(plain)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0c\0\0\0\0\0\0\0", "reference 0 is of type int"),
        (b"\xff\0\0\0\0\0\0\0", "reference 0 is of type int"),
        (b"\xc3\xa9\0\0\0\0\0\0", "not a readable pickle"),
    ],
)
def test_scalars_of_python_2(tmp_path: Path, data: bytes, message: str) -> None:
    """Their bytes are text there: read where nothing of them is lost in decoding."""
    call = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02i8K\x00K\x01\x87R"
    call += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08" + data + b"\x86R"
    path = tmp_path / "refs(x).p"
    path.write_bytes(b"\x80\x02]" + call + b"a.")
    with pytest.raises(InputError, match=message):
        load_refs(path)


def test_an_array_of_references(tmp_path: Path, expected: list[Any]) -> None:
    path = tmp_path / "refs(x).p"
    path.write_bytes(pickle.dumps(np.array(with_numpy(), dtype=object)))
    assert load_refs(path) == expected


def test_a_large_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refs(x).p"
    path.write_bytes(pickle.dumps([np.zeros(200_000)]))
    with pytest.raises(InputError, match="a large NumPy array"):
        load_refs(path)


def test_a_dataset_with_numpy(tmp_path: Path) -> None:
    refer = REFER(write_root(tmp_path, with_numpy()))
    assert refer.getRefIds(split="train") == [1, 2]
    assert refer.getMask(refer.Refs[1])["area"] == 36
    assert refer.loadRefs(np.int64(3))[0]["ann_ids"] == [13]
    assert len(refer.arrays.raw) == 7


def test_without_the_module_resource(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setitem(__import__("sys").modules, "resource", None)
    path = tmp_path / "refs(x).p"
    path.write_bytes(pickle.dumps(default_refs()))
    assert len(load_refs(path)) == 4
