"""Read `refs(*).p`, an untrusted pickle, without running any code in it."""

from __future__ import annotations

import codecs
import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import InputError
from refer.images import MAX_PIXELS
from refer.instances import load_instances, whole

Ref = dict[str, Any]

MAX_BYTES = 256 << 20  # RefCOCO's pickles have 15 to 45 MB
# Memory while loading: a flipped bit of an index may ask for 32 GB; RefCOCO takes 20 x its size.
MAX_MEMORY_PER_BYTE = 64
MAX_MEMORY = 1 << 30  # beside that
MAX_DEPTH = 8  # a token is four deep: refs, ref, sentences, sentence, tokens

# How Python 3 writes bytes in Python 2's protocols: as calls of one of these.
BYTES_CALLS = {("_codecs", "encode"), ("__builtin__", "bytes")}
HELP = "see refer/README.md"


class NotPlain(Exception):
    """The pickle holds something other than lists, dicts, numbers and strings."""


def find(folder: Path, split_by: str) -> tuple[Path, Path]:
    """The files of a dataset in REFER layout: ``refs(splitBy).p`` and ``instances.json``.

    Raises:
        InputError: there is no such pickle.
    """
    path = folder / f"refs({split_by}).p"
    there = sorted(file.name[5:-3] for file in folder.glob("refs(*).p"))
    if split_by not in there:
        choice = f"there is {', '.join(there)} (--splitBy)" if there else "there is none at all"
        raise InputError(f"{path} does not exist; {choice}, {HELP}")
    return path, folder / "instances.json"


def read(files: tuple[Path, Path], max_pixels: int = MAX_PIXELS) -> dict[str, list[Ref]]:
    """The records of these files: refs, images, annotations, categories."""
    return {"refs": load_refs(files[0]), **load_instances(files[1], max_pixels)}


def load_refs(path: str | Path) -> list[Ref]:
    """Load the references of one `refs(splitBy).p`.

    Args:
        path: the pickle, of any protocol, written by Python 2 or 3.

    Returns:
        The references in the file's order, each {ref_id, ann_id, ann_ids, category_id, image_id,
        split, file_name, sent_ids, sentences: [{sent_id, raw, sent, tokens}]} with every text as
        str. `ann_ids` lists the annotations: none, one or several. `file_name`, `sent_ids` and, if
        one of `raw` and `sent` is given, the other and `tokens` are filled in.

    Raises:
        InputError: the file is missing, too large, damaged, holds anything but lists, dicts,
            numbers and strings (or NumPy's), or is not a list of references.
    """
    return check_refs(unpickle(Path(path)), path)


def unpickle(path: Path) -> Any:
    """The lists, dicts, numbers and strings of a pickle; see :func:`load_refs`."""
    try:
        data = _read(path)
        with _memory_limit(MAX_MEMORY_PER_BYTE * len(data) + MAX_MEMORY):
            return _plain(_Unpickler(data).load(), MAX_DEPTH)
    except InputError:
        raise
    except NotPlain as error:
        raise InputError(
            f"{path}: not loaded, {error}; refs hold only lists, dicts, numbers and strings, {HELP}"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(
            f"{path}: not a readable pickle ({reason}); get the file again, {HELP}"
        ) from None


def check_refs(refs: Any, path: str | Path) -> list[Ref]:
    """Check references and fill in derived fields, in place; see :func:`load_refs`."""
    if not isinstance(refs, list):
        raise InputError(f"{path}: holds a {type(refs).__name__}, not a list of references")
    return [_reference(ref, f"{path}: reference {i}") for i, ref in enumerate(refs)]


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            limit = MAX_BYTES >> 20
            raise InputError(f"{path}: {size >> 20} MB, the upper limit for refs is {limit} MB")
        if not path.is_file():
            raise InputError(f"{path}: not a file; {HELP}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); {HELP}") from None


@contextlib.contextmanager
def _memory_limit(extra: int) -> Iterator[None]:
    """Raise MemoryError for allocations beyond ``extra`` bytes; on Linux only."""
    try:
        import resource  # not on Windows

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):
        yield
        return
    limit = pages * resource.getpagesize() + extra
    if before[0] == resource.RLIM_INFINITY or limit < before[0]:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _latin1_for_bad_bytes(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: bytes that are not UTF-8 are decoded as Latin-1."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("refer-latin1", _latin1_for_bad_bytes)


def _decode(value: bytes) -> str:
    return value.decode("utf-8", "refer-latin1")


class _Unpickler(pickle.Unpickler):
    """Builds plain values only: no class or function of a pickle is ever imported."""

    def __init__(self, data: bytes) -> None:
        # Python 2's str becomes str.
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="refer-latin1")

    def find_class(self, module: str, name: str, /) -> Any:
        """The replacement for the two calls that make bytes, or for one of NumPy's."""
        if (module, name) in BYTES_CALLS:
            return _make_bytes
        if module.partition(".")[0] == "numpy":
            from refer.numpy_pickles import replacement

            if stand_in := replacement(module, name):
                return stand_in
        raise NotPlain(f"it asks for '{module}.{name}'")

    def persistent_load(self, pid: Any, /) -> Any:
        """Never."""
        raise NotPlain("it refers to objects outside itself")


def _make_bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise NotPlain("it calls a codec")
    return text.encode("latin-1")


_SCALARS = frozenset({str, int, float, bool, type(None)})


def _plain(value: Any, depth: int) -> Any:
    """A copy of lists, dicts and scalars, bytes decoded; at most `depth` levels deep."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is bytes:
        return _decode(value)
    if kind is not list and kind is not dict:
        from refer.numpy_pickles import Array

        if kind is Array and depth:
            return _plain(value.values, depth - 1)
        raise NotPlain(f"it holds a {kind.__name__}")
    if not depth:
        raise NotPlain(f"it is nested more than {MAX_DEPTH} deep")
    if kind is dict:
        return {_plain(k, 0): _plain(v, depth - 1) for k, v in value.items()}
    if _SCALARS.issuperset(map(type, value)):
        return value.copy()
    return [_plain(item, depth - 1) for item in value]


def _reference(ref: Any, where: str) -> Ref:
    """Check one reference and fill in derived fields."""
    if not isinstance(ref, dict):
        raise InputError(f"{where} is of type {type(ref).__name__}, not a dict")
    for key in ("ref_id", "image_id"):
        _field(ref, key, int, where)
    ref["ann_ids"] = _annotation_ids(ref, where)
    if isinstance(categories := ref.get("category_id"), list):
        ref["category_id"] = categories[0] if categories else -1
    _field(ref, "category_id", int, where)
    _field(ref, "split", str, where)
    sentences = _field(ref, "sentences", list, where)
    ref["sentences"] = [
        s if _is_complete(s) else _sentence(s, f"{where}, sentence {i}")
        for i, s in enumerate(sentences)
    ]
    ref["sent_ids"] = [s["sent_id"] for s in ref["sentences"]]
    ref.setdefault("file_name", "")
    return ref


def _annotation_ids(ref: Ref, where: str) -> list[int]:
    """The annotations of a reference, each once; -1 stands for none."""
    for key in ref.keys() & {"ann_id", "ann_ids"}:
        value = ref[key]
        ref[key] = list(map(whole, value)) if isinstance(value, list) else whole(value)
    key = "ann_ids" if "ann_ids" in ref else "ann_id"
    value = ref.get(key)
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        got = f"a {type(value).__name__}" if key in ref else "none"
        raise InputError(f"{where} needs '{key}' as int or list of int but has {got}")
    return [i for i in dict.fromkeys(ids) if i != -1]


def _is_complete(sentence: Any) -> bool:
    """Whether a sentence has every field, as nearly all do; :func:`_sentence` names what lacks."""
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
    if kind is int and type(value) is not int and key in record:
        value = record[key] = whole(value)
    if type(value) is not kind:
        got = f"a {type(value).__name__}" if key in record else "none"
        raise InputError(f"{where} needs '{key}' as {kind.__name__} but has {got}")
    return value
