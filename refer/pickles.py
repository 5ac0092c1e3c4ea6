"""Read `refs(*).p` without trusting it.

A pickle is a program. This reader walks the program first and refuses it unless it only
builds lists, dicts, numbers and strings, then lets Python's own unpickler run what is left.
"""

from __future__ import annotations

import codecs
import io
import pickle
import re
from pathlib import Path
from typing import Any

from lib.errors import InputError

Ref = dict[str, Any]

MAX_BYTES = 256 << 20  # RefCOCO's pickles have 15 to 45 MB
BYTES_PER_CONTAINER = 8  # in the file, on average; refs have over 20
MAX_UNFOLDING = 2  # see `_Allowance`; 1 at most unless lists are shared
MAX_TEXT = 4  # letters of sentences a byte; 2 at most unless strings are shared
LIST_COST, DICT_COST = 8, 16  # of an empty one, in list items; about their memory
MAX_DEPTH = 8  # a word lies four deep: refs, ref, sentences, sentence, tokens
MAX_NUMBER_BYTES = 9  # of a LONG1; 64 bits and a sign
MAX_LINE_NUMBER = 24  # characters of a number in the text protocol

# Opcodes with an argument of fixed size.
_FIXED: dict[bytes, int] = {
    pickle.MARK: 0,
    pickle.POP: 0,
    pickle.POP_MARK: 0,
    pickle.NONE: 0,
    pickle.NEWTRUE: 0,
    pickle.NEWFALSE: 0,
    pickle.APPEND: 0,
    pickle.APPENDS: 0,
    pickle.SETITEM: 0,
    pickle.SETITEMS: 0,
    pickle.MEMOIZE: 0,
    pickle.PROTO: 1,
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
_CONTAINERS = {pickle.EMPTY_LIST[0], pickle.EMPTY_DICT[0], pickle.LIST[0], pickle.DICT[0]}
_TUPLES = {
    pickle.EMPTY_TUPLE[0],
    pickle.TUPLE[0],
    pickle.TUPLE1[0],
    pickle.TUPLE2[0],
    pickle.TUPLE3[0],
}
# A tuple is admitted as the arguments of a call alone: hashed as a key, tuples of tuples take
# time that doubles with each level. Picklers may note it between the two.
_ARGUMENTS = re.compile(rb"(?:\x94|q.|r.{4}|p\d{1,20}\n)?R", re.DOTALL)

MAX_RUN = 1000  # opcodes that a match may span: it takes memory for each
SHORT_STRING = 64  # bytes; longer strings are walked over one by one

_FIXED_SIZE = [_FIXED.get(bytes([op]), -1) for op in range(256)]
_PREFIX_SIZE = {key[0]: width for key, width in _PREFIXED.items()}

# How Python 3 writes bytes in Python 2's protocol: as a call of one of these two.
_BYTES_CALLS = (b"_codecs\nencode\n", b"__builtin__\nbytes\n")


class _Refused(Exception):
    """The pickle holds something that refs have no use for."""


class _Allowance:
    """How much may be made of a file: a few bytes can refer to one long list a billion times.

    Args:
        amount: in proportion to the file's size.
    """

    def __init__(self, amount: int) -> None:
        self._left = amount + 64

    def take(self, amount: int) -> None:
        """Use some of it up.

        Raises:
            _Refused: there is not so much left.
        """
        self._left -= amount
        if self._left < 0:
            raise _Refused("it unfolds to far more than its size")


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
        _check_text(plain, _Allowance(MAX_TEXT * len(data)))
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
    the index), lengths (it allocates them), digits of numbers, frames (it would go on reading
    behind the end of a false one), how many lists and dicts there are (each takes 70 bytes or
    more).

    Args:
        data: the pickle.

    Returns:
        Whether the pickle makes bytes by a call (`_BYTES_CALLS`).

    Raises:
        _Refused: an opcode that could do more than build plain values.
    """
    calls = False
    pos, end = 0, len(data)
    limit = end  # of the frame, where there is one
    harmless = _harmless_run(_highest_index(end))
    containers = end // BYTES_PER_CONTAINER + 64
    while pos < limit:
        run = harmless.match(data, pos, limit)
        op = data[pos]
        pos += 1
        size = _FIXED_SIZE[op]
        if run:
            pos = run.end()
        elif size >= 0:
            pos += size
        elif op in _CONTAINERS:
            containers -= 1
        elif op in _PREFIX_SIZE:
            pos = _skip_prefixed(data, pos, op)
        elif op in _TEXT_LINE or op in _NUMBER_LINE:
            pos = _skip_line(data, pos, op)
        elif op == pickle.LONG_BINPUT[0]:
            _check_index(int.from_bytes(data[pos : pos + 4], "little"), end)
            pos += 4
        elif op == pickle.FRAME[0]:
            pos, limit = _enter_frame(data, pos, in_frame=limit < end)
        elif op == pickle.STOP[0]:
            break
        elif op == pickle.GLOBAL[0]:
            pos, calls = _skip_call(data, pos), True
        elif op in _TUPLES and not (calls and _ARGUMENTS.match(data, pos)):
            raise _Refused("it has tuples, write lists")
        elif op not in _TUPLES and not (op == pickle.REDUCE[0] and calls):
            raise _Refused(f"it does more than hold data (opcode {bytes([op])!r} at {pos - 1})")
        if containers < 0:
            raise _Refused("it unfolds to far more than its size")
        if pos >= limit:
            if pos > limit:
                raise _Refused("it is cut, or its frames are false")
            limit = end
    return calls


def _enter_frame(data: bytes, pos: int, in_frame: bool) -> tuple[int, int]:
    """Where a frame's content begins and ends."""
    begin = pos + 8
    limit = begin + int.from_bytes(data[pos:begin], "little")
    if in_frame or limit > len(data) or limit == begin:
        raise _Refused("it is cut, or its frames are false")
    return begin, limit


def _check_index(index: int, size: int) -> None:
    """Refuse a memo index that a file of so many bytes cannot have come to."""
    if not 0 <= index <= _highest_index(size):
        raise _Refused("a memo index is larger than the file")


def _highest_index(size: int) -> int:
    return size // 2 + 64


def _harmless_run(highest_index: int) -> re.Pattern[bytes]:
    """Opcodes in a row that `_scan` has nothing to count or to refuse in; ten times its speed.

    It matches less than is allowed, never more: the rest is left to the walk.

    Args:
        highest_index: of the memo.
    """
    by_size: dict[int, list[bytes]] = {}
    for op, size in _FIXED.items():
        by_size.setdefault(size, []).append(re.escape(op))
    digits = len(str(highest_index)) - 1
    kinds = [rb"[pg][0-9]{1,%d}\n" % digits, rb"[VS][^\n]*\n"]
    kinds += [rb"[ILF][^\n]{0,%d}\n" % MAX_LINE_NUMBER]
    kinds += [b"[%s].{%d}" % (b"".join(ops), size) for size, ops in sorted(by_size.items())]
    if highest_index >> 16:
        kinds.append(rb"r..[\x00-\x%02x]\x00" % (min(highest_index >> 16, 256) - 1))
    for op, width in _PREFIXED.items():
        if op != pickle.LONG1:
            lengths = [(re.escape(n.to_bytes(width, "little")), n) for n in range(SHORT_STRING)]
            strings = b"|".join(b"%s.{%d}" % length for length in lengths)
            kinds.append(b"%s(?:%s)" % (re.escape(op), strings))
    return re.compile(b"(?:%s){1,%d}" % (b"|".join(kinds), MAX_RUN), re.DOTALL)


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
    if op == pickle.PUT[0]:
        _check_index(int(data[pos:stop]), len(data))
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


class _Unpickler(pickle.Unpickler):
    """Runs a scanned pickle; Python 2's str becomes str."""

    def __init__(self, data: bytes, calls: bool) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="refer-latin1")
        self._calls = calls
        self._allowance = _Allowance(len(data))

    def find_class(self, module: str, name: str, /) -> Any:
        if self._calls and f"{module}\n{name}\n".encode() in _BYTES_CALLS:
            return self._make_bytes
        raise _Refused(f"it asks for '{module}.{name}'")

    def persistent_load(self, pid: Any, /) -> Any:
        raise _Refused("it refers to objects outside itself")

    def _make_bytes(self, text: str = "", encoding: str = "latin1") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refused("it calls a codec")
        self._allowance.take(len(text))
        return text.encode("latin-1")


_SCALARS = frozenset({str, int, float, bool, type(None)})


class _Plain:
    """Copies a loaded value as a tree of list, dict, str, int, float, bool and None."""

    def __init__(self, pickle_bytes: int) -> None:
        self._allowance = _Allowance(MAX_UNFOLDING * pickle_bytes)
        self._decoded: dict[bytes, str] = {}  # each once, however often it is referred to

    def __call__(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is bytes:
            if value not in self._decoded:
                self._decoded[value] = value.decode("utf-8", "refer-latin1")
            return self._decoded[value]
        if kind is not list and kind is not dict:
            raise _Refused(f"it holds a {kind.__name__}")
        self._allowance.take(len(value) + (DICT_COST if kind is dict else LIST_COST))
        if depth == MAX_DEPTH:
            raise _Refused(f"it is nested more than {MAX_DEPTH} deep")
        if kind is dict:
            keys_are_plain = _SCALARS.issuperset(map(type, value))
            return {
                k if keys_are_plain else self(k, MAX_DEPTH): (
                    v if type(v) in _SCALARS else self(v, depth + 1)
                )
                for k, v in value.items()
            }
        if _SCALARS.issuperset(map(type, value)):
            return value.copy()
        return [self(item, depth + 1) for item in value]


def _check_text(refs: Any, allowance: _Allowance) -> None:
    """Bound the sentences' letters: all of them are copied, split and tokenised."""
    for ref in refs if isinstance(refs, list) else []:
        sentences = ref.get("sentences") if isinstance(ref, dict) else None
        for sentence in sentences if isinstance(sentences, list) else []:
            if isinstance(sentence, dict):
                raw, sent = sentence.get("raw"), sentence.get("sent")
                letters = len(raw) if isinstance(raw, str) else 0
                allowance.take(max(letters, len(sent) if isinstance(sent, str) else 0))


def _reference(ref: Any, where: str) -> Ref:
    """Check one reference and fill in what can be derived."""
    if not isinstance(ref, dict):
        raise InputError(f"{where} is of type {type(ref).__name__}, not a dict")
    for key in ("ref_id", "ann_id", "image_id", "category_id"):
        _field(ref, key, int, where)
    _field(ref, "split", str, where)
    sentences = _field(ref, "sentences", list, where)
    ref["sentences"] = [
        s if _is_whole(s) else _sentence(s, f"{where}, sentence {i}")
        for i, s in enumerate(sentences)
    ]
    ref["sent_ids"] = [s["sent_id"] for s in ref["sentences"]]
    ref.setdefault("file_name", "")
    return ref


def _is_whole(sentence: Any) -> bool:
    """Whether a sentence has every field, as nearly all have; `_sentence` tells what is wrong."""
    return (
        isinstance(sentence, dict)
        and type(sentence.get("sent_id")) is int
        and type(sentence.get("raw")) is str
        and type(sentence.get("sent")) is str
        and type(sentence.get("tokens")) is list
    )


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
