"""Read `refs(*).p` without trusting it.

A pickle is a program. This reader walks the program first and refuses it unless it only
builds lists, dicts, numbers and strings, then lets Python's own unpickler run what is left.
"""

from __future__ import annotations

import codecs
import io
import pickle
from pathlib import Path
from typing import Any

from lib.errors import InputError

Ref = dict[str, Any]

MAX_BYTES = 512 << 20  # RefCOCO's pickles have 15 to 45 MB
MAX_UNFOLDING = 4  # items of containers a byte; 1 at most unless containers are shared
MAX_DEPTH = 8  # a word lies four deep: refs, ref, sentences, sentence, tokens
MAX_TUPLES = 10_000  # hashing recurses over nested tuples in C, without a limit of its own
MAX_NUMBER_BYTES = 9  # of a LONG1; 64 bits and a sign
MAX_LINE_NUMBER = 24  # characters of a number in the text protocol

# Opcodes with an argument of fixed size.
_FIXED: dict[bytes, int] = {
    pickle.MARK: 0,
    pickle.POP: 0,
    pickle.POP_MARK: 0,
    pickle.DUP: 0,
    pickle.NONE: 0,
    pickle.NEWTRUE: 0,
    pickle.NEWFALSE: 0,
    pickle.EMPTY_LIST: 0,
    pickle.EMPTY_DICT: 0,
    pickle.EMPTY_TUPLE: 0,
    pickle.LIST: 0,
    pickle.DICT: 0,
    pickle.APPEND: 0,
    pickle.APPENDS: 0,
    pickle.SETITEM: 0,
    pickle.SETITEMS: 0,
    pickle.MEMOIZE: 0,
    pickle.PROTO: 1,
    pickle.FRAME: 8,
    pickle.BININT: 4,
    pickle.BININT1: 1,
    pickle.BININT2: 2,
    pickle.BINFLOAT: 8,
    pickle.BINGET: 1,
    pickle.LONG_BINGET: 4,
    pickle.BINPUT: 1,
}
# Opcodes with a length of so many bytes in front of their argument.
_PREFIXED: dict[bytes, int] = {
    pickle.SHORT_BINSTRING: 1,
    pickle.SHORT_BINUNICODE: 1,
    pickle.SHORT_BINBYTES: 1,
    pickle.BINSTRING: 4,
    pickle.BINUNICODE: 4,
    pickle.BINBYTES: 4,
    pickle.BINUNICODE8: 8,
    pickle.BINBYTES8: 8,
    pickle.LONG1: 1,
}
_TEXT_LINE = {pickle.STRING[0], pickle.UNICODE[0]}
_NUMBER_LINE = {pickle.INT[0], pickle.LONG[0], pickle.FLOAT[0], pickle.PUT[0], pickle.GET[0]}
_TUPLES = {pickle.TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]}

_FIXED_SIZE = [_FIXED.get(bytes([op]), -1) for op in range(256)]
_PREFIX_SIZE = {key[0]: width for key, width in _PREFIXED.items()}

# How Python 3 writes bytes in Python 2's protocol: as a call of one of these two.
_BYTES_CALLS = (b"_codecs\nencode\n", b"__builtin__\nbytes\n")


class _Refused(Exception):
    """The pickle holds something that refs have no use for."""


def load_refs(path: str | Path) -> list[Ref]:
    """Load the references of one `refs(splitBy).p`.

    Args:
        path: the pickle, of any protocol, written by Python 2 or 3.

    Returns:
        The references in the file's order, each {ref_id, ann_id, category_id, image_id,
        split, file_name, sent_ids, sentences: [{sent_id, raw, sent, tokens}]} with every
        text as str. `file_name`, `sent_ids` and, where one of `raw` and `sent` is given,
        the other and `tokens` are filled in when absent.

    Raises:
        InputError: the file is missing, too large, damaged, holds anything but lists,
            dicts, numbers and strings, or is not a list of references.
    """
    path = Path(path)
    data = _read(path)
    try:
        calls = _scan(data)
        plain = _Plain(len(data))(_Unpickler(data, calls).load(), 0)
    except _Refused as error:
        raise InputError(
            f"{path}: refused, {error}; refs hold only lists, dicts, numbers and strings "
            "(see refer/README.md)"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(
            f"{path}: not a readable pickle ({reason}); get the file again, see refer/README.md"
        ) from None
    if not isinstance(plain, list):
        raise InputError(f"{path}: holds a {type(plain).__name__}, not a list of references")
    return [_reference(ref, f"{path}: reference {i}") for i, ref in enumerate(plain)]


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(
                f"{path}: {size >> 20} MB, refs of more than {MAX_BYTES >> 20} MB are not read"
            )
        if not path.is_file():
            raise InputError(f"{path}: not a file; see refer/README.md")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); see refer/README.md") from None


def _scan(data: bytes) -> bool:
    """Walk the opcodes, executing none.

    Bounded here because the unpickler takes them on trust: memo indices (it allocates up to
    the index), lengths (it allocates them), digits of numbers, nested tuples.

    Args:
        data: the pickle.

    Returns:
        Whether the pickle makes bytes by a call (`_BYTES_CALLS`).

    Raises:
        _Refused: an opcode that could do more than build plain values.
    """
    pos, end, tuples, calls = 0, len(data), 0, False
    while pos < end:
        op = data[pos]
        pos += 1
        size = _FIXED_SIZE[op]
        if size >= 0:
            pos += size
        elif op in _PREFIX_SIZE:
            pos = _skip_prefixed(data, pos, op)
        elif op == pickle.LONG_BINPUT[0]:
            if int.from_bytes(data[pos : pos + 4], "little") > end:
                raise _Refused("a memo index is larger than the file")
            pos += 4
        elif op in _TEXT_LINE or op in _NUMBER_LINE:
            pos = _skip_line(data, pos, op)
        elif op in _TUPLES:
            tuples += 1
        elif op == pickle.REDUCE[0] and calls:
            tuples -= 1  # the call's own arguments
        elif op == pickle.GLOBAL[0]:
            pos, calls = _skip_call(data, pos), True
        elif op == pickle.STOP[0]:
            break
        else:
            raise _Refused(f"it does more than hold data (opcode {bytes([op])!r} at {pos - 1})")
        if tuples > MAX_TUPLES:
            raise _Refused(f"it has more than {MAX_TUPLES} tuples, write lists")
    return calls


def _skip_prefixed(data: bytes, pos: int, op: int) -> int:
    width = _PREFIX_SIZE[op]
    length = int.from_bytes(data[pos : pos + width], "little")
    if length > len(data) - pos - width:
        raise _Refused("a string is longer than the file")
    if op == pickle.LONG1[0] and length > MAX_NUMBER_BYTES:
        raise _Refused("a number has more than 64 bits")
    return pos + width + length


def _skip_line(data: bytes, pos: int, op: int) -> int:
    stop = data.find(b"\n", pos)
    if stop < 0:
        raise _Refused("its last line is cut")
    if op in _NUMBER_LINE and stop - pos > MAX_LINE_NUMBER:
        raise _Refused("a number has more than 64 bits")
    if op == pickle.PUT[0] and not 0 <= int(data[pos:stop]) <= len(data):
        raise _Refused("a memo index is larger than the file")
    return stop + 1


def _skip_call(data: bytes, pos: int) -> int:
    for call in _BYTES_CALLS:
        if data.startswith(call, pos):
            return pos + len(call)
    name = b".".join(data[pos : pos + 80].split(b"\n")[:2]).decode("ascii", "replace")
    raise _Refused(f"it asks for {name!r}")


def _latin1_for_bad_bytes(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: what is not UTF-8 is Latin-1, as in data sets of mixed origin."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("refer-latin1", _latin1_for_bad_bytes)


def _make_bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("it calls a codec")
    return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Runs a scanned pickle; Python 2's str becomes str."""

    def __init__(self, data: bytes, calls: bool) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="refer-latin1")
        self._calls = calls

    def find_class(self, module: str, name: str, /) -> Any:
        if self._calls and f"{module}\n{name}\n".encode() in _BYTES_CALLS:
            return _make_bytes
        raise _Refused(f"it asks for '{module}.{name}'")

    def persistent_load(self, pid: Any, /) -> Any:
        raise _Refused("it refers to objects outside itself")


class _Plain:
    """Copies a loaded value as a tree of list, dict, str, int, float, bool and None.

    Also bounds the tree: a few bytes can refer to one list a billion times.
    """

    def __init__(self, pickle_bytes: int) -> None:
        self._left = MAX_UNFOLDING * pickle_bytes

    def __call__(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str or kind is int or kind is float or kind is bool or value is None:
            return value
        if kind is bytes:
            return value.decode("utf-8", "refer-latin1")
        if kind is not list and kind is not dict and kind is not tuple:
            raise _Refused(f"it holds a {kind.__name__}")
        self._left -= len(value)
        if self._left < 0:
            raise _Refused("it refers to the same lists over and over")
        if depth == MAX_DEPTH:
            raise _Refused(f"it is nested more than {MAX_DEPTH} deep")
        if kind is dict:
            return {self(k, MAX_DEPTH): self(v, depth + 1) for k, v in value.items()}
        return [self(item, depth + 1) for item in value]


def _reference(ref: Any, where: str) -> Ref:
    """Check one reference and fill in what can be derived."""
    if not isinstance(ref, dict):
        raise InputError(f"{where} is of type {type(ref).__name__}, not a dict")
    for key in ("ref_id", "ann_id", "image_id", "category_id"):
        _field(ref, key, int, where)
    _field(ref, "split", str, where)
    sentences = _field(ref, "sentences", list, where)
    ref["sentences"] = [_sentence(s, f"{where}, sentence {i}") for i, s in enumerate(sentences)]
    ref["sent_ids"] = [s["sent_id"] for s in ref["sentences"]]
    ref.setdefault("file_name", "")
    return ref


def _sentence(sentence: Any, where: str) -> dict[str, Any]:
    if not isinstance(sentence, dict):
        raise InputError(f"{where} is of type {type(sentence).__name__}, not a dict")
    _field(sentence, "sent_id", int, where)
    if "raw" not in sentence and "sent" in sentence:
        sentence["raw"] = sentence["sent"]
    raw = _field(sentence, "raw", str, where)
    sent = sentence.setdefault("sent", raw.lower())
    if not isinstance(sent, str):
        _field(sentence, "sent", str, where)
    if not isinstance(sentence.get("tokens"), list):
        sentence["tokens"] = sent.split()
    return sentence


def _field(record: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = record.get(key)
    if type(value) is not kind:
        got = f"a {type(value).__name__}" if key in record else "none"
        raise InputError(f"{where} needs '{key}' as {kind.__name__} but has {got}")
    return value
