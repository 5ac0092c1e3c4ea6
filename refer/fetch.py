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
GROWTH = 1 << 20  # bytes; a connection that brought as many, or an eighth, is no failed try
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
    failed = 0
    try:
        utils.make_folder(path.parent)
        part = _Part(remote, path, patience)
        while True:
            had = part.size()
            try:
                part.complete(show)
                part.verify(check)
                os.replace(part.path, path)
                part.note.unlink(missing_ok=True)
                return
            except Again as error:
                growth = min(GROWTH, (part.total or GROWTH) // 8)
                failed = 1 if part.size() >= had + max(1, growth) else failed + 1
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


class _Part:
    """The part of a file that has been fetched.

    A note beside a large one tells which version of the file it is of, so that a later run does
    not append another version's rest.

    Attributes:
        path: of the part.
        note: path of the note.
        total: bytes of the whole file; None if the server does not tell.
        version: what tells this version of the file from others; '' if the server tells nothing.
        resumed: whether it was fetched in pieces.
    """

    def __init__(self, remote: Remote, path: Path, patience: Patience) -> None:
        self.remote, self.patience = remote, patience
        self.path = path.with_name(path.name + ".partial")
        self.note = path.with_name(path.name + ".partial.json")
        self.total: int | None = None
        self.version, self.resumed = "", False
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
            note = json.loads(self.note.read_text(encoding="utf-8"))
            if note["url"] == remote.url and type(note["total"]) in (int, type(None)):
                self.total, self.version = note["total"], str(note["version"])

    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def discard(self) -> None:
        """Remove the part."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.total, self.version = None, ""

    def complete(self, show: bool) -> None:
        """Append what is missing."""
        have = self.size()
        if have and (have > (self.total or have) or not (self.total or self.version)):
            self.discard()  # of a version that cannot be told
            have = 0
        self.resumed = have > 0
        if have and have == self.total:
            return
        with self._request(have) as response:
            start = self._start(response, have)
            self.resumed = start > 0
            missing = (self.total or 0) - start
            if missing > shutil.disk_usage(self.path.parent).free:
                raise InputError(
                    f"{self.path.parent} has no room for {missing >> 20} MB more of "
                    f"{self.remote.url}: free some, or choose another folder"
                )
            if (self.total or self.remote.most) >= NOTED:
                facts = {"url": self.remote.url, "total": self.total, "version": self.version}
                utils.write_json(facts, self.note)
            self._copy(response, start, show)

    def _request(self, have: int) -> http.client.HTTPResponse:
        """Ask for the file from the byte `have` on; return a response with a body to use."""
        header = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
        if have:
            header["Range"] = f"bytes={have}-"
        if have and self.version:
            header["If-Range"] = self.version
        try:
            request = urllib.request.Request(self.remote.url, headers=header)
            response: Any = _opener().open(request, timeout=self.patience.silence)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                self.discard()
                raise Again("the server has no such part of the file (416)") from None
            wait = _retry_after(error.headers.get("Retry-After", ""))
            if error.code in BUSY and wait <= self.patience.asked:
                raise Again(f"the server is busy ({error.code})", wait) from None
            why = " ".join(str(error.msg).split())  # urllib's words on redirects have lines
            later = f", to be asked again in {wait / 60:.0f} minutes" if wait else ""
            raise self._error(f"{why} ({error.code}){later}") from None
        except ValueError as error:
            raise self._error(f"no address ({error})") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                why = f"the server's certificate is not valid ({reason.verify_message})"
                raise self._error(why) from None
            raise Again(f"no answer ({reason or type(error).__name__})") from None
        coded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
        coded |= response.headers.get("Transfer-Encoding", "chunked").lower() != "chunked"
        page = response.headers.get_content_type() == "text/html"
        if page or coded:
            response.close()
            what = "a web page (does the network ask for a login?)" if page else "an encoded form"
            raise self._error(f"the server sends {what} instead of the file")
        return response  # type: ignore[no-any-return]

    def _start(self, response: http.client.HTTPResponse, have: int) -> int:
        """Where a response's body starts in the file; notes the file's size and version."""
        version = response.headers.get("ETag", "")
        if not version.startswith('"'):  # a weak one
            version = response.headers.get("Last-Modified", "")
        total: int | None = None
        if response.status == 206:
            told = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            start, total = map(int, told.groups()) if told else (-1, 0)
            version = version or self.version
            changed = self.version not in ("", version) or self.total not in (None, total)
            if start != have or changed:
                self.discard()
                raise Again("the server sends another part, or the file has changed there")
        elif response.status == 200:
            start, length = 0, response.headers.get("Content-Length", "")
            total = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        else:
            raise Again(f"the server's answer is {response.status}")
        if total is not None and (
            total > self.remote.most or self.remote.size not in (None, total)
        ):
            self.discard()
            most = self.remote.size or f"at most {self.remote.most}"
            raise self._error(f"the file there has {total} bytes instead of {most}: another file")
        self.total, self.version = total, version
        return start

    def _copy(self, response: http.client.HTTPResponse, have: int, show: bool) -> None:
        """Append a response's body to the first `have` bytes."""
        expected = self.total or self.remote.size
        limit = expected or self.remote.most
        began, brought = time.monotonic(), 0
        with (
            tqdm(
                desc=self.remote.name,
                total=expected,
                initial=have,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None if show else True,  # None: where no terminal is
            ) as bar,
            open(self.path, "ab" if have else "wb", buffering=0) as file,
        ):
            while self.total is None or have < self.total:
                try:
                    data = response.read1(min(CHUNK, limit + 1 - have))
                except (OSError, http.client.HTTPException, ValueError) as error:
                    why = error or type(error).__name__
                    raise Again(f"the connection broke ({why})") from None
                if not data:
                    break
                have += file.write(data[: self.total and self.total - have])
                bar.update(len(data))
                if have > limit:
                    self.discard()
                    raise self._error(f"more than the {limit} bytes that are expected")
                brought += len(data)
                if time.monotonic() - began > self.patience.window:
                    if brought < self.patience.least:
                        raise Again(f"only {brought} bytes in {self.patience.window:.0f} seconds")
                    began, brought = time.monotonic(), 0
        if have < (expected or 0):
            raise Again(f"the connection ended after {have} of {expected} bytes")

    def verify(self, check: Callable[[Path], None] | None) -> None:
        """Check a file that is complete; a wrong one is removed."""
        wanted = self.remote.digest
        try:
            if wanted and (found := digest_of(self.path, wanted)) != wanted:
                if self.resumed:
                    raise Again("the joined parts have a wrong checksum")
                raise self._error(
                    f"the checksum is {found} instead of {wanted}: another file, or damaged, and "
                    "removed; --skip_checksum accepts it"
                )
            if check is not None:
                check(self.path)
        except (Again, FetchError):
            self.discard()
            raise

    def _error(self, why: str) -> FetchError:
        return FetchError(f"{self.remote.url}: {why}; {self.remote.remedy}")


def digest_of(path: Path, like: str) -> str:
    """A file's digest, written as `like`: 'sha256:…' or 'md5:…'."""
    kind = like.partition(":")[0]
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return f"{kind}:{digest.hexdigest()}"


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header, which has a number or a date."""
    if text.isdecimal():
        return float(text[:9])
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


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
