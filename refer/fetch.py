"""Fetch files by HTTP: resumed, checked, and under their own name only once they are whole."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import queue
import random
import re
import shutil
import ssl
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import utils
from lib.errors import InputError

AGENT = "lavt (referring image segmentation; python -m refer.download)"
CHUNK = 1 << 18
GROWTH = 1 << 20  # bytes; a connection that brought as many is no failed try
NOTED = 4 << 20  # bytes; a file of as many is resumed by a later run
BUSY = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

T = TypeVar("T")
R = TypeVar("R")


class FetchError(InputError):
    """A server does not give the file."""


class Again(Exception):
    """A try failed; the next may not."""

    def __init__(self, reason: object, wait: float = 0.0) -> None:
        super().__init__(str(reason))
        self.wait = wait


@dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes:
        url: its address.
        remedy: what to do if the server does not give it.
        most: upper limit of its bytes.
        size: its bytes, None if not known.
        digest: 'sha256:…' or 'md5:…', '' if not known.
    """

    url: str
    remedy: str
    most: int
    size: int | None = None
    digest: str = ""

    @property
    def name(self) -> str:
        """Of the file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server; times are seconds.

    Attributes:
        tries: in a row that bring nearly nothing.
        pause: before the second try; it doubles with each, up to `longest`.
        asked: the longest wait that a server may ask for.
        silence: without a byte.
        window, least: a connection that brings fewer bytes in a window is cut.
    """

    tries: int = 6
    pause: float = 1.0
    longest: float = 60.0
    asked: float = 600.0
    silence: float = 30.0
    window: float = 60.0
    least: int = 60 << 10


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https alone: with urllib's usual handlers a redirect could name a file."""
    opener, known = urllib.request.OpenerDirector(), urllib.request
    handlers = [known.ProxyHandler(), known.UnknownHandler(), known.HTTPHandler()]
    handlers += [known.HTTPSHandler(), known.HTTPRedirectHandler(), known.HTTPErrorProcessor()]
    for handler in [*handlers, known.HTTPDefaultErrorHandler()]:
        opener.add_handler(handler)
    return opener


def fetch(
    remote: Remote,
    path: Path,
    patience: Patience,
    check: Callable[[Path], None] | None = None,
    show: bool = False,
) -> None:
    """Fetch a file; what an earlier try brought is kept in `path` + '.partial' and resumed.

    Args:
        remote: where it is.
        path: of the file, which is written when all is there and checked.
        patience: with the server.
        check: of the content; raises FetchError, or Again to try anew.
        show: a progress bar.

    Raises:
        FetchError: the server does not give the file.
        InputError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    failed, had = 0, _size(partial)
    tag: dict[str, Any] = _read_note(partial, remote.url)
    try:
        utils.make_folder(path.parent)
        while True:
            try:
                resumed = _receive(remote, partial, tag, patience, show)
                _verify(remote, partial, check, resumed)
                os.replace(partial, path)
                _note(partial).unlink(missing_ok=True)
                return
            except Again as error:
                grown, had = _size(partial) - had, _size(partial)
                failed = 1 if grown >= GROWTH else failed + 1
                if failed >= patience.tries:
                    raise FetchError(
                        f"{remote.url}: {error}; given up after {failed} tries: {remote.remedy}, "
                        f"or run the command again later, which resumes at {path.name}"
                    ) from None
                pause = min(patience.longest, patience.pause * 2 ** (failed - 1))
                time.sleep(max(error.wait, pause * random.uniform(0.5, 1.0)))
    except OSError as error:  # the network's are all Again
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "folder, then run the command again: it resumes"
        ) from None


def _receive(
    remote: Remote, partial: Path, tag: dict[str, Any], patience: Patience, show: bool
) -> bool:
    """Write what is missing of a file to `partial`; return whether there was a part before.

    `tag` tells which version of the file the part is of; it is updated.
    """
    have = _size(partial)
    if have and (not tag or have > (tag.get("total") or remote.size or have)):
        _discard(partial)  # of another file or an unknown one
        have = 0
    if have and have == tag.get("total"):
        return True
    with _open(remote, have, tag, patience, partial) as response:
        start, total = _place(response, have, tag, partial)
        if total is not None and (total > remote.most or total != (remote.size or total)):
            _discard(partial)
            most = f"at most {remote.most}" if remote.size is None else remote.size
            raise FetchError(
                f"{remote.url}: the file there has {total} bytes instead of {most}, so it is "
                f"another: {remote.remedy}"
            )
        tag.clear()
        tag.update(url=remote.url, total=total, version=_version(response))
        missing = (total or 0) - start
        if missing > shutil.disk_usage(partial.parent).free:
            raise InputError(
                f"{partial.parent} has no room for {missing >> 20} MB more of {remote.url}: free "
                "some, or choose another folder"
            )
        if (total or remote.most) >= NOTED:
            utils.write_json(tag, _note(partial))
        _copy(remote, response, partial, start, total, patience, show)
    return start > 0


def _open(
    remote: Remote, have: int, tag: dict[str, Any], patience: Patience, partial: Path
) -> http.client.HTTPResponse:
    """Ask for a file from the byte `have` on; return a response with a body to use."""
    header = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        header["Range"] = f"bytes={have}-"
        if tag.get("version"):
            header["If-Range"] = tag["version"]
    try:
        request = urllib.request.Request(remote.url, headers=header)
        response: http.client.HTTPResponse = _opener().open(request, timeout=patience.silence)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there is no such part: not the file that was begun
            _discard(partial)
            raise Again("the server has no such part of the file (416)") from None
        if error.code in BUSY:
            wait = _retry_after(error.headers.get("Retry-After", ""))
            if wait <= patience.asked:
                raise Again(f"the server is busy ({error.code})", wait) from None
            why = f"asks to wait for {wait / 60:.0f} minutes"
        else:
            why = " ".join(str(error.msg).split())  # urllib's words on redirects have lines
        raise FetchError(f"{remote.url}: {why} ({error.code}); {remote.remedy}") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise FetchError(f"{remote.url}: no address ({error}); {remote.remedy}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = f"the server's certificate is not valid ({reason.verify_message})"
            raise FetchError(f"{remote.url}: {why}; {remote.remedy}") from None
        raise Again(f"no answer ({reason or type(error).__name__})") from None
    kind = response.headers.get_content_type()
    coded = [
        response.headers.get(name, usual)
        for name, usual in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked"))
    ]
    if kind == "text/html" or [c.lower() for c in coded] != ["identity", "chunked"]:
        response.close()
        what = "a web page" if kind == "text/html" else f"the file encoded ({', '.join(coded)})"
        raise FetchError(
            f"{remote.url}: the server sends {what} instead of the file; does the network ask "
            f"for a login? Otherwise {remote.remedy}"
        )
    return response


def _place(
    response: http.client.HTTPResponse, have: int, tag: dict[str, Any], partial: Path
) -> tuple[int, int | None]:
    """Where the body starts in the file, and the file's size, if that is told."""
    if response.status == 206:
        told = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        start, total = map(int, told.groups()) if told else (-1, 0)
        known, version = tag.get("total"), _version(response)
        changed = version and tag.get("version") and version != tag["version"]
        if start != have or changed or (have and known not in (None, total)):
            _discard(partial)
            raise Again("the server sends another part, or the file has changed there")
        return start, total
    if response.status != 200:
        raise Again(f"the server's answer is {response.status}")
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() and len(length) < 19 else None


def _copy(
    remote: Remote,
    response: http.client.HTTPResponse,
    partial: Path,
    have: int,
    total: int | None,
    patience: Patience,
    show: bool,
) -> None:
    """Append a response's body to the first `have` bytes of `partial`."""
    limit = total or remote.size or remote.most
    bar = tqdm(
        desc=remote.name,
        total=total,
        initial=have,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if show else True,  # None: where nobody looks
    )
    began, brought = time.monotonic(), 0
    with bar, open(partial, "ab" if have else "wb", buffering=0) as file:
        while total is None or have < total:
            try:
                data = response.read1(min(CHUNK, limit + 1 - have))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise Again(f"the connection broke ({error or type(error).__name__})") from None
            if not data:
                break
            data = data[: total - have] if total else data
            have += file.write(data)
            brought += len(data)
            bar.update(len(data))
            if have > limit:
                break
            if time.monotonic() - began > patience.window:
                if brought < patience.least:
                    raise Again(f"only {brought} bytes came in {patience.window:.0f} seconds")
                began, brought = time.monotonic(), 0
    if have > limit:
        _discard(partial)
        raise FetchError(
            f"{remote.url}: more than the {limit} bytes that are expected; removed, as it is "
            f"another file: {remote.remedy}"
        )
    if have < (total or remote.size or 0):
        raise Again(f"the connection ended after {have} of {total or remote.size} bytes")


def _verify(
    remote: Remote, partial: Path, check: Callable[[Path], None] | None, resumed: bool
) -> None:
    """Check a file that is complete; a wrong one is removed."""
    try:
        if remote.digest and (found := digest_of(partial, remote.digest)) != remote.digest:
            if resumed:
                raise Again("the joined parts have a wrong checksum")
            raise FetchError(
                f"{remote.url}: the checksum is {found} instead of {remote.digest}; removed, as "
                f"it is another file or damaged: {remote.remedy}, or accept it with "
                "--skip_checksum"
            )
        if check is not None:
            check(partial)
    except (Again, FetchError):
        _discard(partial)
        raise


def digest_of(path: Path, like: str) -> str:
    """A file's digest, written as `like`: 'sha256:…' or 'md5:…'."""
    kind = like.partition(":")[0]
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return f"{kind}:{digest.hexdigest()}"


def _version(response: http.client.HTTPResponse) -> str:
    """What tells this version of a file from others; '' if the server tells nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header, which has a number or a date."""
    if text.isdecimal():
        return float(text[:9])
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _read_note(partial: Path, url: str) -> dict[str, Any]:
    """Which version of the file at `url` a part is of; {} if that is not known."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        note = json.loads(_note(partial).read_text(encoding="utf-8"))
        if note.get("url") == url and type(note.get("total")) in (int, type(None)):
            return {"url": url, "total": note["total"], "version": str(note["version"])}
    return {}


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _note(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def in_threads(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """Results of `work`, as they come; its first exception ends all.

    The threads do not delay the end of an interrupted program, as an executor's do.
    """
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()
    for item in items:
        todo.put(item)

    def loop() -> None:
        with contextlib.suppress(queue.Empty):
            while not over.is_set():
                item = todo.get_nowait()
                try:
                    done.put((work(item), None))
                except BaseException as error:
                    done.put((None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=loop, daemon=True).start()
    try:
        for _ in items:
            result, error = done.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    finally:
        over.set()


def unzip(
    archive: Path, target: Callable[[str], Path | None], most: int, most_in_all: int
) -> list[Path]:
    """Write members of a zip to the paths that `target` gives for their names.

    Members' names never become paths, so none leads out of a folder. Each file is written
    atomically, in the archive's order.

    Args:
        archive: the zip.
        target: the path of a member; None to leave it.
        most, most_in_all: upper limits of the bytes of a file and of all.

    Returns:
        The files that were written.

    Raises:
        InputError: damaged, too large, or the files cannot be written.
    """
    remedy = "remove it and run the command again"
    written: list[Path] = []
    in_all = 0
    try:
        with zipfile.ZipFile(archive) as content:
            members: dict[Path, zipfile.ZipInfo] = {}
            for info in content.infolist():
                path = None if info.is_dir() else target(info.filename)
                if path is not None:
                    members.setdefault(path, info)
                    usual = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                    link = stat.S_ISLNK(info.external_attr >> 16)
                    if link or not usual or info.file_size > most:
                        what = f"a link, of more than {most >> 20} MB, or compressed unusually"
                        raise InputError(f"{archive}: {info.filename} is {what}; {remedy}")
            in_all = sum(info.file_size for info in members.values())
            if in_all > most_in_all:
                limit = f"{in_all >> 20} MB unpacked, the upper limit is {most_in_all >> 20} MB"
                raise InputError(f"{archive}: has {limit}; {remedy}")
            for path, info in utils.progress(members.items(), archive.name, 0, len(members)):
                _write_member(content, info, path)
                written.append(path)
    except OSError as error:
        raise InputError(
            f"cannot unpack {archive}: {error.strerror or error}; free {in_all >> 20} MB or "
            "choose another folder, then run the command again: it resumes"
        ) from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{archive} is damaged ({str(error)[:100]}); {remedy}") from None
    return written


def _write_member(content: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with content.open(info) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)  # up to file_size; checks the checksum
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
