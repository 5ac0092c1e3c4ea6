"""Reads hostile files in a process of its own, which may hang, die or fill the memory."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import utils
from lib.errors import InputError

SECONDS = 60  # far more than any needs; a case that has no end is ended by the system
ROOM = 8 << 30  # of address space: what is not bounded fails instead of filling the machine
MARKER = "pwned"


class Payload:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Never: but pickle asks whether the first of a call can be called."""


TOUCH = f"touch {MARKER}"
OPEN = f"open('{MARKER}', 'w')"
PAYLOADS = {
    "os.system": Payload(os.system, TOUCH),
    "eval": Payload(eval, OPEN),
    "exec": Payload(exec, OPEN),
    "open": Payload(open, MARKER, "w"),
    "chain": Payload(Payload(getattr, Payload(__import__, "os"), "system"), TOUCH),
    "nested": Payload(list, Payload(map, eval, [OPEN])),
    "partial": Payload(__import__("functools").partial(os.system, TOUCH)),
}


def refusal(read: Callable[[], Any], folder: Path, megabytes: int = 256) -> str:
    """The one line with which a reader refuses, having run nothing and used little memory.

    Args:
        read: raises InputError.
        folder: where payloads would leave their mark.
        megabytes: that the peak memory may grow by.
    """
    pipe, end = os.pipe()
    child = os.fork()
    if not child:
        os.close(pipe)
        with os.fdopen(end, "w") as out:
            json.dump(_read(read, folder), out)
        os._exit(0)
    os.close(end)
    with os.fdopen(pipe) as told:
        text = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the reader's process ended with {code}"
    message, kind, grown = json.loads(text)
    assert kind == "InputError", f"{kind}: {message}"
    assert message
    assert message.isprintable()
    assert "MemoryError" not in message
    assert not (folder / MARKER).exists()
    assert grown < megabytes, f"{grown} MB"
    return message


def _read(read: Callable[[], Any], folder: Path) -> tuple[str, str, int]:
    os.chdir(folder)
    gc.disable()  # freeing what the parent left would hide what the reader takes
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM,) * 2)
    utils.forget_peak_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message, kind = "nothing was refused", ""
    try:
        read()
    except InputError as error:
        message, kind = str(error), "InputError"
    except BaseException as error:
        message, kind = str(error), type(error).__name__
    return message, kind, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_the_cage_holds(tmp_path: Path) -> None:
    """Imported by test files, so that what they rely on is tested."""

    def refuse() -> None:
        raise InputError("no")

    def mark() -> None:
        (tmp_path / MARKER).touch()
        refuse()

    def grow() -> None:
        assert bytearray(b"x") * (300 << 20)
        refuse()

    def crash() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail() -> None:
        raise KeyError("x")

    assert refusal(refuse, tmp_path) == "no"
    for bad in (mark, grow, crash, fail, lambda: None):
        with pytest.raises(AssertionError):
            refusal(bad, tmp_path)
        (tmp_path / MARKER).unlink(missing_ok=True)
